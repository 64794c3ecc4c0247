"""What the GPU suite left becomes files and tables, with nothing invented where something is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from bench.workloads import tiny_workload

from fastsp.bench.run import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JUNIT = """<testsuites><testsuite timestamp="2026-01-02T03:04:05.678+00:00">
<testcase classname="tests.a" name="good" time="1.5"/>
<testcase classname="tests.a" name="bad" time="1"><failure message="4 != 5&#10;more">trace</failure></testcase>
<testcase classname="tests.a" name="left" time="0"><skipped message="needs nvidia.dali"/></testcase>
</testsuite></testsuites>"""


def pytest_benchmark(name: str, **noted) -> str:
    stats = {"median": 0.25, "data": [0.25] * 1000}
    row = {"name": name, "group": "a group", "extra_info": noted, "stats": stats}
    return json.dumps({"datetime": "2026-01-02T03:04:05.678", "benchmarks": [row]})


def test_a_suite_becomes_files_and_tables(collect, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    rows = run(tiny_workload(), ("fastsp_sp", "fastsp_mse"), 1, print)
    (out / "step.json").write_text(json.dumps(rows))
    kernel = {"provider": "ours", "p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0, "required_bytes_per_s": 4e12}
    (out / "kernels.json").write_text(pytest_benchmark("one", **kernel, fraction_of_copy=0.93, host_ms=None))
    (out / "kernels.xml").write_text(JUNIT)
    measured_with = {"device": "NVIDIA H200", "commit": "abc123", "torch": "2.11.0"}
    (out / "data.json").write_text(
        pytest_benchmark("decoding", on="cpu", images_per_second=1234.5, environment=measured_with)
    )
    assert collect.main([str(out), str(folder)]) == 0
    kept = json.loads((folder / "step.json").read_text())
    assert [row.items() >= measured.items() for row, measured in zip(kept, rows, strict=True)] == [True, True]
    assert all(row["commit"] == row["environment"]["commit"] for row in kept)
    (kernel_row,) = json.loads((folder / "kernels.json").read_text())
    assert kernel_row["median_s"] == 0.25 and kernel_row["date"] == "2026-01-02T03:04:05" and "data" not in kernel_row
    (suite,) = json.loads((folder / "kernels-outcome.json").read_text())
    assert (suite["passed"], suite["failed"], suite["skipped"]) == (1, 1, 1)
    assert suite["failures"] == ["tests.a::bad"] and suite["skips"] == ["tests.a::left"]
    text = (folder / "README.md").read_text()
    assert text in capsys.readouterr().out
    for piece in ("| fastsp_sp |", "0.93", "| 1234 |", "- failed: tests.a::bad", "kernels-outcome"):
        assert piece in text
    assert "model tiny, batch_size 3, " in text
    assert "Measured 2026-01-02T03:04:05, device NVIDIA H200, commit abc123, torch 2.11.0." in text


def test_the_folder_is_named_after_the_gpu(collect, tmp_path, monkeypatch):
    measured_with = {"device": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "data.json").write_text(pytest_benchmark("decoding", on="cpu", environment=measured_with))
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    assert collect.main([str(tmp_path)]) == 0
    assert (tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "data.json").exists()


def test_what_other_calls_left_stays_and_is_in_the_tables(collect, tmp_path):
    """The calls run alone, on machines that are given back in between."""
    folder = tmp_path / "results"
    for number, name in enumerate(("decoding", "waiting", "decoding")):
        out = tmp_path / str(number)
        out.mkdir()
        content = pytest_benchmark(name, images_per_second=float(number), device="NVIDIA H200")
        (out / f"{name}.json").write_text(content)
        assert collect.main([str(out), str(folder)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "decoding.json", "waiting.json"]
    assert json.loads((folder / "decoding.json").read_text())[0]["images_per_second"] == 2.0
    assert {"## decoding", "## waiting"} <= set((folder / "README.md").read_text().splitlines())


def test_files_by_hand_stay_as_they_are(collect, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "notes.json").write_text('{"measured": "by hand"}')
    (tmp_path / "tests.xml").write_text(JUNIT)
    assert collect.main([str(tmp_path), str(folder)]) == 0
    assert json.loads((folder / "notes.json").read_text()) == {"measured": "by hand"}


def test_nothing_is_said_so(collect, tmp_path, capsys):
    (tmp_path / "kernels.json").write_text(json.dumps({"datetime": "2026-01-02", "benchmarks": []}))
    assert collect.main([str(tmp_path)]) == 2 and "holds no results" in capsys.readouterr().err

"""What the GPU suite left becomes files and tables, with nothing invented where something is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from bench.workloads import tiny_workload

from fastsp.bench.run import Plan, run

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
    rows = run(tiny_workload(), Plan(("fastsp_sp", "fastsp_mse"), rounds=1), print)
    (out / "step.json").write_text(json.dumps(rows))
    kernel = {"provider": "ours", "p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0, "required_bytes_per_s": 4e12}
    (out / "kernels-a.json").write_text(pytest_benchmark("one", **kernel, fraction_of_copy=0.93, host_ms=None))
    measured_with = {"device": "NVIDIA H200", "commit": "abc123", "torch": "2.11.0"}
    (out / "data.json").write_text(
        pytest_benchmark("decoding", on="cpu", images_per_second=1234.5, environment=measured_with)
    )
    (out / "gpu-test-step.xml").write_text(JUNIT)
    (out / "roofline.png").write_bytes(b"\x89PNG")
    assert collect.main([str(out), str(folder)]) == 0
    assert json.loads((folder / "step.json").read_text()) == rows
    (kernel_row,) = json.loads((folder / "kernels.json").read_text())
    assert kernel_row["median_s"] == 0.25 and kernel_row["date"] == "2026-01-02T03:04:05" and "data" not in kernel_row
    (suite,) = json.loads((folder / "tests.json").read_text())
    assert suite["passed"] == 1 and suite["seconds"] == 2.5 and suite["date"] == "2026-01-02T03:04:05"
    assert suite["failed"] == [{"name": "tests.a::bad", "reason": "4 != 5"}]
    assert suite["skipped"] == [{"name": "tests.a::left", "reason": "needs nvidia.dali"}]
    assert (folder / "roofline.png").read_bytes() == b"\x89PNG"
    text = (folder / "README.md").read_text()
    assert text in capsys.readouterr().out
    for piece in ("| fastsp_sp |", "93%", "images_per_second 1234", "1 passed, 1 failed, 1 skipped", "times as long"):
        assert piece in text
    assert "Measured 2026-01-02T03:04:05, commit abc123, torch 2.11.0." in text


def test_the_folder_is_named_after_the_gpu(collect, tmp_path, monkeypatch):
    measured_with = {"device": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "data.json").write_text(pytest_benchmark("decoding", on="cpu", environment=measured_with))
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    assert collect.main([str(tmp_path)]) == 0
    assert (tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "data.json").exists()


def test_what_was_measured_another_time_stays(collect, tmp_path):
    """The suite's targets run alone, on machines that are given back in between."""
    folder = tmp_path / "results"
    for number, name in enumerate(("decoding", "waiting", "decoding")):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "data.json").write_text(pytest_benchmark(name, images_per_second=float(number), device="NVIDIA H200"))
        (out / f"gpu-test-{name}.xml").write_text(JUNIT)
        assert collect.main([str(out), str(folder)]) == 0
    figures = {row["name"]: row["images_per_second"] for row in json.loads((folder / "data.json").read_text())}
    assert figures == {"decoding": 2.0, "waiting": 1.0}
    assert [suite["file"] for suite in json.loads((folder / "tests.json").read_text())] == [
        "gpu-test-decoding.xml",
        "gpu-test-waiting.xml",
    ]
    text = (folder / "README.md").read_text()
    assert "images_per_second 2" in text and "images_per_second 1" in text and "images_per_second 0" not in text


def test_somebody_else_s_files_stay_as_they_are(collect, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("data.json", "notes.json"):
        (folder / name).write_text('{"measured": "by hand"}')
    (tmp_path / "kernels-a.json").write_text(json.dumps({"datetime": "2026-01-02", "benchmarks": []}))
    (tmp_path / "gpu-test-step.xml").write_text(JUNIT)
    assert collect.main([str(tmp_path), str(folder)]) == 0
    assert all(
        json.loads((folder / name).read_text()) == {"measured": "by hand"} for name in ("data.json", "notes.json")
    )


def test_nothing_is_said_so(collect, tmp_path, capsys):
    assert collect.main([str(tmp_path)]) == 2 and "holds no results" in capsys.readouterr().err

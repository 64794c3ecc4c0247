"""The arithmetic of docs/scaling.md."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


def test_the_page_holds_what_the_script_prints(scaling, capsys):
    scaling.main([])
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "scaling.md").read_text()
    assert printed in page, "run python benchmarks/scaling.py and put what it prints into docs/scaling.md"


def test_one_gpu_is_its_rate(scaling):
    """At the batch of the measurement, one GPU does what was measured; more samples share one update."""
    network, rate = scaling.Network(), scaling.Rate(100.0, 896)
    assert scaling.Plan(1, False).step_seconds(rate, network) == pytest.approx(8.96)
    small = scaling.Rate(100.0, 32)
    assert scaling.Plan(1, False).step_seconds(small, network) == pytest.approx(8.96 - 27 * scaling.UPDATE_SECONDS)


def test_communication(scaling):
    rate = scaling.Rate(100.0, 112)
    alone = 1.12  # 112 samples on each of eight
    hidden, bare = scaling.Network(overlap=1.0), scaling.Network(within_node=1e11, overlap=0.0)
    ddp, fsdp = scaling.Plan(8, False), scaling.Plan(8, True)
    assert ddp.step_seconds(rate, hidden) == pytest.approx(alone)
    all_reduce = 2 * 4 * 865.9e6 * 7 / 8 / 1e11
    assert ddp.step_seconds(rate, bare) == pytest.approx(alone + all_reduce)
    sharded = 4 * (4 + 2 * 2) * 865.9e6 * 7 / 8 / 1e11  # four microbatches: reduced in float32, gathered twice in bf16
    assert fsdp.step_seconds(rate, bare) == pytest.approx(alone - 7 / 8 * scaling.UPDATE_SECONDS + sharded)
    slow = scaling.Network(across_nodes=1e9)
    assert scaling.Plan(64, False).step_seconds(rate, slow) > 1.0


def test_every_plan_splits_the_batch_and_sharding_saves_memory(scaling):
    for plan in scaling.PLANS:
        assert plan.gpus * plan.microbatches * plan.microbatch == 896
    ddp, fsdp = scaling.Plan(64, False).memory(), scaling.Plan(64, True).memory()
    assert ddp["state"] == pytest.approx(16 * 865.9e6) and fsdp["state"] == pytest.approx(ddp["state"] / 64)
    assert [scaling.Plan(gpus, False).gradient_bytes for gpus in (1, 8, 64)] == [6, 10, 6]
    assert ddp["teacher"] == fsdp["teacher"] and ddp["activations"] == fsdp["activations"]


def test_figures_of_fastsp_bench(scaling, tmp_path, capsys):
    file = tmp_path / "step.json"
    rows = [
        {"name": f"fastsp_{name}", "samples_per_s": rate, "batch_size": 16}
        for name, rate in (("mse", 80.0), ("sp", 60.0))
    ]
    file.write_text(json.dumps(rows))
    scaling.main(["--json", str(file)])
    printed = capsys.readouterr().out
    assert "80.0 samples/s per GPU for the MSE step, 60.0" in printed and "at batch 16" in printed
    assert "not ours" not in printed

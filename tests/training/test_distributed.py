"""Many processes train as one: the same samples and draws, the same weights but for rounding; and they end as one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastsp.config import load_config
from fastsp.errors import UserError
from fastsp.training.checkpoint import newest_whole
from fastsp.training.checkpoint_folder import damage, newest_first
from fastsp.training.critic import FIGURES
from fastsp.training.trainer import METRIC

# The slow ones start many processes: minutes where others use the machine too.
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("ranks.py")
STEPS = 6
OVERRIDES = [
    "data.batch_size=12",
    "stages=[{name: mse, objective: mse, steps: 3, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 3, learning_rate: 1e-4}]",
    "optimizer.warmup_steps=2",
    "final=sp",
    "checkpoint={every: 2, keep: 9}",
    "ema.warmup=false",  # few steps of Adam turn rounding into differences of a step: the average keeps them small
    "log.every=1",
    "samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}",
    "evaluation.enabled=false",
    "distributed_timeout=60",
]
CRITIC = "stages.1.critic={weight: 0.5, heads: 16, warmup_steps: 1, learning_rate: 1e-3}"
# A hung process is killed sooner than torchrun would.
ENVIRONMENT = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def job(run_dir: Path, *more: str, **rest: Any) -> dict[str, Any]:
    seen = str(run_dir.with_suffix(".seen"))
    return {"overrides": [f"run_dir={run_dir}", *OVERRIDES, *more], "seen": seen, **rest}


def run_jobs(processes: int, folder: Path, *jobs: dict[str, Any]) -> subprocess.CompletedProcess:
    """All jobs in the processes of one torchrun; of one process without it."""
    file = folder / f"jobs{processes}.json"
    file.write_text(json.dumps(jobs))
    launcher = torchrun(processes) if processes > 1 else [sys.executable]
    command = [*launcher, str(RANKS), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=500)


def rewound(run_dir: Path, step: int, to: Path) -> Path:
    """A copy of a run as it was when a checkpoint was the newest."""
    unfinished = ("sp", "mse")[: 1 if step >= 3 else 2]
    shutil.copytree(run_dir, to, ignore=shutil.ignore_patterns("final", ".lock", *unfinished))
    for folder in newest_first(to / "checkpoints"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return to


def launch(processes: int, root: Path, *jobs: dict[str, Any]) -> Path:
    result = run_jobs(processes, root, *jobs)
    assert result.returncode == 0, result.stderr[-5000:]
    return root


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Runs of two processes, by name."""
    root = tmp_path_factory.mktemp("ranks")
    return launch(
        2,
        root,
        job(root / "two_ddp", "data.microbatch=3"),
        job(root / "two_fsdp", "distributed=fsdp"),
        job(root / "two_nan", "distributed=fsdp", rank=1, plant="nan", step=2),
        job(root / "two_ddp_critic", "data.microbatch=3", CRITIC),
        job(root / "two_fsdp_critic", "distributed=fsdp", CRITIC),
    )


@pytest.fixture(scope="module")
def runs(pairs) -> Path:
    """Those, and runs of one and three processes; those `from_2` go on from a checkpoint of two."""
    root = pairs
    launch(
        3,
        root,
        job(root / "three_ddp"),
        job(root / "three_fsdp", "distributed=fsdp", "data.microbatch=2"),
        job(rewound(root / "two_fsdp", 5, root / "three_ddp_from_2"), resume=True),
    )
    return launch(
        1,
        root,
        job(root / "one"),
        job(root / "one_critic", CRITIC),
        job(rewound(root / "two_ddp", 2, root / "one_from_2"), "data.microbatch=3", resume=True),
    )


NAMES = ["two_ddp", "two_fsdp", "three_ddp", "three_fsdp", "three_ddp_from_2", "one_from_2"]


def metrics(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def column(run_dir: Path, name: str) -> list:
    return [row[name] for row in metrics(run_dir)]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "unet" / "diffusion_pytorch_model.safetensors")


def apart(run_dir: Path, other: Path) -> float:
    """The distance between the raw weights of two runs, as a share of how far the other's last stage has moved them.

    Averaged weights would say little: with a constant decay a few steps hardly move them.
    """

    def weights(folder: Path) -> torch.Tensor:
        (file,) = [file for file in folder.glob("*.safetensors") if file.name not in (METRIC, "critic.safetensors")]
        return torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(file).items())])

    expected, start = weights(other / "stages" / "sp" / "raw"), weights(other / "stages" / "mse")
    return float((weights(run_dir / "stages" / "sp" / "raw") - expected).norm() / (expected - start).norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_processes_are_as_one(runs, name):
    """Loss and gradient norm of every step, and the weights, within rounding."""
    ours, one = runs / name, runs / "one"
    assert column(ours, "global_step") == list(range(1, STEPS + 1))
    for figure in ("loss", "grad_norm", "learning_rate"):
        torch.testing.assert_close(column(ours, figure), column(one, figure), rtol=1e-4, atol=0)
    expected = final_weights(one)
    torch.testing.assert_close(final_weights(ours), expected, rtol=1e-4, atol=2e-5)
    assert apart(ours, one) < 2e-3


@pytest.mark.slow
def test_every_optimizer_of_two_processes_is_as_one_s(tmp_path):
    kinds = {
        "adamw8bit": [],
        "prodigy": ["optimizer.prodigy={d0: 1e-2, d_coef: 0.5}"],
        "muon": [],
        "adafactor": ["optimizer.adafactor.scale_parameter=true"],
        "adamw8bit,bf16": ["precision=bf16"],
    }
    for processes in (1, 2):
        settings = {kind: [f"optimizer.kind={kind.partition(',')[0]}", *more] for kind, more in kinds.items()}
        launch(processes, tmp_path, *(job(tmp_path / f"{kind}{processes}", *settings[kind]) for kind in kinds))
    for kind in kinds:
        one, two = tmp_path / f"{kind}1", tmp_path / f"{kind}2"
        in_bf16 = kind.endswith("bf16")  # whose rounding is as large with AdamW: its runs are 0.06 apart
        for figure in ("loss", "grad_norm"):
            torch.testing.assert_close(column(two, figure), column(one, figure), rtol=1e-2 if in_bf16 else 2e-3, atol=0)
        torch.testing.assert_close(final_weights(two), final_weights(one), rtol=1e-4, atol=2e-4 if in_bf16 else 2e-5)
        assert apart(two, one) < (0.15 if in_bf16 else 0.05), kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_ddp_critic", "two_fsdp_critic"])
def test_a_critic_of_many_processes_is_as_one_s(runs, name):
    """Its figures, its heads, and the network that it has changed."""
    ours, one = runs / name, runs / "one_critic"
    for figure in ("loss", "grad_norm"):
        torch.testing.assert_close(column(ours, figure), column(one, figure), rtol=1e-4, atol=0)
    for figure in FIGURES:
        rows = [[row[figure] for row in metrics(each)[3:]] for each in (ours, one)]
        torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(final_weights(ours), final_weights(one), rtol=1e-4, atol=2e-5)
    heads, expected = (load_file(each / "stages" / "sp" / "critic.safetensors") for each in (ours, one))
    torch.testing.assert_close(heads, expected, rtol=1e-3, atol=1e-4)
    assert metrics(one)[-1]["loss"] > column(runs / "one", "loss")[-1], "the network feels it"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_sample_and_every_draw_is_the_same(runs, name):
    """Exactly: which sample stands at a position, its timestep, its noise."""
    expected = json.loads((runs / "one.seen.0").read_text())
    assert len(expected) == 12 * STEPS
    shares = [json.loads(file.read_text()) for file in sorted(runs.glob(f"{name}.seen.*"))]
    seen = {position: sample for share in shares for position, sample in share.items()}
    assert sum(map(len, shares)) == len(seen), "no sample in two processes"
    assert seen == {position: sample for position, sample in expected.items() if position in seen}
    behind = {"three_ddp_from_2": 5, "one_from_2": 2}.get(name, 0)
    assert len(seen) == 12 * (STEPS - behind)


@pytest.mark.slow
def test_two_ranks_write_a_checkpoint_once(runs):
    """Each its part, of replicated tensors too: together the size of what one process writes."""

    def sizes(name: str) -> list[int]:
        folder = runs / name / "checkpoints" / "step_00000003"
        assert damage(folder) is None
        return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]

    (alone,) = sizes("one")
    for name in ("two_ddp", "two_fsdp"):
        parts = sizes(name)
        assert len(parts) == 2 and sum(parts) == pytest.approx(alone, rel=0.02) and max(parts) < 0.6 * alone


@pytest.mark.slow
def test_all_ranks_skip_an_update_together(pairs):
    """A sample that is no number on one rank: the loss of all shows it, nobody updates, and all go on."""
    rows = metrics(pairs / "two_nan")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 1, 1], "counted by stage"
    assert [math.isfinite(row["loss"]) for row in rows] == [True, False, True, True, False, True]
    assert all(tensor.isfinite().all() for tensor in final_weights(pairs / "two_nan").values())


def command(run_dir: Path, *more: str) -> list[str]:
    config = ROOT / "configs" / "quickstart.yaml"
    overrides = [f"run_dir={run_dir}", *OVERRIDES, "data.microbatch=3", *more]
    return [*torchrun(2), "-m", "fastsp", "train", "--config", str(config), *overrides]


def signal_one_rank(run_dir: Path, rank: int, number: int, steps: int, *more: str) -> tuple[int, str]:
    """Start two ranks; once so many steps are logged, signal one. Returns torchrun's code, and what was said."""
    said = run_dir.with_suffix(".out")
    with said.open("w") as stream:
        process = subprocess.Popen(command(run_dir, *more), stdout=stream, stderr=stream, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while len(metrics(run_dir)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)]
    os.kill(workers[0].pid, number)
    return process.wait(timeout=120), said.read_text()


@pytest.mark.slow
def test_a_stop_and_a_kill_change_nothing(pairs, tmp_path):
    """SIGTERM at one rank stops all at the same step, saved; kill -9 at the other ends all; bit for bit as straight."""
    run_dir = tmp_path / "run"
    code, said = signal_one_rank(run_dir, 1, signal.SIGTERM, 2)
    assert code == 1 and re.search(r"exitcode +: 143 ", said[said.index("Root Cause") :]), said
    checkpoint, _ = newest_whole(run_dir / "checkpoints")
    assert checkpoint.progress.global_step == len(metrics(run_dir)) < STEPS
    code, said = signal_one_rank(run_dir, 0, signal.SIGKILL, STEPS - 2, "--resume")
    assert code == 1 and f"resuming {checkpoint.folder.name}" in said and "rank 0 was killed" in said
    result = subprocess.run(command(run_dir, "--resume"), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for figure in ("global_step", "loss", "grad_norm"):
        assert column(run_dir, figure) == column(pairs / "two_ddp", figure)
    ours, theirs = final_weights(run_dir), final_weights(pairs / "two_ddp")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_one_rank_s_failure_ends_all_with_its_error(tmp_path):
    result = run_jobs(2, tmp_path, job(tmp_path / "run", rank=1, plant="raise", step=3))
    assert result.returncode == 1
    root_cause = result.stderr[result.stderr.index("Root Cause") :]
    assert "rank      : 1" in root_cause and "ArithmeticError: planted" in root_cause
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_hung_rank_is_named(tmp_path):
    result = run_jobs(2, tmp_path, job(tmp_path / "run", "distributed_timeout=20", rank=1, plant="hang", step=3))
    assert result.returncode == 1
    assert "rank 1 hangs: rank 0 waited distributed_timeout for it" in result.stderr


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path):
    result = run_jobs(2, tmp_path, job(tmp_path / "run", rank=1, plant="full disk", step=3))
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    folders = newest_first(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in folders] == ["step_00000002"] and damage(folders[0]) is None


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once(tmp_path):
    result = subprocess.run(
        command(tmp_path / "run", "data.batch_size=15"), capture_output=True, text=True, check=False
    )
    said = [line for line in result.stderr.splitlines() if line.startswith("fastsp:")]
    assert said == [
        "fastsp: data.batch_size: 15 must be a multiple of 6 (2 processes x data.microbatch 3); "
        "it is of one optimizer step, over all processes"
    ]
    root_cause = result.stderr[result.stderr.index("Root Cause") :]
    assert result.returncode == 1 and re.search(r"exitcode +: 2 ", root_cause)
    assert not (tmp_path / "run").exists()


def test_the_share_of_a_process():
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["data.batch_size=12", "data.microbatch=2"])
    for world_size in (1, 2, 3, 6):
        config.check_world_size(world_size)
    for world_size in (4, 5, 12):
        with pytest.raises(
            UserError, match=rf"multiple of {2 * world_size} \({world_size} processes x data.microbatch 2"
        ):
            config.check_world_size(world_size)

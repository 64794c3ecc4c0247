"""`fastsp encode` as processes: killed half-way and gone on with, and shared by two under torchrun; then trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.config import load_config
from fastsp.training.trainer import train

SAMPLES, SHARDS = 2100, 3
CONFIG = """
run_dir: {folder}/run
model: {{pretrained: {folder}/model}}
data: {{source: images, path: {folder}/pictures, resolution: 16, batch_size: 8, threads: 1, workers: 2}}
stages: [{{name: mse, objective: mse, steps: 3, learning_rate: 1e-3}}]
log: {{every: 1}}
samples: {{every: 0, count: 1, steps: 1}}
evaluation: {{enabled: false}}
"""


@pytest.fixture
def folder(tmp_path):
    tiny_stable_diffusion(tmp_path / "model", "sdxl")
    picture_folder(tmp_path / "pictures", SAMPLES)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def encode(folder: Path, out: str, *launcher: str) -> subprocess.Popen:
    options = ["--config", folder / "config.yaml", "--out", folder / out, "--text-features", "--dtype", "float32"]
    command = [sys.executable, *launcher, "-m", "fastsp", "encode", *options]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_gone_on_with_and_shared(folder):
    first, second = folder / "killed" / "00000.tar", folder / "killed" / ".00001.tar.*.tmp"
    process = encode(folder, "killed")
    while not (first.exists() and list(second.parent.glob(second.name))):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(second.parent.glob(second.name)) and not (folder / "killed" / f"{SHARDS - 1:05d}.tar").exists()
    written = first.stat().st_mtime_ns

    printed = finish(encode(folder, "killed"))
    assert f"shard {SHARDS - 1}: 2 of 2 done" in printed and first.stat().st_mtime_ns == written, "what was done stays"
    assert not list((folder / "killed").glob(".*")), "nothing is left of the kill"

    printed = finish(encode(folder, "shared", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"))
    assert "shard 0: 1 of 1 done" in printed and "shard 1: 1 of 2 done" in printed, "each had its share"
    for name in ("latents.json", *(f"{shard:05d}.tar" for shard in range(SHARDS))):
        assert (folder / "shared" / name).read_bytes() == (folder / "killed" / name).read_bytes(), name

    train(load_config(folder / "config.yaml"))
    latents = [f"run_dir={folder / 'again'}", "data.source=latents", f"data.path={folder / 'killed'}"]
    train(load_config(folder / "config.yaml", latents))
    assert losses(folder / "again") == pytest.approx(losses(folder / "run"), rel=1e-4)

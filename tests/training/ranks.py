"""Training runs one after the other in the processes of one `torchrun`, which all import but once. Not a test.

    torchrun --nproc-per-node 2 tests/training/ranks.py JOBS.json

A job has a configuration (`overrides` of the quickstart's), `resume`, a file for what its samples were (`seen`), and
perhaps a fault: `plant` at the `step`-th step of rank `rank`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastsp.config import load_config
from fastsp.training import step as step_module
from fastsp.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
RANK = int(os.environ.get("RANK", "0"))
diffuse, call = step_module.diffuse, step_module.TrainingStep.__call__


def run(job: dict[str, Any]) -> None:
    """One job. Of every sample that is trained on it writes position, coefficients, and digests of x_0 and of x_t."""
    seen: dict[str, list] = {}

    def recorded(latents: Any, marginal: Any, *, positions: Any, **kwargs: Any) -> Any:
        noisy, target = diffuse(latents, marginal, positions=positions, **kwargs)
        for row, position in enumerate(positions.tolist()):
            seen[str(position)] = [marginal[:, row].tolist(), digest(latents[row]), digest(noisy[row])]
        return noisy, target

    step_module.diffuse = recorded
    at_fault = job.get("rank") == RANK
    step_module.TrainingStep.__call__ = planted(job["plant"], job["step"]) if at_fault else call
    config = load_config(ROOT / "configs" / "quickstart.yaml", job["overrides"])
    train(config, resume=job.get("resume", False))
    Path(f"{job['seen']}.{RANK}").write_text(json.dumps(seen))


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def planted(kind: str, at: int) -> Any:
    """A step that goes wrong at a number."""

    def faulty(step: Any, batch: Any, number: int) -> Any:
        if number == at and kind == "raise":
            raise ArithmeticError("planted")
        if number == at and kind == "hang":
            time.sleep(600)
        if number == at and kind == "nan":
            batch.pixel_values[0] = float("nan")
        if number == at and kind == "full disk":
            from torch.distributed.checkpoint import HuggingFaceStorageWriter

            while not (Path(step.config.run_dir) / "checkpoints" / "step_00000002").exists():
                time.sleep(0.05)  # until the save before is done
            HuggingFaceStorageWriter.write_data = no_room  # type: ignore[method-assign]
        return call(step, batch, number)

    return faulty


def no_room(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each)

"""The golden record: losses and gradient norms of small runs, which no refactoring may change.

    make golden        # trains again and rewrites this machine's record; the commit says why

There is a record for each kind of machine that was at hand. All are of the same commit: where a change of the numbers
is meant, the records of other machines go.

Each run goes the way of a user: a configuration, `train`, `metrics.jsonl`. The models are small ones of the real
classes, in float32 on one thread of a CPU. The moving average is the weights themselves (decay 0) and the learning rate
is constant, so the record is about the data, the draws, the losses, the gradients and the update.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.config import load_config
from fastsp.training.trainer import train

STEPS = 20

Step = tuple[str, int, float, float]  # stage, step, loss, gradient norm

_STAGES = f"""
seed: 7
precision: fp32
stages:
  - {{name: mse, objective: mse, steps: {STEPS}, learning_rate: 1.0e-3}}
  - {{name: sp, objective: self_perceptual, steps: {STEPS}, learning_rate: 1.0e-4}}
  - {{name: sp_variant, objective: self_perceptual, init: mse, perceptual_network: sp, steps: {STEPS},
     learning_rate: 1.0e-4, layers: encoder+mid, timestep_sampling: normal}}
optimizer: {{warmup_steps: 4}}
ema: {{decay: 0.0}}
checkpoint: {{every: 1000}}
log: {{every: 1}}
samples: {{every: 0, count: 1, steps: 1}}
evaluation: {{enabled: false}}
"""


def _pixels(folder: Path) -> str:
    return "model: {preset: digits}\ndata: {source: digits, resolution: 8, batch_size: 6}\n"


def _latents(kind: str, lora: str = "") -> Callable[[Path], str]:
    def configuration(folder: Path) -> str:
        model = tiny_stable_diffusion(folder / "model", kind)
        data = f"source: images, path: {picture_folder(folder / 'pictures')}, resolution: 16, flip: true, crop: random"
        return f"model: {{pretrained: {model}{lora}}}\ndata: {{{data}, batch_size: 6, microbatch: 3}}\n"

    return configuration


RUNS: dict[str, Callable[[Path], str]] = {
    "sd1": _latents("sd15"),
    "sd2": _latents("sd21"),
    "sdxl": _latents("sdxl"),
    "lora": _latents("sd21", ", lora: {rank: 4, alpha: 8}, prediction: v_zero_snr"),
    "pixels": _pixels,
}


def machine() -> str:
    """What the last bits depend on: PyTorch, the instructions it uses, and the processor's model."""
    fields = {"vendor_id": "", "cpu family": "", "model": ""}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    version = torch.__version__.split("+")[0]
    return f"torch {version}, {torch.backends.cpu.get_cpu_capability()}, {' '.join(fields.values())}"


def trained(name: str, folder: Path) -> list[Step]:
    """Every step of one of ``RUNS``, made in ``folder``."""
    file = folder / "config.yaml"
    file.write_text(f"run_dir: {folder / 'run'}\n{RUNS[name](folder)}{_STAGES}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(load_config(file), console=Console(file=io.StringIO()))
    finally:
        torch.set_num_threads(threads)
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows]


def records() -> dict[str, dict[str, list[Step]]]:
    """The committed records: the steps by run, by machine."""
    return dict(map(read, sorted(Path(__file__).parent.glob("record_*.txt"))))


def read(file: Path) -> tuple[str, dict[str, list[Step]]]:
    """The machine of a record, and its steps by run."""
    header, *lines = file.read_text().splitlines()
    record: dict[str, list[Step]] = {name: [] for name in RUNS}
    for line in lines:
        run, stage, step, loss, grad_norm = line.split()
        record[run].append((stage, int(step), float(loss), float(grad_norm)))
    return header.removeprefix("# "), record


def record(file: Path) -> None:
    """Train all of ``RUNS`` and write a record: a line for each step, floats to the last bit."""
    lines = [f"# {machine()}"]
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            steps = trained(name, Path(folder))
        lines += [f"{name} {stage} {step} {loss!r} {norm!r}" for stage, step, loss, norm in steps]
        print(f"{name}: {len(steps)} steps")
    file.write_text("\n".join(lines) + "\n")


def renew() -> None:
    """Put the record of this machine in the place of all others."""
    words = machine().rpartition(", ")[2].removeprefix("Genuine").removeprefix("Authentic").lower().split()
    file = Path(__file__).with_name(f"record_{'_'.join(words)}.txt")
    record(file)
    for other in file.parent.glob("record_*.txt"):
        if other != file:
            other.unlink()


if __name__ == "__main__":
    record(Path(sys.argv[1])) if sys.argv[1:] else renew()

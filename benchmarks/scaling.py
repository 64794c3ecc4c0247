"""What the paper's recipe would take on 1, 8 and 64 GPUs: arithmetic from single-GPU figures and stated assumptions.

    python benchmarks/scaling.py --json step.json                    # of `fastsp bench --json step.json` on one GPU
    python benchmarks/scaling.py --mse 149.5 --batch 32 --source "..."        # or from a figure that is known

Prints the tables of docs/scaling.md. Nothing here is measured: docs/scaling.md names every assumption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GB = 1e9

# Stable Diffusion 2.1 and the paper's recipe
PARAMETERS = 865.9e6
TEACHER_PARAMETERS = 351.7e6  # cut after the mid block
BATCH_SIZE = 896
STEPS = {"mse": 60_000, "sp": 50_000}
SP_OVER_MSE = 1.35  # GFLOP of fastsp's self-perceptual step over those of the MSE step, docs/performance.md

# Memory, bytes
STATE_BYTES = 4 + 4 + 4 + 4  # master weight, two moments, moving average, float32: sharded by FSDP2
WEIGHT_BYTES = 2  # bf16; of FSDP2 what is gathered, at most
GRADIENT_BYTES = 2  # bf16, of one microbatch
SUM_BYTES = 4  # float32: over microbatches, over ranks
ACTIVATION_BYTES = 1.23e9  # of one sample in the compiled step, docs/performance.md
LARGEST_MICROBATCH = 28  # samples of one forward and backward

# Communication
REDUCED_BYTES = 4  # of a gradient, float32
GATHERED_BYTES = 2  # of a weight that FSDP2 gathers, bf16
UPDATE_SECONDS = 31e9 / 4.3e12  # AdamW and average: bytes moved over an H200's memory bandwidth


@dataclass(frozen=True)
class Network:
    """What an all-reduce gets: bytes per second and GPU of the bus, and how much of it hides behind the backward."""

    within_node: float = 300 * GB
    across_nodes: float = 40 * GB
    gpus_per_node: int = 8
    overlap: float = 0.5

    def seconds(self, gpus: int, moved: float) -> float:
        """What a ring collective over ``gpus`` adds to a step; each GPU sends ``moved`` bytes times (n - 1) / n."""
        if gpus == 1:
            return 0.0
        bandwidth = self.within_node if gpus <= self.gpus_per_node else self.across_nodes
        return (1 - self.overlap) * moved * (gpus - 1) / gpus / bandwidth


@dataclass(frozen=True)
class Rate:
    """Samples per second of one GPU at a batch size, update included."""

    samples_per_s: float
    batch_size: int

    @property
    def seconds_per_sample(self) -> float:
        """Without the update, which does not grow with the batch."""
        return 1 / self.samples_per_s - UPDATE_SECONDS / self.batch_size


@dataclass(frozen=True)
class Plan:
    """One way to run the recipe."""

    gpus: int
    sharded: bool  # FSDP2, else DDP

    @property
    def name(self) -> str:
        return "one GPU" if self.gpus == 1 else "FSDP2" if self.sharded else "DDP"

    def step_seconds(self, rate: Rate, network: Network) -> float:
        """Of one optimizer step."""
        samples = BATCH_SIZE / self.gpus
        update = UPDATE_SECONDS / (self.gpus if self.sharded else 1)
        reduced = (
            REDUCED_BYTES * PARAMETERS
        )  # once in a reduce-scatter, as often again in the all-gather of an all-reduce
        moved = 2 * reduced
        if self.sharded:
            gathered = GATHERED_BYTES * PARAMETERS  # for the forward and again for the backward
            moved = (reduced + 2 * gathered) * self.microbatches
        return samples * rate.seconds_per_sample + update + network.seconds(self.gpus, moved)

    @property
    def microbatch(self) -> int:
        """The largest divisor of the rank's share that fits."""
        share = BATCH_SIZE // self.gpus
        return max(size for size in range(1, LARGEST_MICROBATCH + 1) if share % size == 0)

    @property
    def microbatches(self) -> int:
        return BATCH_SIZE // self.gpus // self.microbatch

    @property
    def gradient_bytes(self) -> float:
        """Of one parameter."""
        if self.sharded:
            return SUM_BYTES / self.gpus
        over_microbatches, over_ranks = self.microbatches > 1, self.gpus > 1
        return GRADIENT_BYTES + SUM_BYTES * (over_microbatches + over_ranks)

    def memory(self) -> dict[str, float]:
        """Bytes on one rank, of the self-perceptual stage."""
        return {
            "state": STATE_BYTES * PARAMETERS / (self.gpus if self.sharded else 1),
            "weights": WEIGHT_BYTES * PARAMETERS,
            "gradients": self.gradient_bytes * PARAMETERS,
            "teacher": WEIGHT_BYTES * TEACHER_PARAMETERS,
            "activations": ACTIVATION_BYTES * self.microbatch,
        }


PLANS = (Plan(1, False), Plan(8, False), Plan(8, True), Plan(64, False), Plan(64, True))


def days(plan: Plan, mse: Rate, sp: Rate, network: Network) -> float:
    """Of the paper's recipe: 60k MSE steps, then 50k self-perceptual ones, batch 896."""
    return sum(STEPS[name] * plan.step_seconds(rate, network) for name, rate in (("mse", mse), ("sp", sp))) / 86400


def time_table(mse: Rate, sp: Rate, network: Network) -> Iterator[str]:
    """Markdown."""
    yield "| GPUs | engine | microbatch | MSE step | SP step | samples/s (SP) | days |"
    yield "|---|---|---|---|---|---|---|"
    for plan in PLANS:
        seconds = [plan.step_seconds(rate, network) for rate in (mse, sp)]
        steps = " | ".join(f"{1e3 * second:,.0f} ms" for second in seconds)
        yield (
            f"| {plan.gpus} | {plan.name} | {plan.microbatches} x {plan.microbatch} | {steps} | "
            f"{BATCH_SIZE / seconds[1]:,.0f} | {days(plan, mse, sp, network):.2f} |"
        )


def memory_table() -> Iterator[str]:
    """Markdown, GB of one rank."""
    yield f"| GPUs | engine | {' | '.join(PLANS[0].memory())} | sum |"
    yield f"|---|---|{'---|' * (len(PLANS[0].memory()) + 1)}"
    for plan in PLANS:
        parts = plan.memory()
        cells = " | ".join(f"{part / GB:.1f}" for part in (*parts.values(), sum(parts.values())))
        yield f"| {plan.gpus} | {plan.name} | {cells} |"


def rates_of(file: Path) -> tuple[Rate, Rate]:
    """MSE and self-perceptual, of a JSON of `fastsp bench`."""
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    mse, sp = (rows[name] for name in ("fastsp_mse", "fastsp_sp"))
    return Rate(mse["samples_per_s"], mse["batch_size"]), Rate(sp["samples_per_s"], sp["batch_size"])


def report(mse: Rate, sp: Rate, network: Network, source: str) -> str:
    """Both tables, with where the figures come from above them."""
    head = (
        f"From {source}: {mse.samples_per_s:.1f} samples/s per GPU for the MSE step, {sp.samples_per_s:.1f} for the "
        f"self-perceptual one, at batch {mse.batch_size}."
    )
    return "\n".join([head, "", *time_table(mse, sp, network), "", *memory_table(), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The paper's recipe on 1, 8 and 64 GPUs.")
    parser.add_argument("--json", type=Path, help="of `fastsp bench`")
    parser.add_argument("--mse", type=float, default=149.5, help="samples/s of one GPU, MSE step")
    parser.add_argument("--sp", type=float, help="samples/s, self-perceptual step; default: by its operations")
    parser.add_argument("--batch", type=int, default=32, help="at which they were measured")
    parser.add_argument("--source", default="MLPerf Training's Stable Diffusion v2 on H200s (**not ours**)")
    parser.add_argument("--within-node", type=float, default=300.0, help="GB/s per GPU")
    parser.add_argument("--across-nodes", type=float, default=40.0, help="GB/s per GPU")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of the communication that is hidden, 0 to 1")
    given = parser.parse_args(arguments)
    network = Network(given.within_node * GB, given.across_nodes * GB, overlap=given.overlap)
    if given.json:
        mse, sp = rates_of(given.json)
    else:
        mse, sp = Rate(given.mse, given.batch), Rate(given.sp or given.mse / SP_OVER_MSE, given.batch)
    print(report(mse, sp, network, str(given.json) if given.json else given.source), end="")


if __name__ == "__main__":
    main()

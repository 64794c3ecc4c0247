"""`fastsp bench` from its options to its rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from fastsp.bench.cost import Cost, count_phases, count_step
from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.measure import Entry, Say, compiler_settings, empty_caches, prepare, ratios, take_turns, warm_up
from fastsp.bench.operators import operator_rows
from fastsp.bench.phases import time_phases
from fastsp.bench.providers import PROVIDERS, REFERENCE
from fastsp.bench.timing import Ceilings, measure_ceilings, quantiles
from fastsp.bench.workload import STATE_BYTES_PER_PARAMETER, Workload
from fastsp.devices import device_name
from fastsp.evaluation.environment import environment
from fastsp.gpu_settings import gpu_settings

SWEEP = (2, 4, 8), (0.5, 0.25)  # times the batch size: up, then down, each until one does not fit
SWEEP_TURNS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and for how long."""

    names: tuple[str, ...]
    rounds: int
    sweep: bool = False
    phases: bool = True
    time_limit_s: float | None = None  # nothing new begins after it


def run(workload: Workload, plan: Plan, say: Say, keep: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """Measure the providers of ``plan`` on ``workload``.

    Args:
        workload: what they train.
        plan: which, and how often.
        say: takes a line of progress.
        keep: is handed the rows so far whenever there are more, so that a run that is stopped leaves them.

    Returns:
        One row a provider, in the order of ``plan.names``; those that did not fit, or for which there was no time, are
        named by ``say`` and have none.
    """
    bench = Bench(workload, plan, say, keep)
    with compiler_settings(), gpu_settings(tf32=False):
        for group in groups(plan.names, workload):
            bench.measure(group)
        bench.release_all()
        bench.measure_sweep()
        bench.measure_ceilings_again()
    return bench.rows


class Bench:
    """The state of one run. Made and used by :func:`run`."""

    def __init__(self, workload: Workload, plan: Plan, say: Say, keep: Callable[[list[Row]], None]) -> None:
        self.workload, self.plan, self.say, self.keep = workload, plan, say, keep
        self.started = time.monotonic()
        self.entries: dict[str, Entry] = {}
        self.speeds: dict[str, list[float]] = {}  # relative to the reference, round by round
        self.extras: dict[str, Any] = {}  # what the reference's row has besides
        self.looked_inside = False
        self.rows: list[Row] = []
        batch, precision = workload.batch_size, workload.config.precision
        say(f"{workload.name}, batch {batch}, {precision} on {device_name(workload.device)}")
        if unlike := workload.unlike_the_paper():
            settings = ", ".join(f"{key} {value}" for key, value in unlike.items())
            say(f"fastsp's self-perceptual steps have {settings}; Algorithm 1 stays as printed")
        say("measuring a large matrix product and a large copy")
        self.ceilings = measure_ceilings(workload.device, workload.dtype)
        self.costs: dict[str, Cost] = {}
        attention = workload.choose_attention()
        say(str(attention))
        self.workload = workload.with_settings(attention=attention.name)
        self.facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "attention": attention.name,
            "attention_ms": attention.milliseconds,
        }

    def measure(self, group: Sequence[str]) -> None:
        """Prepare what is not ready, let the group take turns, release all but the reference."""
        for name in group:
            if name not in self.entries and self.has_time(name):
                self.prepare(name)
        ready = {name: self.entries[name] for name in group if name in self.entries and self.entries[name].steps}
        reference = ready.get(REFERENCE)
        start = len(reference.seconds) if reference else 0
        if not ready or (not ready.keys() - {REFERENCE} and start):
            return  # the group's own provider is missing
        self.say(f"{self.plan.rounds} rounds of {', '.join(ready)}")
        take_turns(ready, self.workload.device, self.plan.rounds, late=self.is_late)
        for name, entry in ready.items():
            if reference:
                self.speeds[name] = ratios(entry, reference, start) if entry is not reference else [1.0]
            if entry is not reference:
                entry.release()
        self.update_rows()
        for row in self.rows:
            if row["name"] in ready:
                self.say(f"{row['name']}: {row['samples_per_s']:.4g} samples/s")
        self.look_inside()

    def prepare(self, name: str) -> None:
        self.say(f"{name}: counting operations, then compiling or warming up")
        try:
            self.costs[name] = count_step(PROVIDERS[name], self.workload)
            self.entries[name] = prepare(name, PROVIDERS[name], self.workload, self.say)
        except torch.OutOfMemoryError:
            self.say(f"{name}: skipped, batch {self.workload.batch_size} does not fit; give a smaller --batch-size")
        empty_caches()

    def look_inside(self) -> None:
        """Phases and operators of the reference, once, when its first turns are done."""
        entry = self.entries.get(REFERENCE)
        if entry is None or not isinstance(entry.steps, FastspStep) or self.looked_inside or not self.plan.phases:
            return
        if not self.has_time("phases and operators"):
            return
        self.say(f"phases and operators of {REFERENCE}, without a CUDA graph")
        self.looked_inside = True
        try:
            with entry.steps.uncaptured():
                empty_caches()
                self.extras["phases"] = phase_rows(self.workload, entry.steps, self.plan.rounds)
                self.extras["operators"] = operator_rows(entry.steps)
        except torch.OutOfMemoryError:
            self.say("phases and operators: they do not fit")
        empty_caches()
        entry.steps.step()
        warm_up(entry.steps, self.workload.device)
        self.update_rows()

    def measure_sweep(self) -> None:
        """The reference at other batch sizes, each compiled anew."""
        if REFERENCE not in self.entries or not self.plan.sweep:
            return
        rows = self.extras["batch_sweep"] = []
        for factors in SWEEP:
            for row in self.sweep(factors):
                rows.append(row)
                self.update_rows()

    def measure_ceilings_again(self) -> None:
        """After minutes of work the machine may be quieter than before it."""
        workload = self.workload
        self.ceilings = self.ceilings.best(measure_ceilings(workload.device, workload.dtype))
        self.update_rows()

    def sweep(self, factors: Sequence[float]) -> Iterator[Row]:
        """Samples/s at so many times the batch size, until one does not fit."""
        batch_size = self.workload.batch_size
        sizes = dict.fromkeys(max(1, round(factor * batch_size)) for factor in factors)
        for size in sizes:
            if size == batch_size:
                continue
            if not self.has_time(f"batch {size}"):
                return
            workload = self.workload.with_settings(batch_size=size)
            try:
                entry = prepare(f"{REFERENCE} at batch {size}", PROVIDERS[REFERENCE], workload, self.say)
                take_turns({REFERENCE: entry}, workload.device, SWEEP_TURNS)
            except torch.OutOfMemoryError:
                self.say(f"batch {size} does not fit")
                return
            finally:
                empty_caches()
            seconds = statistics.median(entry.seconds)
            peak = entry.peak_bytes
            entry.release()
            yield {"batch_size": size, "samples_per_s": size / seconds, "peak_memory_gb": _gigabytes(peak)}

    def update_rows(self) -> None:
        self.rows = [self.row(self.entries[name]) for name in self.plan.names if name in self.entries]
        self.rows = [row for row in self.rows if row["samples_per_s"]]
        self.keep(self.rows)

    def row(self, entry: Entry) -> Row:
        """The contract's keys first."""
        if not entry.seconds:
            return {"samples_per_s": None}
        p20, p50, p80 = quantiles(entry.seconds)
        cost, workload = self.costs[entry.name], self.workload
        row = {
            "name": entry.name,
            "samples_per_s": workload.batch_size / p50,
            "ms_p20": 1e3 * p20,
            "ms_p50": 1e3 * p50,
            "ms_p80": 1e3 * p80,
            "peak_memory_gb": _gigabytes(entry.peak_bytes),
            "gflop_per_sample": cost.flops / 1e9,
            **utilisation(cost.flops * workload.batch_size / p50, self.ceilings),
            "speed_relative_to_fastsp_sp": _median(self.speeds.get(entry.name)),
            "first_step_s": entry.first_step_s,
            "gbyte_per_sample": cost.bytes / 1e9,
            "batch_size": workload.batch_size,
            "precision": workload.config.precision,
            "compiled": PROVIDERS[entry.name].is_compiled(workload),
            "rounds": len(entry.seconds),
            **entry.how,
            "model": workload.name,
            "threads": torch.get_num_threads(),
            "matmul_tflops_per_s": self.ceilings.matmul_flops_per_s / 1e12,
            "copy_gbyte_per_s": self.ceilings.copy_bytes_per_s / 1e9,
            "datasheet_tflops_per_s": _tera(self.ceilings.datasheet_flops_per_s),
            **self.facts,
        }
        return row | (self.extras if entry.name == REFERENCE else {})

    def is_late(self) -> bool:
        limit = self.plan.time_limit_s
        return limit is not None and time.monotonic() - self.started >= limit

    def has_time(self, what: str) -> bool:
        if not self.is_late():
            return True
        self.say(f"{what}: skipped, the time limit of {self.plan.time_limit_s:.0f} s has passed")
        return False

    def release_all(self) -> None:
        for entry in self.entries.values():
            entry.release()


def groups(names: Sequence[str], workload: Workload) -> list[tuple[str, ...]]:
    """Who takes turns with whom: all of them where their state leaves room, else each with the reference.

    Then what is quick to build comes first, in case the time does not suffice.
    """
    if workload.device.type != "cuda":
        return [tuple(names)]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in workload.on("meta").unet().parameters())
    state = len(names) * STATE_BYTES_PER_PARAMETER * parameters
    if 2 * state <= torch.cuda.get_device_properties(workload.device).total_memory:
        return [tuple(names)]
    others = sorted(set(names) - {REFERENCE}, key=lambda name: (PROVIDERS[name].compiled, names.index(name)))
    if REFERENCE not in names:
        return [(name,) for name in others]
    return [(REFERENCE, name) for name in others] or [(REFERENCE,)]


def phase_rows(workload: Workload, provider: FastspStep, rounds: int) -> list[Row]:
    """Time, FLOPs and bytes of the phases of fastsp's self-perceptual step."""
    costs = count_phases(workload)
    return [
        {
            "name": name,
            "ms_p50": ms,
            "gflop_per_sample": costs[name].flops / 1e9,
            "gbyte_per_sample": costs[name].bytes / 1e9,
        }
        for name, ms in time_phases(provider, rounds).items()
    ]


def utilisation(flops_per_s: float, ceilings: Ceilings) -> dict[str, float | None]:
    """The rate of the counted operations, and its share of the two ceilings."""
    peak = ceilings.datasheet_flops_per_s
    return {
        "tflops_per_s": flops_per_s / 1e12,
        "mfu": None if peak is None else flops_per_s / peak,
        "mfu_of_measured_matmul": flops_per_s / ceilings.matmul_flops_per_s,
    }


def _median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9


def _tera(value: float | None) -> float | None:
    return None if value is None else value / 1e12

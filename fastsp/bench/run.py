"""`fastsp bench` from its options to its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from fastsp.bench.measure import Entry, empty_caches, measure_peak, prepare, quantiles, relative_speed, take_turns
from fastsp.bench.providers import PROVIDERS, REFERENCE
from fastsp.bench.workload import Workload
from fastsp.evaluation.environment import environment
from fastsp.training.compilation import compiler_settings
from fastsp.utils.devices import device_name
from fastsp.utils.gpu_settings import gpu_settings

Row = dict[str, Any]
Say = Callable[[str], None]


def run(
    workload: Workload,
    names: Sequence[str],
    rounds: int,
    say: Say,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure providers, each taking turns with fastsp's self-perceptual step.

    So at most two are in memory, and a change of the machine's load meets both sides of a ratio.

    Args:
        workload: what they train.
        names: of the providers, in the order of the rows.
        rounds: turns that each provider takes.
        say: takes a line of progress.
        keep: takes the rows so far after each provider, so that an interrupted run leaves them.

    Returns:
        One row for each provider. ``say`` names those that do not fit.
    """
    with compiler_settings(), gpu_settings(tf32=False):
        bench = Bench(workload, rounds, say)
        reference = bench.prepare(REFERENCE) if REFERENCE in names else None
        for name in names:
            if name != REFERENCE and (entry := bench.prepare(name)):
                bench.measure(entry, reference)
                entry.release()
                keep(bench.rows(names))
        if reference and not reference.seconds:
            bench.measure(reference)
            keep(bench.rows(names))
    return bench.rows(names)


class Bench:
    """The state of one run. Made and used by :func:`run`."""

    def __init__(self, workload: Workload, rounds: int, say: Say) -> None:
        self.rounds, self.say = rounds, say
        self.entries: dict[str, Entry] = {}
        self.speeds = {REFERENCE: 1.0}  # relative to the reference
        batch, precision = workload.batch_size, workload.config.precision
        say(f"{workload.name}, batch {batch}, {precision}, on {device_name(workload.device)}")
        self.peak = measure_peak(workload.device, workload.dtype)
        attention = workload.choose_attention()
        say(str(attention))
        self.workload = workload.with_settings(attention=attention.name)
        self.facts = {
            "batch_size": batch,
            "precision": precision,
            "model": workload.name,
            "threads": torch.get_num_threads(),
            "matmul_tflops_per_s": self.peak.measured / 1e12,
            "datasheet_tflops_per_s": None if self.peak.datasheet is None else self.peak.datasheet / 1e12,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "attention": attention.name,
            "attention_ms": attention.milliseconds,
        }

    def prepare(self, name: str) -> Entry | None:
        """A provider ready to run; None if it does not fit."""
        self.say(f"{name}: preparing ({PROVIDERS[name].says})")
        try:
            entry = self.entries[name] = prepare(name, PROVIDERS[name], self.workload)
            self.say(f"{name}: first step {entry.first_step_s:.1f} s")
            return entry
        except torch.OutOfMemoryError:
            self.say(f"{name}: skipped, batch {self.workload.batch_size} does not fit; give a smaller data.batch_size")
            return None
        finally:
            empty_caches()

    def measure(self, entry: Entry, reference: Entry | None = None) -> None:
        """Let a provider take its turns, with the reference if there is one."""
        take_turns([reference, entry] if reference else [entry], self.workload.device, self.rounds)
        if reference:
            self.speeds[entry.name] = relative_speed(entry, reference)
        self.say(f"{entry.name}: {self.workload.batch_size / quantiles(entry.seconds)[1]:.4g} samples/s")

    def rows(self, names: Sequence[str]) -> list[Row]:
        """A row for each provider that has been measured."""
        ready = (self.entries[name] for name in names if name in self.entries)
        return [self._row(entry) for entry in ready if entry.seconds]

    def _row(self, entry: Entry) -> Row:
        """Rates and times of one provider, then what all rows have in common."""
        p20, p50, p80 = quantiles(entry.seconds)
        samples_per_s = self.workload.batch_size / p50
        return {
            "name": entry.name,
            "samples_per_s": samples_per_s,
            "ms_p20": 1e3 * p20,
            "ms_p50": 1e3 * p50,
            "ms_p80": 1e3 * p80,
            "peak_memory_gb": None if entry.peak_bytes is None else entry.peak_bytes / 1e9,
            "gflop_per_sample": entry.flops / 1e9,
            **self.peak.utilisation(entry.flops * samples_per_s),
            "speed_relative_to_fastsp_sp": self.speeds.get(entry.name),
            "first_step_s": entry.first_step_s,
            "compiled": PROVIDERS[entry.name].is_compiled(self.workload),
            "rounds": len(entry.seconds),
            **entry.how,
            **self.facts,
        }

"""`fastsp bench` from its options to its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from fastsp.bench.measure import Entry, empty_caches, mfu, prepare, quantiles, relative_speed, take_turns
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
    """Measure providers, each taking so many turns with fastsp's self-perceptual step.

    So at most two are in memory, and a change of the machine's load meets both sides of a ratio. Returns one row for
    each provider that fits, in the order of `names`. `say` takes lines of progress, `keep` the rows
    so far after each provider, so that an interrupted run leaves them.
    """
    batch, precision = workload.batch_size, workload.config.precision
    rows: list[Row] = []
    say(f"{workload.name}, batch {batch}, {precision}, on {device_name(workload.device)}")
    with compiler_settings(), gpu_settings(tf32=False):
        attention = workload.choose_attention()
        say(str(attention))
        workload = workload.with_settings(attention=attention.name)
        facts = {
            "batch_size": batch,
            "precision": precision,
            "model": workload.name,
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "attention": attention.name,
            "attention_ms": attention.milliseconds,
        }
        for entries in _measured(workload, names, rounds, say):
            made = {entry.name: _row(entry, workload) | facts for entry in entries}
            say(f"{entries[-1].name}: {made[entries[-1].name]['samples_per_s']:.4g} samples/s")
            rows = [made[name] for name in names if name in made]
            keep(rows)
    return rows


def _measured(workload: Workload, names: Sequence[str], rounds: int, say: Say) -> Iterator[list[Entry]]:
    """All entries so far, whenever one more has been measured."""
    reference = _prepared(REFERENCE, workload, say) if REFERENCE in names else None
    together = [] if reference is None else [reference]
    entries = [*together]
    for name in names:
        if name != REFERENCE and (entry := _prepared(name, workload, say)):
            take_turns([*together, entry], workload.device, rounds)
            entry.speed = relative_speed(entry, reference) if reference else None
            entry.release()
            entries.append(entry)
            yield entries
    if reference and not reference.seconds:
        take_turns(together, workload.device, rounds)
        yield entries


def _prepared(name: str, workload: Workload, say: Say) -> Entry | None:
    """A provider ready to run; None if it does not fit."""
    say(f"{name}: preparing ({PROVIDERS[name].says})")
    try:
        entry = prepare(name, PROVIDERS[name], workload)
        say(f"{name}: first step {entry.first_step_s:.1f} s")
        return entry
    except torch.OutOfMemoryError:
        say(f"{name}: skipped, batch {workload.batch_size} does not fit; give a smaller data.batch_size")
        return None
    finally:
        empty_caches()


def _row(entry: Entry, workload: Workload) -> Row:
    """Rates and times of one provider."""
    p20, p50, p80 = quantiles(entry.seconds)
    samples_per_s = workload.batch_size / p50
    return {
        "name": entry.name,
        "samples_per_s": samples_per_s,
        "ms_p20": 1e3 * p20,
        "ms_p50": 1e3 * p50,
        "ms_p80": 1e3 * p80,
        "peak_memory_gb": None if entry.peak_bytes is None else entry.peak_bytes / 1e9,
        "gflop_per_sample": entry.flops / 1e9,
        "mfu": mfu(entry.flops * samples_per_s, device_name(workload.device), workload.dtype),
        "speed_relative_to_fastsp_sp": 1.0 if entry.name == REFERENCE else entry.speed,
        "first_step_s": entry.first_step_s,
        "compiled": workload.compiles and PROVIDERS[entry.name].compiled is not False,
        "rounds": len(entry.seconds),
        **entry.how,
    }

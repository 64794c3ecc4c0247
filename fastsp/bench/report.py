"""What `fastsp bench` tells people: a table, the verdict in words, the phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> Table:
    """The providers, one a line: GFLOP of a sample, seconds of the first step.

    MFU is relative to the data sheet where the GPU is known; elsewhere the share of the measured matrix rate is given.
    """
    known = any(row["mfu"] is not None for row in rows)
    with_memory = any(row["peak_memory_gb"] is not None for row in rows)
    result = Table(
        title=f"{rows[0]['model']}, batch {rows[0]['batch_size']}, {rows[0]['precision']}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("provider", no_wrap=True)
    headings = ["samples/s", "ms p20/p50/p80", "GFLOP", "MFU" if known else "of matmul", "first, s"]
    for heading in [*headings, *(["GB"] if with_memory else [])]:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            _short(row["samples_per_s"]),
            "/".join(_short(row[key]) for key in ("ms_p20", "ms_p50", "ms_p80")),
            _short(row["gflop_per_sample"]),
            f"{row['mfu' if known else 'mfu_of_measured_matmul']:.0%}",
            _short(row["first_step_s"]),
        ]
        result.add_row(row["name"], *cells, *([_short(row["peak_memory_gb"])] if with_memory else []))
    return result


def verdict(rows: Sequence[Row]) -> list[str]:
    """Sentences from the figures alone. Ratios are medians of those of each round, in which all took their turn."""
    by_name = {row["name"]: row for row in rows}
    ours = by_name.get("fastsp_sp")
    if ours is None or len(rows) < 2:
        return []
    sentences = []
    if not ours["compiled"] and any(row["compiled"] for row in rows):
        sentences.append("fastsp's steps are not compiled here, and others are: --compile compares like with like.")
    sentences += [
        _against(by_name[name], ours) for name in by_name if name not in ("fastsp_sp", "fastsp_mse", "diffusers_mse")
    ]
    if mse := by_name.get("fastsp_mse"):
        time_ratio = mse["speed_relative_to_fastsp_sp"]
        flop_ratio = ours["gflop_per_sample"] / mse["gflop_per_sample"]
        sentences.append(
            f"A self-perceptual step takes {time_ratio:.2f} times as long as fastsp's MSE step, "
            f"for {flop_ratio:.2f} times its operations."
        )
    if (script := by_name.get("diffusers_mse")) and mse:
        ratio = mse["speed_relative_to_fastsp_sp"] / script["speed_relative_to_fastsp_sp"]
        sentences.append(f"fastsp's MSE step is {_times(ratio)} diffusers' ({script['name']}).")
    return sentences


def phase_lines(rows: Sequence[Row]) -> list[str]:
    """The phases of fastsp's step and their shares of its time."""
    phases = _extra(rows, "phases")
    total = sum(phase["ms_p50"] for phase in phases)
    lines = [f"{phase['name']:20s} {phase['ms_p50']:9.2f} ms {phase['ms_p50'] / total:6.1%}" for phase in phases]
    return ["Where the time of fastsp_sp goes:", *lines] if lines else []


def operator_lines(rows: Sequence[Row]) -> list[str]:
    """The groups of operators that fastsp's step spends its time in."""
    groups = _extra(rows, "operators")
    lines = [f"{row['group']:20s} {row['ms']:9.2f} ms {row['share']:6.1%}  {row['calls']} calls" for row in groups]
    return ["The operators of fastsp_sp, profiled:", *lines] if lines else []


def sweep_lines(rows: Sequence[Row]) -> list[str]:
    """Samples per second of fastsp's step at other batch sizes."""
    sweep = _extra(rows, "batch_sweep")
    lines = [f"batch {point['batch_size']:5d} {point['samples_per_s']:9.1f} samples/s" for point in sweep]
    return ["fastsp_sp at other batch sizes:", *lines] if lines else []


def _extra(rows: Sequence[Row], key: str) -> list[Row]:
    """What only the reference's row has besides; empty where it was not measured."""
    return next((row[key] for row in rows if row.get(key)), [])


def _short(value: float | None) -> str:
    """Three digits, and no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _against(other: Row, ours: Row) -> str:
    ratio = 1.0 / other["speed_relative_to_fastsp_sp"]
    flops = other["gflop_per_sample"] / ours["gflop_per_sample"]
    return (
        f"fastsp's self-perceptual step is {_times(ratio)} {other['name']}, "
        f"which does {flops:.2f} times the operations."
    )


def _times(ratio: float) -> str:
    """The ratio of two speeds in words: within 2 % there is no difference to speak of."""
    if abs(ratio - 1.0) < 0.02:
        return f"as fast ({ratio:.2f} x) as"
    return f"{ratio:.2f} times as fast as" if ratio > 1 else f"slower ({ratio:.2f} x) than"

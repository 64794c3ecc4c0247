"""The roofline (Williams, Waterman & Patterson 2009): the rates of providers and phases under the device's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def save_roofline(rows: Sequence[Row], file: Path) -> None:
    """Draw the rows of one run.

    Across: FLOP per byte, with each operator's inputs and outputs counted once; fusion moves a point to the right.
    Up: the counted operations over the median time of a whole step.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    facts = rows[0]
    providers = {row["name"]: _point(row, facts) for row in rows}
    phases = {part["name"]: _point(part, facts) for row in rows for part in row.get("phases", []) if _computes(part)}
    intensities = [x for x, _ in (*providers.values(), *phases.values())]
    across = (min(*intensities, _ridge(facts)) / 3, 4 * max(intensities))
    _ceilings(axes, facts, across)
    for points, marker, size, kind in ((providers, "o", 8, ""), (phases, "D", 5, "fastsp_sp, phase: ")):
        for name, point in points.items():
            axes.plot(*point, marker, markersize=size, label=kind + name)
    axes.set(xscale="log", yscale="log", xlim=across, xlabel="FLOP per byte (operators unfused)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(unit="FLOP/s"))
    axes.set_title(f"{facts['model']}, batch {facts['batch_size']}, {facts['precision']}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=120)


def _computes(part: Row) -> bool:
    return part["gflop_per_sample"] > 0


def _point(part: Row, facts: Row) -> tuple[float, float]:
    """(FLOP per byte, FLOP/s) of a provider or a phase."""
    rate = 1e12 * part["gflop_per_sample"] * facts["batch_size"] / part["ms_p50"]
    return part["gflop_per_sample"] / part["gbyte_per_sample"], rate


def _ridge(facts: Row) -> float:
    """Where the two measured ceilings meet, FLOP per byte."""
    return 1e3 * facts["matmul_tflops_per_s"] / facts["copy_gbyte_per_s"]


def _ceilings(axes: Any, facts: Row, across: tuple[float, float]) -> None:
    """Memory's slope up to the measured matrix rate, and the data sheet's line above. FLOP/s."""
    matmul, bandwidth = 1e12 * facts["matmul_tflops_per_s"], 1e9 * facts["copy_gbyte_per_s"]
    xs = sorted({across[0], min(_ridge(facts), across[1]), across[1]})
    label = f"measured: matmul {matmul / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s"
    axes.plot(xs, [min(matmul, bandwidth * x) for x in xs], color="black", label=label)
    if facts["datasheet_tflops_per_s"]:
        peak = 1e12 * facts["datasheet_tflops_per_s"]
        axes.axhline(peak, color="grey", linestyle="--", label=f"data sheet: {peak / 1e12:.0f} TFLOP/s")

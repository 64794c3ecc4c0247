"""A stage's loss curve as a small PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 2000
_INK, _RAW, _SMOOTH = "#5d636e", "#c3c9d4", "#2457c5"  # the page's colours


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> bytes | None:
    """The loss on a logarithmic axis: every value in grey, a running mean over a twentieth of the stage in blue.

    Args:
        steps: rising.
        losses: as many. Those that are not finite and positive have no place on the axis and are left out.

    Returns:
        A PNG; None where no loss is finite and positive.
    """
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss) and loss > 0]
    if not points:
        return None
    step, loss = np.array(points).T
    window = max(1, len(loss) // 20)
    sums = np.concatenate([[0.0], loss.cumsum()])
    starts = np.maximum(np.arange(1, len(loss) + 1) - window, 0)
    smooth = (sums[1:] - sums[starts]) / (np.arange(1, len(loss) + 1) - starts)
    shown = slice(None, None, max(1, len(loss) // MAX_POINTS))
    narrow = loss.max() < 8 * loss.min()  # less than a decade: its powers of ten alone would leave the axis bare
    figure = Figure(figsize=(4.8, 2.9), dpi=160, layout="constrained")
    axes = figure.add_subplot(yscale="log", xlim=(0, step[-1]))
    axes.plot(step[shown], loss[shown], color=_RAW, linewidth=0.8)
    axes.plot(step[shown], smooth[shown], color=_SMOOTH, linewidth=1.6, marker="o" if len(loss) == 1 else "")
    axes.grid(which="both" if narrow else "major", axis="y", color="#e4e6ea", linewidth=0.6)
    axes.tick_params(which="both", colors=_INK, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}" if narrow else "")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()

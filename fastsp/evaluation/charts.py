"""A stage's loss curve as one small SVG that takes its colours and typeface from the page around it."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 360, 220  # CSS pixels; shown at this size on a phone and on a desktop alike
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 26
MAX_POINTS = 240


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> Markup:
    """The loss on a logarithmic axis: every value in grey, a running mean over a twentieth of the stage in colour.

    Args:
        steps: rising, at least one.
        losses: as many; those that are not finite and positive have no place on the axis and are left out.

    Returns:
        An `<svg>` element; its text is built from numbers alone.
    """
    points = [(s, x) for s, x in zip(steps, losses, strict=True) if math.isfinite(x) and x > 0]
    if not points:
        return Markup('<p class="missing">no finite loss was logged</p>')
    smooth = _running_mean([x for _, x in points], max(1, len(points) // 20))
    low, high = _padded(min(x for _, x in points), max(x for _, x in points))
    across = _scale(0, max(points[-1][0], 1), LEFT, WIDTH - RIGHT)
    up = _scale(math.log(low), math.log(high), HEIGHT - BOTTOM, TOP)
    raw_path = _path([(across(s), up(math.log(x))) for s, x in points])
    smooth_path = _path([(across(s), up(math.log(x))) for (s, _), x in zip(points, smooth, strict=True)])
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(math.log(y)):.1f}" y2="{up(math.log(y)):.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{up(math.log(y)) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in _log_ticks(low, high)
    )
    labels = "".join(
        f'<text x="{across(s):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{s:,}</text>'
        for s, anchor in ((0, "start"), (points[-1][0] // 2, "middle"), (points[-1][0], "end"))
    )
    return Markup(  # numbers only
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">{grid}{labels}'
        f'<path d="{raw_path}" class="raw"/><path d="{smooth_path}" class="smooth"/></svg>'
    )


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values up to and with each one."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def _path(points: list[tuple[float, float]]) -> str:
    """SVG path through at most about MAX_POINTS of `points`, first and last among them."""
    stride = max(1, len(points) // MAX_POINTS)
    kept = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """The map that takes low to start and high to stop."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range of the axis that is never empty."""
    margin = max(0.05 * math.log(high / low), 0.05)
    return low * math.exp(-margin), high * math.exp(margin)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values from low to high: 1-2-5 in each decade if that gives three, else finer ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    coarse = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    inside = [tick for tick in coarse if low <= tick <= high]
    if len(inside) >= 3:
        return inside[:: math.ceil(len(inside) / 6)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 2), 1)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

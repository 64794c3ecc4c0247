"""`report.html`: what the self-perceptual loss did in one run, as one page made from the run directory alone.

Parts that are missing are named as missing. Neither this module nor the template says who won: every word of the
verdict follows from the rows.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fastsp.evaluation.report.tables import find_roles, label, score_tables, verdict
from fastsp.evaluation.run_files import RunFiles, read_run
from fastsp.utils.files import write_file
from fastsp.utils.progress import duration

T = TypeVar("T")
MAX_STEP_GRIDS = 6  # of one stage
WIDE, NARROW = 1800, 640  # pixels: longest side of an embedded image, in the page's full width and beside others
_INK, _RAW, _SMOOTH = "#5d636e", "#c3c9d4", "#2457c5"  # the page's colours
MAX_POINTS = 2000  # of a curve
_CRITIC = ("critic_accuracy", "critic_gap")
WON, COLLAPSED = 0.99, 0.52  # accuracies
AS_IT_IS = 200_000  # bytes: a file up to this size is embedded unchanged


class Embedded(NamedTuple):
    """An image of the page."""

    uri: str
    link: str  # to the file
    shrunk: str  # the file's size where the page shows a smaller copy, such as "12800 x 2048"; else empty
    enlarged: bool  # few pixels: the browser is to show them as squares


def write_report(run_dir: Path) -> Path:
    """Write `run_dir / "report.html"` and return its path; `UserError` if a file of the run is broken."""
    run, path = read_run(run_dir), run_dir / "report.html"
    roles, text = find_roles(run), Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    page = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, **strict).render(
        title=run.directory.resolve().name,
        verdict=verdict(run, roles),
        no_scores=run.why_no_rows,
        tables=list(score_tables(run, roles)),
        grids=[(label(roles, name), name, embedded(path)) for name, path in _in_order(run, run.final_grids)],
        progress=[(label(roles, name), _chosen(grids)) for name, grids in _in_order(run, run.step_grids)],
        comparison=embedded(run.comparison, WIDE) if run.comparison else None,
        captions=run.captions,
        trajectories=[(label(roles, name), embedded(path, WIDE)) for name, path in _in_order(run, run.trajectories)],
        curves=[(label(roles, name), name, loss_curve(lines)) for name, lines in run.metrics.items()],
        validation=[
            (f"{label(roles, name)} · {name}, {title}", loss_curve(lines, key))
            for name, lines in run.metrics.items()
            for key, title in (("validation_mse", "mse"), ("validation_self_perceptual", "self-perceptual"))
            if any(key in line for line in lines)
        ],
        critics=[
            (name, critic_words(lines), [loss_curve(lines, key, "linear") for key in _CRITIC])
            for name, lines in run.metrics.items()
            if any(_CRITIC[0] in line for line in lines)
        ],
        features=sorted({row["features"] for row in run.rows if "features" in row}),
        times=list(_times(run, roles)),
        environment=list(run.environment.items()),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )
    write_file(path, page)
    return path


def embedded(path: Path, longest: int = NARROW) -> Embedded:
    """An image file for the page: as it is if it is small, else a JPEG whose longer side has `longest` pixels."""
    facts = path.stat()
    return _embedded(path, longest, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=100)  # the page is made anew whenever there is a new grid; the others are as they were
def _embedded(path: Path, longest: int, num_bytes: int, _time: int) -> Embedded:
    link = quote(f"{path.parent.name}/{path.name}")
    with Image.open(path) as image:
        if num_bytes <= AS_IT_IS:
            return Embedded(_uri("png", path.read_bytes()), link, "", max(image.size) < NARROW)
        size, copy = image.size, image.convert("RGB")
    copy.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    copy.save(jpeg, "JPEG", quality=85)
    shrunk = f"{size[0]} × {size[1]}" if copy.size != size else ""  # noqa: RUF001
    return Embedded(_uri("jpeg", jpeg.getvalue()), link, shrunk, False)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _in_order(run: RunFiles, by_stage: dict[str, T]) -> list[tuple[str, T]]:
    """By order of training, then the unknown ones by name."""
    order = {stage["name"]: place for place, stage in enumerate(run.stages)}
    return sorted(by_stage.items(), key=lambda item: (order.get(item[0], 99), item[0]))


def _chosen(grids: list[tuple[int, Path]]) -> list[tuple[int, Embedded]]:
    """A few of the grids made on the way, evenly chosen, by rising step."""
    places = np.linspace(0, len(grids) - 1, min(MAX_STEP_GRIDS, len(grids))).round().astype(int)
    return [(step, embedded(path)) for step, path in map(sorted(grids).__getitem__, places)]


def critic_words(lines: Sequence[dict[str, Any]]) -> str:
    """What a critic's accuracy in the last quarter of a stage's lines says."""
    found = [line[_CRITIC[0]] for line in lines if _CRITIC[0] in line]
    accuracy = float(np.mean(found[-max(1, len(found) // 4) :]))
    if accuracy >= WON:
        return f"The critic has won: right in {accuracy:.0%} of the cases. A smaller critic.learning_rate slows it."
    if accuracy <= COLLAPSED:
        return f"The critic has collapsed: right in {accuracy:.0%} of the cases, where guessing is right in 50%."
    if math.isnan(accuracy):
        return "The critic has collapsed: its scores are no numbers."
    return f"The critic is right in {accuracy:.0%} of the cases: it has neither won nor collapsed."


def loss_curve(lines: Sequence[dict[str, Any]], key: str = "loss", scale: str = "log") -> str | None:
    """A PNG as a URI: every loss in grey, a running mean over a twentieth of the stage in blue.

    What is not finite, or on a logarithmic axis not positive, has no place; None where there is nothing else.
    """
    found = ((line["step"], line.get(key, math.nan)) for line in lines)
    points = [(step, loss) for step, loss in found if math.isfinite(loss) and (loss > 0 or scale == "linear")]
    if not points:
        return None
    step, loss = np.array(points).T
    window = max(1, len(loss) // 20)
    smooth = np.convolve(loss, np.full(window, 1 / window), "valid")
    shown = slice(None, None, max(1, len(loss) // MAX_POINTS))
    narrow = 0 < loss.max() < 8 * loss.min()  # less than a decade: its powers of ten alone would leave the axis bare
    figure = Figure(figsize=(4.8, 2.9), dpi=160, layout="constrained")
    axes = figure.add_subplot(yscale=scale, xlim=(0, max(1, step[-1])))
    if scale == "log":
        axes.set_ylim(0.9 * loss.min(), 1.1 * loss.max())
    axes.plot(step[shown], loss[shown], color=_RAW, linewidth=0.8)
    marker = "o" if len(loss) == 1 else ""
    axes.plot(step[window - 1 :][shown], smooth[shown], color=_SMOOTH, linewidth=1.6, marker=marker)
    axes.grid(which="both" if narrow else "major", axis="y", color="#e4e6ea", linewidth=0.6)
    axes.tick_params(which="both", colors=_INK, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}" if narrow else "")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return _uri("png", png.getvalue())


def _times(run: RunFiles, roles: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What took how long, in words. Training by the logged rate, which leaves out the start."""
    batch_size = (run.config.get("data") or {}).get("batch_size", 0)
    for name, found in run.metrics.items():
        lines = [line for line in found if "samples_per_s" in line]  # others are of validations
        steps = [line["step"] for line in lines]
        counts = np.diff(steps, prepend=0)
        taken = [n / line["samples_per_s"] for n, line in zip(counts, lines, strict=True) if line["samples_per_s"]]
        if batch_size and taken:
            yield f"Training, {label(roles, name)}", f"{duration(batch_size * sum(taken))} ({steps[-1]:,} steps)"
    timed = [row["seconds"] for row in run.rows if "seconds" in row]
    if timed:
        yield "Evaluation", f"{duration(sum(timed))} ({len(timed)} rows)"

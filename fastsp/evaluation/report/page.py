"""`report.html`: what the self-perceptual loss did in one run, as one page made from the run directory alone.

:mod:`fastsp.evaluation.run_files` lists what is read; parts that are missing are named as missing. Neither this module
nor the template says who won: every word of the verdict follows from the rows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import jinja2
import yaml
from PIL import Image

from fastsp.evaluation.report.charts import loss_curve
from fastsp.evaluation.report.tables import Roles, find_roles, score_tables, verdict
from fastsp.evaluation.run_files import RunFiles, read_run
from fastsp.utils.files import write_file
from fastsp.utils.progress import duration

T = TypeVar("T")
MAX_STEP_GRIDS = 6  # of one stage
WIDE, NARROW = 1800, 640  # pixels: longest side of an embedded image, in the page's full width and beside others
AS_IT_IS = 200_000  # bytes: a file up to this size is embedded unchanged


class Embedded(NamedTuple):
    """An image of the page: itself, and where the file lies from which it was made."""

    uri: str
    link: str
    shrunk: str  # the file's size where the page shows a smaller copy, such as "12800 x 2048"; else empty
    enlarged: bool  # few pixels: the browser is to show them as squares


def write_report(run_dir: Path) -> Path:
    """Write `run_dir / "report.html"` and return its path.

    Raises:
        UserError: no such directory, or a file of the run is broken.
    """
    path = run_dir / "report.html"
    write_file(path, render(read_run(run_dir)))
    return path


def render(run: RunFiles) -> str:
    """The page as HTML. Every text of the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastsp.evaluation.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    roles = find_roles(run)
    return environment.get_template("report.html.jinja").render(
        title=run.directory.resolve().name,
        verdict=verdict(run, roles),
        no_scores=run.why_no_rows,
        tables=list(score_tables(run, roles)),
        grids=[(roles.label(name), name, embedded(path)) for name, path in _in_order(run, run.final_grids)],
        progress=[(roles.label(name), _chosen(grids)) for name, grids in _in_order(run, run.step_grids)],
        comparison=embedded(run.comparison, WIDE) if run.comparison else None,
        captions=run.captions,
        trajectories=[(roles.label(name), embedded(path, WIDE)) for name, path in _in_order(run, run.trajectories)],
        curves=[(roles.label(name), name, _curve(lines)) for name, lines in run.metrics.items()],
        features=sorted({row["features"] for row in run.rows if "features" in row}),
        times=list(_times(run, roles)),
        environment=list(run.environment.items()),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


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
    order = [stage["name"] for stage in run.stages]
    return sorted(by_stage.items(), key=lambda item: (order.index(item[0]) if item[0] in order else 99, item[0]))


def _chosen(grids: list[tuple[int, Path]]) -> list[tuple[int, Embedded]]:
    """A few of the grids made on the way, evenly chosen."""
    count = min(MAX_STEP_GRIDS, len(grids))
    places = (round(i * (len(grids) - 1) / max(1, count - 1)) for i in range(count))
    return [(step, embedded(path)) for step, path in (grids[place] for place in places)]


def _curve(lines: list[dict[str, Any]]) -> str | None:
    png = loss_curve([line["step"] for line in lines], [line["loss"] for line in lines])
    return None if png is None else _uri("png", png)


def _times(run: RunFiles, roles: Roles) -> Iterator[tuple[str, str]]:
    """What took how long, in words. Training by the logged rate, which leaves out the start."""
    batch_size = (run.config.get("data") or {}).get("batch_size")
    for name, lines in run.metrics.items():
        steps = [0] + [line["step"] for line in lines]
        taken = zip(lines, steps, strict=False)
        rates = [(line["step"] - before, line["samples_per_s"]) for line, before in taken if line["samples_per_s"]]
        if batch_size and rates:
            seconds = sum(count * batch_size / rate for count, rate in rates)
            yield f"Training, {roles.label(name)}", f"{duration(seconds)} ({steps[-1]:,} steps)"
    timed = [row["seconds"] for row in run.rows if "seconds" in row]
    if timed:
        yield "Evaluation", f"{duration(sum(timed))} ({len(timed)} rows)"

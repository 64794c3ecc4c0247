"""`report.html`: what the self-perceptual loss did in one run, self-contained, made from the run directory alone.

What is read is listed in `fastsp.evaluation.run_files`; parts that are missing are named as missing. No words about
who won are written here or in the template beforehand: they follow from the comparison of seeds in
`fastsp.evaluation.rows`.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from fastsp.durations import duration
from fastsp.evaluation.charts import loss_curve
from fastsp.evaluation.run_files import RunFiles, read_run
from fastsp.evaluation.tables import Roles, find_roles, score_tables, verdict
from fastsp.files import write_file

MAX_STEP_GRIDS = 6  # of one stage; evenly chosen


def write_report(run_dir: Path) -> Path:
    """Write `run_dir / "report.html"` and return its path.

    Raises:
        UserError: no such directory, or a file of the run is broken.
    """
    path = run_dir / "report.html"
    write_file(path, render(read_run(run_dir)))
    return path


def render(run: RunFiles) -> str:
    """The page as HTML; every text of the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastsp.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    roles = find_roles(run)
    return environment.get_template("report.html.jinja").render(
        title=run.directory.resolve().name,
        verdict=verdict(run, roles),
        tables=list(score_tables(run, roles)),
        grids=[(roles.label(name), name, _data_uri(path)) for name, path in _in_order(run, run.final_grids)],
        progress=list(_progress(run, roles)),
        comparison=_data_uri(run.comparison) if run.comparison else None,
        captions=run.captions,
        trajectories=[(roles.label(name), _data_uri(path)) for name, path in _in_order(run, run.trajectories)],
        curves=[_curve(run, roles, name) for name in run.metrics],
        features=sorted({row["features"] for row in run.rows if "features" in row}),
        seeds=sorted({row["seed"] for row in run.rows}),
        times=list(_times(run, roles)),
        environment=run.environment,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _in_order(run: RunFiles, paths: dict[str, Path]) -> list[tuple[str, Path]]:
    """By order of training, then the unknown ones by name."""
    order = [stage["name"] for stage in run.stages]
    return sorted(paths.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))


def _progress(run: RunFiles, roles: Roles) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Per stage, a few of the grids made on the way; one alone is the stage's end, which is shown already."""
    for name, _ in _in_order(run, {name: grids[0][1] for name, grids in run.step_grids.items() if len(grids) > 1}):
        grids = run.step_grids[name]
        count = min(MAX_STEP_GRIDS, len(grids))
        chosen = [grids[round(i * (len(grids) - 1) / (count - 1))] for i in range(count)]
        yield roles.label(name), [(step, _data_uri(path)) for step, path in chosen]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _curve(run: RunFiles, roles: Roles, name: str) -> tuple[str, str, Markup]:
    lines = run.metrics[name]
    return roles.label(name), name, loss_curve([line["step"] for line in lines], [line["loss"] for line in lines])


def _times(run: RunFiles, roles: Roles) -> Iterator[tuple[str, str, str]]:
    """What took how long: (what, how much of it, how long). Training by the logged rate, which leaves out start-up."""
    batch_size = (run.config.get("data") or {}).get("batch_size")
    for name, lines in run.metrics.items():
        steps = [0] + [line["step"] for line in lines]
        taken = zip(lines, steps, strict=False)
        rates = [(line["step"] - before, line["samples_per_s"]) for line, before in taken if line["samples_per_s"]]
        if batch_size and rates:
            seconds = sum(count * batch_size / rate for count, rate in rates)
            yield f"Training, {roles.label(name)}", f"{steps[-1]:,} steps", duration(seconds)
    timed = [row["seconds"] for row in run.rows if "seconds" in row]
    if timed:
        yield "Evaluation", f"{len(timed)} rows", duration(sum(timed))

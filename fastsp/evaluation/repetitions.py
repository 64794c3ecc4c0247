"""Several training runs of each stage from one base, so that a difference can be told from chance.

A base and R repetitions of every other stage are one run. Repetition r of all stages sees the same samples, noise and
timesteps, and is sampled from the same noise: differences are taken repetition by repetition. Their interval, Student's
over the repetitions, covers what another training of these stages would change, but not another base.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.evaluation.report.tables import METRICS, Comparison, compare
from fastsp.evaluation.rows import REAL, Row, by_setting

REPETITIONS = 3


def repeated(file: Path, overrides: Sequence[str] = (), repetitions: int = REPETITIONS) -> Config:
    """The run of a configuration whose stages but the first come so many times: ``NAME_0``, ``NAME_1``, ...

    Args:
        file: its first stage is the base; all others start from it, and the first of them with MSE is the control.
        overrides: as on the command line, of the file's own stages.
        repetitions: at least one.

    Raises:
        UserError: the file has no such control, or what :func:`fastsp.config.load_config` refuses.
    """
    config = load_config(file, overrides)
    base, *others = config.stages
    if all(stage.objective != "mse" for stage in others) or any(stage.init != base.name for stage in others):
        raise UserError(f"{file}: a comparison needs a base, and stages that start from it, one of them of MSE")
    numbered = {stage.name: [f"{stage.name}_{number}" for number in range(repetitions)] for stage in others}
    numbered[base.name] = [base.name]
    stages = [base.model_dump(mode="json")] + [
        {**stage.model_dump(mode="json"), "name": numbered[stage.name][number], "repetition": number}
        for number in range(repetitions)
        for stage in others
    ]
    guidance = [row.model_dump() for row in config.evaluation.guidance]
    for row in guidance:
        row["stages"] = row["stages"] and [name for stage in row["stages"] for name in numbered[stage]]
    assert config.final is not None
    changes = {"stages": stages, "final": numbered[config.final][0], "evaluation.guidance": guidance}
    return load_config(file, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def by_repetition(config: Config, rows: list[Row]) -> list[Row]:
    """The rows of a repeated run as if repetitions were seeds: `stage` has no number, and `seed` is that number.

    Rows of several sampling seeds become one with their mean figures.
    """
    found = []
    for setting, group in by_setting(rows).items():
        stage = next((stage for stage in config.stages if stage.name == setting.stage), None)
        figures = {m.key: mean(row[m.key] for row in group) for m in METRICS if all(m.key in row for row in group)}
        number = 0 if stage is None else stage.repetition
        found.append({**group[0], **figures, "stage": _form(config, setting.stage), "seed": number})
    return found


def comparisons(config: Config, rows: list[Row]) -> Iterator[Comparison]:
    """Every form of training but base and control against the control, in every metric and way of sampling."""
    forms, pooled = _forms(config), by_repetition(config, rows)
    control = next(_form(config, stage.name) for stage in config.stages[1:] if stage.objective == "mse")
    for metric in (metric for metric in METRICS if metric.better):
        for form in forms[1:]:
            if form != control:
                yield from compare(pooled, form, control, metric)


def markdown(config: Config, rows: list[Row]) -> str:
    """The comparison as a table: a row for each metric and way of sampling, a column for each form of training.

    A cell is the mean over the repetitions, or "-" while some have no row; in brackets the difference from the control
    and its 95 % interval, in bold where that excludes zero. The floor, real images, is a line above the table.
    """
    forms, pooled = _forms(config), by_repetition(config, rows)
    groups, trained = by_setting(pooled), Counter(_form(config, stage.name) for stage in config.stages)
    compared = {(c.metric, c.setting): c for c in comparisons(config, rows)}
    real = [row for row in pooled if row["stage"] == REAL][:1]
    floor = [f"{m.heading} {m.show(row[m.key])}" for row in real for m in METRICS if m.better and m.key in row]
    table = [["metric", "sampling", *forms], ["---"] * (2 + len(forms))]
    for metric in (metric for metric in METRICS if metric.better):
        for sampling in dict.fromkeys(setting._replace(stage="") for setting in groups if setting.stage != REAL):
            cells = []
            for form in forms:
                group = groups.get(sampling._replace(stage=form), [])
                values = [row[metric.key] for row in group if metric.key in row]
                comparison = compared.get((metric, sampling._replace(stage=form)))
                shown = f"{metric.show(mean(values))}{_against_control(comparison)}" if values else "-"
                cells.append(shown if len(values) == trained[form] else "-")
            if cells != ["-"] * len(forms):
                table.append([f"{metric.heading} {metric.better}", sampling.words(), *cells])
    head = [f"Real images that were trained on: {', '.join(floor)}.", ""] if floor else []
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in table), ""])


def _forms(config: Config) -> list[str]:
    return list(dict.fromkeys(_form(config, stage.name) for stage in config.stages))


def _form(config: Config, name: str) -> str:
    """A stage's name without the number of its repetition."""
    number = next((stage.repetition for stage in config.stages[1:] if stage.name == name), None)
    return name if number is None else name.removesuffix(f"_{number}")


def _against_control(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    change = comparison.metric.show(comparison.difference, "+")
    words = f"{change}, {comparison.show_interval()}" if comparison.seeds > 1 else change
    return f" ({words})" if comparison.outcome == "undecided" else f" (**{words}**)"

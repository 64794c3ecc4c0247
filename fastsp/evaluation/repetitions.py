"""Several training runs of each stage from one base or several, so that a difference can be told from chance.

A base and R repetitions of every other stage are one run. Repetition r of all stages sees the same samples, noise and
timesteps, and is sampled from the same noise: differences are taken repetition by repetition. Their interval, Student's
over the repetitions, covers what another training of these stages would change, but not another base. With several
bases, each a run with a seed of its own, differences are taken base by base, and the interval covers another base too.
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


def on_bases(file: Path, overrides: Sequence[str], repetitions: int, bases: int) -> list[Config]:
    """The runs of :func:`repeated` on so many bases: each has a seed of its own, and a folder below `run_dir`."""
    first = repeated(file, overrides, repetitions)
    if bases == 1:
        return [first]
    seeds = range(first.seed, first.seed + bases)
    own = ([f"seed={seed}", f"run_dir={json.dumps(f'{first.run_dir}/seed_{seed}')}"] for seed in seeds)
    return [repeated(file, [*overrides, *changes], repetitions) for changes in own]


def by_repetition(config: Config, rows: list[Row]) -> list[Row]:
    """The rows of a repeated run as if repetitions were seeds: `stage` has no number, and `seed` is that number.

    Rows of several sampling seeds become one with their mean figures.
    """
    found = []
    for setting, group in by_setting(rows).items():
        stage = next((stage for stage in config.stages if stage.name == setting.stage), None)
        number = 0 if stage is None else stage.repetition
        found.append({**group[0], **_means(group), "stage": _form(config, setting.stage), "seed": number})
    return found


def by_base(runs: Sequence[tuple[Config, list[Row]]]) -> list[Row]:
    """The rows of runs on several bases as if bases were seeds: means over repetitions, `seed` is the base's number.

    A form of training of which a repetition still has no row is left out.
    """
    found = []
    for number, (config, rows) in enumerate(runs):
        trained = _trainings(config)
        for setting, group in by_setting(by_repetition(config, rows)).items():
            if len(group) == trained.get(setting.stage, 1):
                found.append({**group[0], **_means(group), "seed": number})
    return found


def comparisons(config: Config, pooled: list[Row]) -> Iterator[Comparison]:
    """Every form of training but base and control against the control, in every metric and way of sampling.

    `pooled` are rows of :func:`by_repetition`, or of :func:`by_base`.
    """
    forms = list(_trainings(config))
    control = next(_form(config, stage.name) for stage in config.stages[1:] if stage.objective == "mse")
    for metric in (metric for metric in METRICS if metric.better):
        for form in forms[1:]:
            if form != control:
                yield from compare(pooled, form, control, metric)


def markdown(runs: Sequence[tuple[Config, list[Row]]]) -> str:
    """The comparison as a table: a row for each metric and way of sampling, a column for each form of training.

    A cell is the mean over the repetitions, or over several bases, or "-" while some have no row; in brackets the
    difference from the control and its 95 % interval, in bold where that excludes zero. The floor, real images, is a
    line above the table.

    Args:
        runs: a run for each base, with its rows.
    """
    config, rows = runs[0]
    trained = _trainings(config)
    if len(runs) > 1:
        pooled, awaited = by_base(runs), dict.fromkeys(trained, len(runs))
    else:
        pooled, awaited = by_repetition(config, rows), dict(trained)
    groups = by_setting(pooled)
    compared = {(c.metric, c.setting): c for c in comparisons(config, pooled)}
    real = _means([row for row in pooled if row["stage"] == REAL])
    floor = [f"{m.heading} {m.show(real[m.key])}" for m in METRICS if m.better and m.key in real]
    table = [["metric", "sampling", *trained], ["---"] * (2 + len(trained))]
    for metric in (metric for metric in METRICS if metric.better):
        for sampling in dict.fromkeys(setting._replace(stage="") for setting in groups if setting.stage != REAL):
            cells = []
            for form in trained:
                group = groups.get(sampling._replace(stage=form), [])
                values = [row[metric.key] for row in group if metric.key in row]
                comparison = compared.get((metric, sampling._replace(stage=form)))
                shown = f"{metric.show(mean(values))}{_against_control(comparison)}" if values else "-"
                cells.append(shown if len(values) == awaited[form] else "-")
            if cells != ["-"] * len(trained):
                table.append([f"{metric.heading} {metric.better}", sampling.words(), *cells])
    head = [f"Real images that were trained on: {', '.join(floor)}.", ""] if floor else []
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in table), ""])


def _trainings(config: Config) -> Counter[str]:
    """The forms of training in the configuration's order, the base first, and how many repetitions each has."""
    return Counter(_form(config, stage.name) for stage in config.stages)


def _means(group: list[Row]) -> Row:
    """The mean figures of rows, of the metrics that all have."""
    return {m.key: mean(row[m.key] for row in group) for m in METRICS if group and all(m.key in row for row in group)}


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

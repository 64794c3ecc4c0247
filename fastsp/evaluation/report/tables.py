"""The report's two tables as plain data: the verdict on self-perceptual against control, and all scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats

from fastsp.evaluation.reproduction import counterpart
from fastsp.evaluation.rows import REAL, Setting, by_setting, sampling_words
from fastsp.evaluation.run_files import RunFiles

CONFIDENCE = 0.95
_LABELS = {"real": "Real images", "base": "MSE", "self_perceptual": "Self-perceptual", "control": "MSE, as long"}


class Metric(NamedTuple):
    """How a key of a row is shown: `factor` and `decimals` apply to value, spread and difference alike."""

    key: str
    heading: str
    decimals: int
    smaller_is_better: bool | None  # None: neither is
    factor: float = 1.0
    unit: str = ""

    @property
    def title(self) -> str:
        """The heading, and an arrow that points to the better end."""
        return f"{self.heading} { {True: '↓', False: '↑', None: ''}[self.smaller_is_better] }"

    def show(self, value: float, sign: str = "") -> str:
        """The value with its unit and a true minus sign; `sign` "+" shows that of positive ones too."""
        return f"{value * self.factor:{sign}.{self.decimals}f}{self.unit}".replace("-", "−")  # noqa: RUF001


METRICS = (
    Metric("fid", "FID", 2, True),
    Metric("inception_score", "IS", 2, False),
    Metric("validity", "Valid", 1, False, 100, "%"),
    Metric("caption_agreement", "Caption", 1, False, 100, "%"),
    Metric("precision", "Precision", 2, False),
    Metric("recall", "Recall", 2, False),
    Metric("coverage", "Coverage", 2, False),
    Metric("nearest_train", "Nearest", 3, None),
    Metric("memorised", "Copied", 1, None, 100, "%"),
)


class Roles(NamedTuple):
    """Which stage plays which part in the comparison; None where there is none."""

    base: str | None = None
    self_perceptual: str | None = None
    control: str | None = None

    def of(self, stage: str) -> str:
        """ "real", "base", "self_perceptual", "control" or "other"."""
        parts = {self.base: "base", self.self_perceptual: "self_perceptual", self.control: "control", REAL: "real"}
        return parts.get(stage, "other")

    def label(self, stage: str) -> str:
        """The stage as a reader of the paper calls it."""
        return _LABELS.get(self.of(stage), stage)


def find_roles(run: RunFiles) -> Roles:
    """The last self-perceptual stage, what it started from, and the MSE stage of the same start and length."""
    stages = run.stages
    ours = next((s for s in reversed(stages) if s["objective"] == "self_perceptual"), None)
    if ours is None:
        return Roles(base=next((s["name"] for s in stages), None))
    start = (ours["init"], ours["steps"])
    controls = (s["name"] for s in stages if s["objective"] == "mse" and (s["init"], s["steps"]) == start)
    return Roles(ours["init"], ours["name"], next(controls, None))


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval; `low` and `high` are nan for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Comparison(NamedTuple):
    """Self-perceptual minus control in one metric, at one setting."""

    setting: Setting  # that of the self-perceptual rows; the control's differs in the stage alone
    self_perceptual: float
    control: float
    difference: Interval
    outcome: str  # "better" or "worse" if the interval excludes zero, else "undecided", as with one seed


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); the latter is nan for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def confidence_interval(values: list[float]) -> Interval:
    """Student's 95 % interval of the mean of `values`, at least one."""
    centre, deviation = spread(values)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(centre, centre - reach, centre + reach, len(values))


def compare(
    rows: list[dict[str, Any]], self_perceptual: str, control: str, metric: str = "fid", smaller_is_better: bool = True
) -> list[Comparison]:
    """Self-perceptual against control, one comparison for every way of sampling that both have rows of.

    The difference is taken seed by seed, since both start from the same noise and captions; a seed that only one of
    them has is left out. Without guidance first, then guided, then without captions; else in the order of `rows`.
    """
    groups = by_setting([row for row in rows if metric in row])
    comparisons = []
    for setting in (found for found in groups if found.stage == self_perceptual):
        theirs = {row["seed"]: row[metric] for row in groups.get(setting._replace(stage=control), [])}
        ours = {row["seed"]: row[metric] for row in groups[setting] if row["seed"] in theirs}
        if ours:
            difference = confidence_interval([value - theirs[seed] for seed, value in ours.items()])
            outcome = "better" if (difference.mean < 0) == smaller_is_better else "worse"
            outcome = outcome if difference.excludes_zero else "undecided"
            means = mean(ours.values()), mean(theirs[seed] for seed in ours)
            comparisons.append(Comparison(setting, *means, difference, outcome))
    return sorted(comparisons, key=lambda c: (not c.setting.conditional, c.setting.guidance != 0))


class Verdict(NamedTuple):
    """What the seeds say: one sentence, and one line for each metric and setting. Without lines, why there are none."""

    sentence: str
    lines: list[dict[str, str]]


def verdict(run: RunFiles, roles: Roles) -> Verdict:
    """Self-perceptual against its control in FID, IS and validity; every word follows from the numbers."""
    ours, control = roles.self_perceptual, roles.control
    if not run.rows:
        return Verdict(run.why_no_rows, [])
    if ours is None:
        return Verdict("This run has no self-perceptual stage.", [])
    if control is None:
        return Verdict("This run has no MSE stage of the same start and length: there is no fair comparison.", [])
    compared = [
        (metric, comparison)
        for metric in METRICS[:3]
        for comparison in compare(run.rows, ours, control, metric.key, bool(metric.smaller_is_better))
    ]
    if not compared:
        return Verdict("Self-perceptual and control have no scores of equal steps and seed yet.", [])
    lines = [_line(*pair) for pair in compared]
    return Verdict(_sentence(lines, compared[0][1].difference.seeds), lines)


def _line(metric: Metric, c: Comparison) -> dict[str, str]:
    low, high = (metric.show(end, "+") for end in (c.difference.low, c.difference.high))
    return {
        "heading": metric.heading,
        "metric": metric.title,
        "sampling": sampling_words(c.setting),
        "self_perceptual": metric.show(c.self_perceptual),
        "control": metric.show(c.control),
        "difference": metric.show(c.difference.mean, "+"),
        "interval": f"{low} to {high}" if c.difference.seeds > 1 else "one seed",
        "outcome": c.outcome,
    }


def _sentence(lines: list[dict[str, str]], seeds: int) -> str:
    """The first comparison in full, then how all of them came out."""
    first = lines[0]
    scores = (
        f"{first['heading']} at {first['sampling']}: {first['self_perceptual']} with the self-perceptual loss, "
        f"{first['control']} with MSE for as many steps"
    )
    if seeds == 1:
        return f"{scores}. One sampling seed gives no interval, and so no verdict."
    undecided = f"The {seeds} seeds cannot tell the two apart"
    end = undecided if first["outcome"] == "undecided" else f"Self-perceptual is {first['outcome']}"
    counts = Counter(line["outcome"] for line in lines)
    tally = ", ".join(f"{name} in {counts[name]}" for name in ("better", "worse", "undecided") if counts[name])
    return (
        f"{scores}: a difference of {first['difference']} (95 % interval {first['interval']}) over {seeds} seeds. "
        f"{end}. Of {len(lines)} comparisons it is {tally}."
    )


def score_tables(run: RunFiles, roles: Roles) -> Iterator[dict[str, Any]]:
    """One table with captions and one without, as far as there are rows; settings in the order they were evaluated."""
    for conditional in (True, False):
        groups = {key: rows for key, rows in by_setting(run.rows).items() if key.conditional == conditional}
        metrics = [m for m in METRICS if any(m.key in row for rows in groups.values() for row in rows)]
        cells = zip(*(_column(groups, metric) for metric in metrics), strict=True)
        if groups:
            lines = [_score_line(roles, *line) for line in zip(groups.items(), cells, strict=True)]
            yield {"conditional": conditional, "headings": [metric.title for metric in metrics], "rows": lines}


def _score_line(roles: Roles, group: tuple[Setting, list[dict[str, Any]]], cells: Sequence[Any]) -> dict[str, Any]:
    setting, rows = group
    return {
        "label": roles.label(setting.stage),
        "sampling": sampling_words(setting, with_condition=False) or "training set, or the reference itself",
        "role": roles.of(setting.stage),
        "cells": cells,
        "paper": counterpart(roles.of(setting.stage), setting),
        "samples": f"{rows[0]['num_samples']:,} × {len(rows)}",  # noqa: RUF001
    }


def _column(groups: dict[Setting, list[dict[str, Any]]], metric: Metric) -> list[dict[str, Any]]:
    """A cell for each setting. The best mean of generated images is marked, where one end is the better one."""
    values = {setting: [row[metric.key] for row in rows if metric.key in row] for setting, rows in groups.items()}
    means = [mean(found) for setting, found in values.items() if found and setting.stage != REAL]
    best = None
    if means and metric.smaller_is_better is not None:
        best = metric.show(min(means) if metric.smaller_is_better else max(means))
    cells = []
    for setting, found in values.items():
        centre, deviation = spread(found) if found else (math.nan, math.nan)
        shown = metric.show(centre) if found else "–"  # noqa: RUF001
        around = "" if math.isnan(deviation) else f"± {deviation * metric.factor:.{metric.decimals}f}"
        cells.append({"mean": shown, "spread": around, "best": shown == best and setting.stage != REAL})
    return cells

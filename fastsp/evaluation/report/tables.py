"""The report's two tables as plain data: the verdict on self-perceptual against control, and all scores."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from fastsp.evaluation.report.comparison import Comparison, compare, spread
from fastsp.evaluation.report.paper import counterpart
from fastsp.evaluation.rows import REAL, Setting, by_setting, sampling_words
from fastsp.evaluation.run_files import RunFiles


@dataclass(frozen=True)
class Metric:
    """How a key of a row is shown: `factor` and `decimals` apply to value, spread and difference alike."""

    key: str
    heading: str
    decimals: int
    smaller_is_better: bool | None  # None: neither is
    factor: float = 1.0
    unit: str = ""

    @property
    def arrow(self) -> str:
        return {True: "↓", False: "↑", None: ""}[self.smaller_is_better]

    def show(self, value: float, signed: bool = False) -> str:
        """The value with its unit and a true minus sign."""
        text = f"{value * self.factor:{'+' if signed else ''}.{self.decimals}f}{self.unit}"
        return text.replace("-", "−")  # noqa: RUF001


FID = Metric("fid", "FID", 2, True)
INCEPTION_SCORE = Metric("inception_score", "IS", 2, False)
VALIDITY = Metric("validity", "Valid", 1, False, 100, "%")
METRICS = (
    FID,
    INCEPTION_SCORE,
    VALIDITY,
    Metric("caption_agreement", "Caption", 1, False, 100, "%"),
    Metric("precision", "Precision", 2, False),
    Metric("recall", "Recall", 2, False),
    Metric("coverage", "Coverage", 2, False),
    Metric("nearest_train", "Nearest", 3, None),
    Metric("memorised", "Copied", 1, None, 100, "%"),
)


@dataclass(frozen=True)
class Roles:
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
        names = {
            "real": "Real images",
            "base": "MSE",
            "self_perceptual": "Self-perceptual",
            "control": "MSE, as long",
        }
        return names.get(self.of(stage), stage)


def find_roles(run: RunFiles) -> Roles:
    """The last self-perceptual stage, what it started from, and the MSE stage of the same start and length."""
    stages = run.stages
    ours = next((s for s in reversed(stages) if s["objective"] == "self_perceptual"), None)
    if ours is None:
        return Roles(base=next((s["name"] for s in stages), None))
    start = (ours["init"], ours["steps"])
    controls = (s["name"] for s in stages if s["objective"] == "mse" and (s["init"], s["steps"]) == start)
    return Roles(ours["init"], ours["name"], next(controls, None))


# The verdict


@dataclass(frozen=True)
class Verdict:
    """What the seeds say: one sentence, and one line for each metric and setting. Without lines, why there are none."""

    sentence: str
    lines: list[dict[str, str]]


def verdict(run: RunFiles, roles: Roles) -> Verdict:
    """Self-perceptual against its control in FID, IS and validity; every word follows from the numbers."""
    if not run.rows:
        return Verdict(run.why_no_rows, [])
    if roles.self_perceptual is None:
        return Verdict("This run has no self-perceptual stage.", [])
    if roles.control is None:
        return Verdict("This run has no MSE stage of the same start and length: there is no fair comparison.", [])
    ours, theirs = roles.self_perceptual, roles.control
    compared = [
        (metric, comparison)
        for metric in (FID, INCEPTION_SCORE, VALIDITY)
        for comparison in compare(run.rows, ours, theirs, metric.key, bool(metric.smaller_is_better))
    ]
    if not compared:
        return Verdict("Self-perceptual and control have no scores of equal steps and seed yet.", [])
    return Verdict(_sentence(*zip(*compared, strict=True)), [_line(*pair) for pair in compared])


def _sentence(metrics: tuple[Metric, ...], comparisons: tuple[Comparison, ...]) -> str:
    """The first comparison in full, then how all of them came out."""
    metric, first = metrics[0], comparisons[0]
    scores = (
        f"{metric.heading} at {sampling_words(first.setting)}: {metric.show(first.self_perceptual)} with the "
        f"self-perceptual loss, {metric.show(first.control)} with MSE for as many steps"
    )
    count = first.difference.count
    if count == 1:
        return f"{scores}. One sampling seed gives no interval, and so no verdict."
    difference = f"{metric.show(first.difference.mean, signed=True)} (95 % interval {_interval(metric, first)})"
    ends = {
        "better": "Self-perceptual is better",
        "worse": "Self-perceptual is worse",
        "undecided": f"The {count} seeds cannot tell the two apart",
    }
    counts = Counter(comparison.outcome for comparison in comparisons)
    tally = ", ".join(f"{outcome} in {counts[outcome]}" for outcome in ends if counts[outcome])
    return (
        f"{scores}: a difference of {difference} over {count} seeds. {ends[first.outcome]}. "
        f"Of {len(comparisons)} comparisons it is {tally}."
    )


def _line(metric: Metric, c: Comparison) -> dict[str, str]:
    return {
        "metric": f"{metric.heading} {metric.arrow}",
        "sampling": sampling_words(c.setting),
        "self_perceptual": metric.show(c.self_perceptual),
        "control": metric.show(c.control),
        "difference": metric.show(c.difference.mean, signed=True),
        "interval": _interval(metric, c) if c.difference.count > 1 else "one seed",
        "outcome": c.outcome,
    }


def _interval(metric: Metric, c: Comparison) -> str:
    return f"{metric.show(c.difference.low, signed=True)} to {metric.show(c.difference.high, signed=True)}"


# The scores


def score_tables(run: RunFiles, roles: Roles) -> Iterator[dict[str, Any]]:
    """One table with captions and one without, as far as there are rows; settings in the order they were evaluated."""
    groups = by_setting(run.rows)
    for conditional in (True, False):
        chosen = {setting: rows for setting, rows in groups.items() if setting.conditional == conditional}
        if chosen:
            yield _score_table(chosen, conditional, roles)


def _score_table(groups: dict[Setting, list[dict[str, Any]]], conditional: bool, roles: Roles) -> dict[str, Any]:
    metrics = [m for m in METRICS if any(m.key in row for rows in groups.values() for row in rows)]
    best = {m: _best(groups, m) for m in metrics}
    return {
        "conditional": conditional,
        "headings": [f"{m.heading} {m.arrow}" for m in metrics],
        "rows": [
            {
                "label": roles.label(setting.stage),
                "sampling": _setting_words(setting),
                "role": roles.of(setting.stage),
                "cells": [_cell(rows, m, best[m]) for m in metrics],
                "paper": counterpart(roles.of(setting.stage), setting),
                "samples": f"{rows[0]['num_samples']:,} × {len(rows)}",  # noqa: RUF001
            }
            for setting, rows in groups.items()
        ],
    }


def _best(groups: dict[Setting, list[dict[str, Any]]], metric: Metric) -> str | None:
    """The best mean of the generated rows, as it is shown; None where no end is the better one."""
    means = [
        mean(row[metric.key] for row in rows)
        for setting, rows in groups.items()
        if setting.stage != REAL and all(metric.key in row for row in rows)
    ]
    if not means or metric.smaller_is_better is None:
        return None
    return metric.show(min(means) if metric.smaller_is_better else max(means))


def _cell(rows: list[dict[str, Any]], metric: Metric, best: str | None) -> dict[str, Any]:
    values = [row[metric.key] for row in rows if metric.key in row]
    if not values:
        return {"mean": "–", "spread": "", "best": False}  # noqa: RUF001
    centre, deviation = spread(values)
    shown = metric.show(centre)
    return {
        "mean": shown,
        "spread": "" if math.isnan(deviation) else f"± {deviation * metric.factor:.{metric.decimals}f}",
        "best": shown == best and rows[0]["stage"] != REAL,
    }


def _setting_words(setting: Setting) -> str:
    if setting.stage == REAL:
        return "training set, or the reference itself"
    return sampling_words(setting, with_condition=False)

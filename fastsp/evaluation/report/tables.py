"""The report's two tables as plain data: the verdict on self-perceptual against control, and all scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats

from fastsp.evaluation.reproduction import counterpart
from fastsp.evaluation.rows import REAL, Setting, by_setting
from fastsp.evaluation.run_files import RunFiles

CONFIDENCE = 0.95
_LABELS = {"real": "Real images", "base": "MSE", "self_perceptual": "Self-perceptual", "control": "MSE, as long"}


class Metric(NamedTuple):
    """How a key of a row is shown: `factor` and `decimals` apply to value, spread and difference alike."""

    key: str
    heading: str
    better: str  # an arrow to the better end; empty: neither is
    decimals: int
    factor: float = 1.0
    unit: str = ""

    def show(self, value: float, sign: str = "") -> str:
        """The value with its unit and a true minus sign; `sign` "+" shows that of positive ones too."""
        return f"{value * self.factor:{sign}.{self.decimals}f}{self.unit}".replace("-", "−")  # noqa: RUF001


METRICS = (
    Metric("fid", "FID", "↓", 2),
    Metric("inception_score", "IS", "↑", 2),
    Metric("validity", "Valid", "↑", 1, 100, "%"),
    Metric("caption_agreement", "Caption", "↑", 1, 100, "%"),
    Metric("clip_score", "CLIP score", "↑", 2),
    Metric("kid", "KID x 1000", "↓", 2, 1000),
    Metric("precision", "Precision", "↑", 2),
    Metric("recall", "Recall", "↑", 2),
    Metric("coverage", "Coverage", "↑", 2),
    Metric("nearest_train", "Nearest", "", 3),
    Metric("memorised", "Copied", "", 1, 100, "%"),
)


def find_roles(run: RunFiles) -> dict[str, str]:
    """Stages and the parts they play: "real", "self_perceptual" (the last such stage), "base" (what it started from),
    "control" (the MSE stage of the same start and length). Stages without a part are left out.
    """
    stages = run.stages
    ours = next((s for s in reversed(stages) if s["objective"] == "self_perceptual"), None)
    if ours is None:
        return {REAL: "real", **{stage["name"]: "base" for stage in stages[:1]}}
    start = (ours["init"], ours["steps"])
    controls = [s["name"] for s in stages if s["objective"] == "mse" and (s["init"], s["steps"]) == start]
    return {
        REAL: "real",
        **dict.fromkeys(controls[:1], "control"),
        ours["name"]: "self_perceptual",
        ours["init"]: "base",
    }


def label(roles: dict[str, str], stage: str) -> str:
    """The stage as a reader of the paper calls it."""
    return _LABELS.get(roles.get(stage, ""), stage)


class Comparison(NamedTuple):
    """Self-perceptual minus control in one metric, at one setting."""

    metric: Metric
    setting: Setting  # that of the self-perceptual rows; the control's differs in the stage alone
    self_perceptual: float
    control: float
    difference: float
    interval: tuple[float, float]  # of the difference
    seeds: int
    outcome: str  # "better" or "worse" if the interval excludes zero, else "undecided", as with one seed

    def show_interval(self) -> str:
        low, high = (self.metric.show(end, "+") for end in self.interval)
        return f"{low} to {high}" if self.seeds > 1 else "one seed"


def confidence_interval(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of `values`; nan for a single one."""
    deviation = stdev(values) if len(values) > 1 else math.nan
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean(values) - reach, mean(values) + reach


def compare(
    rows: list[dict[str, Any]], self_perceptual: str, control: str, metric: Metric = METRICS[0]
) -> list[Comparison]:
    """Self-perceptual against control, one comparison for every way of sampling that both have rows of.

    The difference is taken seed by seed, since both start from the same noise and captions; a seed that only one of
    them has is left out. Without guidance first, then guided, then without captions; else in the order of `rows`.
    """
    groups = by_setting([row for row in rows if metric.key in row])
    comparisons = []
    for setting in (found for found in groups if found.stage == self_perceptual):
        theirs = {row["seed"]: row[metric.key] for row in groups.get(setting._replace(stage=control), [])}
        ours = {row["seed"]: row[metric.key] for row in groups[setting] if row["seed"] in theirs}
        if ours:
            differences = [value - theirs[seed] for seed, value in ours.items()]
            low, high = confidence_interval(differences)
            outcome = "undecided"
            if low > 0 or high < 0:
                outcome = "better" if (high < 0) == (metric.better == "↓") else "worse"
            means = mean(ours.values()), mean(theirs[seed] for seed in ours), mean(differences)
            comparisons.append(Comparison(metric, setting, *means, (low, high), len(ours), outcome))
    return sorted(comparisons, key=lambda c: (not c.setting.conditional, c.setting.guidance != 0))


def verdict(run: RunFiles, roles: dict[str, str]) -> tuple[str, list[Comparison]] | None:
    """Self-perceptual against its control in FID, IS and validity: a sentence, of which every word follows from the
    numbers, and the comparisons. Without any, the sentence says why there are none. None: there is no such stage.
    """
    stages = {role: stage for stage, role in roles.items()}
    if "self_perceptual" not in stages:
        return None
    if not run.rows:
        return run.why_no_rows, []
    if "control" not in stages:
        return "This run has no MSE stage of the same start and length: there is no fair comparison.", []
    both = stages["self_perceptual"], stages["control"]
    compared = [comparison for metric in METRICS[:3] for comparison in compare(run.rows, *both, metric)]
    if not compared:
        return "Self-perceptual and control have no scores of equal steps and seed yet.", []
    return _sentence(compared), compared


def _sentence(compared: list[Comparison]) -> str:
    """The first comparison in full, then how all of them came out."""
    first, metric, seeds = compared[0], compared[0].metric, compared[0].seeds
    scores = (
        f"{metric.heading} at {first.setting.words()}: {metric.show(first.self_perceptual)} with the self-perceptual "
        f"loss, {metric.show(first.control)} with MSE for as many steps"
    )
    if seeds == 1:
        return f"{scores}. One sampling seed gives no interval, and so no verdict."
    undecided = f"The {seeds} seeds cannot tell the two apart"
    end = undecided if first.outcome == "undecided" else f"Self-perceptual is {first.outcome}"
    counts = Counter(comparison.outcome for comparison in compared)
    tally = ", ".join(f"{name} in {counts[name]}" for name in ("better", "worse", "undecided") if counts[name])
    return (
        f"{scores}: a difference of {metric.show(first.difference, '+')} (95 % interval {first.show_interval()}) over "
        f"{seeds} seeds. {end}. Of {len(compared)} comparisons it is {tally}."
    )


def score_tables(run: RunFiles, roles: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One table with captions and one without, as far as there are rows; settings in the order they were evaluated."""
    for conditional in (True, False):
        groups = {key: rows for key, rows in by_setting(run.rows).items() if key.conditional == conditional}
        metrics = [m for m in METRICS if any(m.key in row for rows in groups.values() for row in rows)]
        columns = [_column(groups, metric) for metric in metrics]
        lines = [
            {
                "label": label(roles, setting.stage),
                "sampling": setting.words(with_condition=False) or "training set, or the reference itself",
                "role": roles.get(setting.stage, "other"),
                "cells": [column[setting] for column in columns],
                "paper": counterpart(roles.get(setting.stage), setting),
                "samples": f"{rows[0]['num_samples']:,} × {len(rows)}",  # noqa: RUF001
            }
            for setting, rows in groups.items()
        ]
        if lines:
            yield {"conditional": conditional, "metrics": metrics, "rows": lines}


def _column(groups: dict[Setting, list[dict[str, Any]]], metric: Metric) -> dict[Setting, dict[str, Any]]:
    """A cell for each setting. The best mean of generated images is marked, where one end is the better one."""
    values = {setting: [row[metric.key] for row in rows if metric.key in row] for setting, rows in groups.items()}
    means = [mean(found) for setting, found in values.items() if found and setting.stage != REAL]
    best = None
    if means and metric.better:
        best = metric.show(min(means) if metric.better == "↓" else max(means))
    cells = {}
    for setting, found in values.items():
        shown = metric.show(mean(found)) if found else "–"  # noqa: RUF001
        spread = f"± {stdev(found) * metric.factor:.{metric.decimals}f}" if len(found) > 1 else ""
        cells[setting] = {"mean": shown, "spread": spread, "best": shown == best and setting.stage != REAL}
    return cells

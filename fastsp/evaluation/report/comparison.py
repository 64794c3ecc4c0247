"""Self-perceptual against its control over several seeds: means, intervals, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy import stats

from fastsp.evaluation.rows import Setting, by_setting

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval; `low` and `high` are nan for a single seed."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Self-perceptual minus control in one metric, at one setting.

    Attributes:
        setting: that of the self-perceptual rows; the control's differs in the stage alone.
        outcome: "better" or "worse" if the interval excludes zero, "undecided" if not or if there is one seed only.
    """

    metric: str
    setting: Setting
    self_perceptual: float
    control: float
    difference: Interval
    outcome: str


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
    them has is left out. Without guidance first, then guided, then without captions; else in the
    order of `rows`, so that the first step count configured leads.
    """
    groups = by_setting([row for row in rows if metric in row])
    comparisons = []
    for setting, ours in groups.items():
        if setting.stage != self_perceptual:
            continue
        theirs = {row["seed"]: row[metric] for row in groups.get(setting._replace(stage=control), [])}
        pairs = [(row[metric], theirs[row["seed"]]) for row in ours if row["seed"] in theirs]
        if pairs:
            comparisons.append(_comparison(metric, setting, pairs, smaller_is_better))
    return sorted(comparisons, key=lambda c: (not c.setting.conditional, c.setting.guidance != 0))


def _comparison(metric: str, setting: Setting, pairs: list[tuple[float, float]], smaller_is_better: bool) -> Comparison:
    difference = confidence_interval([ours - theirs for ours, theirs in pairs])
    outcome = "undecided"
    if difference.excludes_zero:
        outcome = "better" if (difference.mean < 0) == smaller_is_better else "worse"
    ours, theirs = (mean(pair[i] for pair in pairs) for i in (0, 1))
    return Comparison(metric, setting, ours, theirs, difference, outcome)

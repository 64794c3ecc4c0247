"""Rows of `evaluation.json`: what one says, how those of several seeds are summarised, and the verdict.

A row is one set of samples, one seed:

    stage            name of the stage, or "real" for training pictures scored like samples (the floor); in rows of
                     `fastsp eval` for the reference against itself, as in the paper
    conditional      true: sampled with captions; false: with the empty prompt
    guidance         scale of classifier-free guidance; 0: none
    rescale          phi of the rescale; 0: none
    steps            DDIM steps; 0 for "real"
    seed             of the initial noise and the choice of captions
    num_samples      pictures scored
    fid, inception_score, validity, precision, recall, coverage, nearest_train, memorised, caption_agreement
                     see `fastsp.evaluation.metrics`
    features         identity of the feature model
    seconds          wall clock of sampling and scoring

Rows of `fastsp eval` also say what they were made from: see `fastsp.evaluation.evaluate_models`.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats

CONFIDENCE = 0.95
REAL = "real"


class Setting(NamedTuple):
    """What a row was sampled with, the seed aside: rows of equal setting are repetitions of each other."""

    stage: str
    conditional: bool
    guidance: float
    rescale: float
    steps: int


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


def described(setting: Setting, seed: int) -> str:
    """A row in words, for progress and messages."""
    return ", ".join([setting.stage, *([how] if (how := sampling_words(setting)) else []), f"seed {seed}"])


def sampling_words(setting: Setting, with_condition: bool = True) -> str:
    """How the pictures were drawn, as in ``25 steps, guidance 7.5, rescale 0.7, unconditional``."""
    parts = [f"{setting.steps} steps"] if setting.steps else []
    parts += [f"guidance {setting.guidance:g}"] if setting.guidance else []
    parts += [f"rescale {setting.rescale:g}"] if setting.rescale else []
    parts += ["unconditional"] if with_condition and not setting.conditional else []
    return ", ".join(parts)


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row of `evaluation.json`."""
    return Setting(row["stage"], row.get("conditional", True), row["guidance"], row["rescale"], row["steps"])


def by_setting(rows: list[dict[str, Any]]) -> dict[Setting, list[dict[str, Any]]]:
    """Rows grouped by setting, in order of first appearance; each group by rising seed."""
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(setting_of(row), []).append(row)
    return {setting: sorted(group, key=lambda row: row["seed"]) for setting, group in groups.items()}


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

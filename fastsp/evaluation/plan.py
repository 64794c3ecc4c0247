"""Which rows an evaluation has: a pure function of the configuration."""

from collections.abc import Iterator
from typing import NamedTuple

from fastsp.config import Config
from fastsp.evaluation.rows import REAL, Setting
from fastsp.evaluation.settings import EvaluationSettings


class Planned(NamedTuple):
    """One row to be computed: a setting and a sampling seed."""

    setting: Setting
    seed: int


def plan(config: Config, evaluation: EvaluationSettings) -> list[Planned]:
    """All rows, setting by setting in the order of the report's tables, each setting over all seeds.

    The floor; every stage without guidance at each step count; the guided rows at the first one; then every stage with
    the empty prompt at the first one. A model trained without captions has the last kind alone.
    """
    return [Planned(setting, seed) for setting in _settings(config, evaluation) for seed in evaluation.seeds]


def _settings(config: Config, evaluation: EvaluationSettings) -> Iterator[Setting]:
    captioned = not config.data.unconditional
    stages = [stage.name for stage in config.stages]
    first = evaluation.steps[0]
    yield Setting(REAL, captioned, 0.0, 0.0, 0)
    if captioned:
        yield from (Setting(stage, True, 0.0, 0.0, steps) for steps in evaluation.steps for stage in stages)
        for guided in evaluation.guidance:
            chosen = stages if guided.stages is None else guided.stages
            yield from (Setting(stage, True, guided.scale, guided.rescale, first) for stage in chosen)
    if evaluation.unconditional or not captioned:
        yield from (Setting(stage, False, 0.0, 0.0, first) for stage in stages)

"""What an evaluation samples: a pure function of a run's configuration, or of `fastsp eval`'s options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastsp.config import Config
from fastsp.evaluation.rows import REAL, Setting


class Job(NamedTuple):
    """One row to be computed.

    Attributes:
        model: what :func:`fastsp.generation.generate.load_for_sampling` takes; empty for the real images.
        setting: how to sample it; its `stage` names the model in the row.
        seed: of the initial noise.
    """

    model: str
    setting: Setting
    seed: int


def plan(config: Config) -> list[Job]:
    """All rows of a run, setting by setting in the order of the report's tables, each setting over all seeds.

    The real images; every stage without guidance at each step count; the guided rows at the first one; then every stage
    with the empty prompt at the first one. A model trained without captions has the last kind alone.
    """
    folder = Path(config.run_dir) / "stages"
    return [
        Job("" if setting.stage == REAL else str(folder / setting.stage), setting, seed)
        for setting in _settings(config)
        for seed in config.evaluation.seeds
    ]


def _settings(config: Config) -> Iterator[Setting]:
    evaluation, captioned = config.evaluation, not config.data.unconditional
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


def combinations(
    models: Sequence[tuple[str, str]],
    steps: Sequence[int],
    guidance: Sequence[float],
    rescale: Sequence[float],
    seeds: Sequence[int],
    conditional: bool = True,
) -> Iterator[Job]:
    """Every combination, model by model. Rescale goes with guidance only.

    Args:
        models: what to load, and the name in the rows.
        steps: DDIM step counts.
        guidance: scales; 0 for none.
        rescale: phis, 0 for none.
        seeds: of the initial noise.
        conditional: False: with the empty prompt.
    """
    for model, stage in models:
        for count in steps:
            for scale in guidance:
                for phi in rescale if scale else [0.0]:
                    for seed in seeds:
                        yield Job(model, Setting(stage, conditional, float(scale), float(phi), count), seed)

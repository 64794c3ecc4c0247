"""Repetitions of a comparison: the run that holds them, and intervals over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsp.config import Config
from fastsp.errors import UserError
from fastsp.evaluation.repetitions import by_repetition, comparisons, markdown, on_bases, repeated
from fastsp.evaluation.rows import REAL, Row, plan

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "configs" / "photographs.yaml"
FORMS = ("mse_longer", "sp", "sp_normalized")


@pytest.fixture
def config() -> Config:
    return repeated(PHOTOGRAPHS, ["evaluation.guidance=[{scale: 2.0, stages: [mse, sp]}]"])


def test_repetitions_are_paired_and_see_different_samples(config: Config) -> None:
    names = [f"{form}_{number}" for number in range(3) for form in FORMS]
    assert [stage.name for stage in config.stages] == ["mse", *names]
    assert config.final == "sp_normalized_0" and all(stage.init == "mse" for stage in config.stages[1:])
    firsts = [config.first_position(config.stage(name)) for name in names]
    assert firsts[0] == firsts[1] == firsts[2] and firsts[3] - firsts[0] == 500 * 64
    assert set(firsts) == {firsts[0], firsts[3], firsts[6]}
    guided = {job.setting.stage for job in plan(config) if job.setting.guidance}
    assert guided == {"mse", "sp_0", "sp_1", "sp_2"}
    assert config.stage("sp_normalized_2").displacement == "normalized"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "forms"), [("photographs", 3), ("photographs-gpu", 5), ("photographs-critic", 4)])
def test_all_comparisons_can_be_repeated(name: str, forms: int) -> None:
    config = repeated(PHOTOGRAPHS.with_stem(name), repetitions=2)
    assert len(config.stages) == 1 + 2 * forms
    longer = {stage.name for stage in config.stages[1:] if stage.steps != config.stages[1].steps}
    assert longer == ({"mse_twice_0", "mse_twice_1"} if name == "photographs-critic" else set())


def rows(config: Config) -> list[Row]:
    """FID: control 10, 11, 12; published 10.5, 11, 11.5; normalized 9, 10, 11, each a half higher with seed 1."""
    fids = {"mse": [13.0], REAL: [2.0]} | {
        "mse_longer": [10.0, 11.0, 12.0],
        "sp": [10.5, 11.0, 11.5],
        "sp_normalized": [9.0, 10.01, 10.99],
    }
    found = []
    for job in plan(config):
        if job.setting.guidance or not job.setting.conditional or job.setting.steps not in (0, 25):
            continue
        form, _, number = job.setting.stage.rpartition("_")
        values = fids.get(job.setting.stage) or fids[form]
        for seed in (0, 1):
            fid = values[int(number) if number.isdecimal() else 0] + seed / 2
            found.append({**job.setting._asdict(), "seed": seed, "fid": fid})
    return found


def test_differences_are_paired_over_repetitions(config: Config) -> None:
    (sp, normalized) = comparisons(config, by_repetition(config, rows(config)))
    assert (sp.setting.stage, sp.seeds, sp.outcome) == ("sp", 3, "undecided")
    assert sp.difference == pytest.approx(0) and sp.interval == pytest.approx((-1.242, 1.242), abs=1e-3)
    assert (normalized.setting.stage, normalized.outcome) == ("sp_normalized", "better")
    assert normalized.difference == pytest.approx(-1) and normalized.interval[1] < -0.9
    assert normalized.control == pytest.approx(11.25), "the mean over both sampling seeds"
    assert {row["seed"] for row in by_repetition(config, rows(config)) if row["stage"] == "sp"} == {0, 1, 2}


def test_the_table(config: Config) -> None:
    head, _, *table = markdown([(config, rows(config))]).splitlines()
    assert head == "Real images that were trained on: FID 2.25."
    assert table[0] == "| metric | sampling | mse | mse_longer | sp | sp_normalized |"
    assert table[2:] == [
        "| FID ↓ | 25 steps | 13.25 | 11.25 | 11.25 (+0.00, −1.24 to +1.24) | 10.25 (**−1.00, −1.02 to −0.98**) |"  # noqa: RUF001
    ]
    unfinished = [row for row in rows(config) if row["stage"] != "sp_2"]
    assert markdown([(config, unfinished)]).splitlines()[4].split(" | ")[4:] == ["-", table[2].split(" | ")[5]]


def test_a_file_without_control_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "photographs.yaml"
    file.write_text(
        PHOTOGRAPHS.read_text().replace("mse_longer, objective: mse,", "other, objective: self_perceptual,")
    )
    with pytest.raises(UserError, match="a comparison needs a base, and stages that start from it, one of them of MSE"):
        repeated(file)


def test_each_base_is_a_run_of_its_own() -> None:
    runs = on_bases(PHOTOGRAPHS, ["seed=5", "run_dir=runs/of mine"], repetitions=1, bases=3)
    assert [run.seed for run in runs] == [5, 6, 7]
    assert [run.run_dir for run in runs] == [f"runs/of mine/seed_{seed}" for seed in (5, 6, 7)]
    assert [stage.name for stage in runs[2].stages] == ["mse", *(f"{form}_0" for form in FORMS)]
    assert on_bases(PHOTOGRAPHS, [], repetitions=3, bases=1) == [repeated(PHOTOGRAPHS)]


def test_differences_are_paired_over_bases(config: Config) -> None:
    """The second base is 3 higher throughout, and its published form another 0.4: a difference of 0.2 on average."""
    shifts = {"sp": 3.4}
    second = [{**row, "fid": row["fid"] + shifts.get(row["stage"].rpartition("_")[0], 3.0)} for row in rows(config)]
    head, _, *table = markdown([(config, rows(config)), (config, second)]).splitlines()
    assert head == "Real images that were trained on: FID 3.75."
    assert table[2:] == [
        "| FID ↓ | 25 steps | 14.75 | 12.75 | 12.95 (+0.20, −2.34 to +2.74) | 11.75 (**−1.00, −1.00 to −1.00**) |"  # noqa: RUF001
    ]
    unfinished = [row for row in second if row["stage"] != "sp_2"]
    cells = markdown([(config, rows(config)), (config, unfinished)]).splitlines()[4].split(" | ")
    assert cells[4] == "-" and cells[5] == table[2].split(" | ")[5]

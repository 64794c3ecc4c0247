"""The verdict's arithmetic, by hand, and its words."""

import math

import pytest
from evaluation.runs import row, rows, write_run

from fastsp.evaluation.report.tables import METRICS, compare, confidence_interval, find_roles, verdict
from fastsp.evaluation.rows import Job, Setting
from fastsp.evaluation.run_files import read_run


def test_interval_by_hand() -> None:
    """Mean 2, deviation 1, t(0.975, 2) = 4.302653: 2 +- 4.302653 / sqrt 3."""
    low, high = confidence_interval([1.0, 2.0, 3.0])
    assert high - 2.0 == pytest.approx(2.0 - low) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    assert all(map(math.isnan, confidence_interval([1.0])))


def paired(ours: list[float], theirs: list[float]) -> list[dict]:
    both = [row("sp", seed, value) for seed, value in enumerate(ours)]
    return both + [row("mse_longer", seed, value) for seed, value in enumerate(theirs)]


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        ([5.0, 5.2, 5.1], [6.0, 6.3, 6.1], "better"),
        ([6.0, 6.3, 6.1], [5.0, 5.2, 5.1], "worse"),
        ([5.0, 6.0, 5.5], [5.5, 5.2, 6.0], "undecided"),
        ([5.0], [6.0], "undecided"),
    ],
)
def test_outcome_follows_from_the_numbers(ours: list[float], theirs: list[float], outcome: str) -> None:
    (comparison,) = compare(paired(ours, theirs), "sp", "mse_longer")
    assert comparison.outcome == outcome


def test_seeds_are_paired() -> None:
    """A constant gain under a large common spread is seen only seed by seed."""
    (comparison,) = compare(paired([1.0, 5.0, 9.0], [1.5, 5.6, 9.4]), "sp", "mse_longer")
    assert comparison.outcome == "better" and comparison.difference == pytest.approx(-0.5)
    (partial,) = compare(paired([1.0, 5.0], [1.5, 5.6, 9.4]), "sp", "mse_longer")
    assert partial.seeds == 2


def test_larger_is_better_for_the_inception_score() -> None:
    fewer, more = compare(rows(sp=5, control=6), "sp", "mse_longer", METRICS[1])[:2]
    assert fewer.outcome == more.outcome == "better" and fewer.setting.steps < more.setting.steps


def test_guided_rows_are_compared_where_the_control_has_them() -> None:
    guided = {"guidance": 3.0, "rescale": 0.7}
    made = [row("sp", s, 6.0 + s / 10, **guided) for s in range(3)]
    assert not compare(made, "sp", "mse_longer")
    made += [row("mse_longer", s, 5.0 + s / 9, **guided) for s in range(3)] + paired([1.0, 2.0], [2.0, 2.9])
    plain, rescaled = compare(made, "sp", "mse_longer")
    assert (plain.setting.guidance, rescaled.setting.guidance, rescaled.outcome) == (0.0, 3.0, "worse")


def sentence(directory, evaluation: list[dict]) -> str:
    run = read_run(write_run(directory, evaluation=evaluation))
    return verdict(run, find_roles(run))[0]


def test_the_words_turn_with_the_numbers(tmp_path) -> None:
    better, worse = sentence(tmp_path / "a", rows(sp=5, control=6)), sentence(tmp_path / "b", rows(sp=6, control=5))
    assert "Self-perceptual is better" in better and "−0.97 (95 % interval −1.04 to −0.90) over 3 seeds" in better  # noqa: RUF001
    assert "Self-perceptual is worse" in worse and "worse in 6, undecided in 3" in worse
    assert "cannot tell the two apart" in sentence(tmp_path / "c", rows(sp=6, control=6))
    assert "no verdict" in sentence(tmp_path / "d", rows(seeds=1))
    assert "no scores" in sentence(tmp_path / "e", [])


def test_the_control_is_as_long_and_from_the_same_start(tmp_path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert find_roles(run) == {"real": "real", "mse": "base", "sp": "self_perceptual", "mse_longer": "control"}
    run.config = {**run.config, "stages": [*run.config["stages"][:2], {**run.config["stages"][2], "steps": 999}]}
    assert "control" not in find_roles(run).values()
    assert "no fair comparison" in verdict(run, find_roles(run))[0]


def test_rows_in_words() -> None:
    setting = Setting("sp", conditional=False, guidance=7.5, rescale=0.7, steps=25)
    assert setting.words() == "25 steps, guidance 7.5, rescale 0.7, unconditional"
    assert Job("", setting, 3).words() == "sp, 25 steps, guidance 7.5, rescale 0.7, unconditional, seed 3"
    assert Job("", Setting("real", True, 0.0, 0.0, 0), 0).words() == "real, seed 0"

"""The paper's tables as configurations: the stages, the rows, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.evaluation.reproduction import BASE, TABLES, compared, counterpart, table_config
from fastsp.evaluation.rows import Setting, plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASES = {"paper": CONFIGS / "sd21-paper.yaml", "small": CONFIGS / "digits.yaml"}


def varied(config: Config, key: str) -> list[str]:
    return [getattr(stage, key) for stage in config.stages[1:]]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("number", TABLES)
def test_a_run_has_the_rows_of_its_table(number: int, base: str) -> None:
    config, own = table_config(number, BASES[base]), load_config(BASES[base])
    planned = {job.setting for job in plan(config)}
    conditional = number != 2
    for entry in TABLES[number].entries:
        assert Setting(entry.stage, conditional, entry.guidance, entry.rescale, entry.steps) in planned
    assert config.run_dir == str(Path(own.run_dir).parent / "reproduce" / f"table{number}")
    assert all(stage.init == BASE for stage in config.stages[1:])
    template = next(stage for stage in own.stages if stage.objective == "self_perceptual")
    for stage in config.stages[1:]:
        assert (stage.steps, stage.learning_rate) == (template.steps, template.learning_rate)
    changed = ("run_dir", "stages", "final", "data", "evaluation")
    assert config.model_dump(exclude=set(changed)) == own.model_dump(exclude=set(changed))


def test_what_each_ablation_varies() -> None:
    tables = {number: table_config(number, BASES["paper"]) for number in TABLES}
    assert varied(tables[3], "layers") == ["encoder", "decoder", "encoder+mid", "mid"]
    assert varied(tables[4], "timestep_sampling") == ["offset", "normal", "uniform"]
    assert varied(tables[5], "distance") == ["mae", "mse"]
    assert varied(tables[6], "perceptual_network") == ["mse", "sp"]
    assert tables[2].data.unconditional and not tables[1].data.unconditional
    assert tables[1].evaluation.steps == [25, 50] and tables[7].evaluation.steps == [25]


def test_the_figures_are_those_of_the_report() -> None:
    """Both places have them from the paper; neither may drift."""
    roles = {"mse": "base", "sp": "self_perceptual"}
    for number in (1, 2, 7):
        for entry in TABLES[number].entries:
            setting = Setting(entry.stage, number != 2, entry.guidance, entry.rescale, entry.steps)
            reported = counterpart(roles[entry.stage], setting)
            assert reported is not None and (entry.fid, entry.inception_score) == reported[:2]


def test_means_over_seeds_beside_the_paper() -> None:
    row = {"stage": "sp", "guidance": 2.0, "rescale": 0.7, "steps": 25, "inception_score": 30.0}
    rows = [{**row, "seed": seed, "fid": 20.0 + seed} for seed in range(3)]
    (first, fid, score), *others = compared(7, rows)
    assert (first.label, first.fid, fid, score) == ("SP + CFG 2", 21.19, 21.0, 30.0)
    assert [(fid, score) for _, fid, score in others] == [(None, None)] * 3


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the paper has tables 1 to 7"):
        table_config(8, BASES["small"])
    sp, mse = "self_perceptual, init: mse, perceptual_network: mse", "mse, init: mse"
    (tmp_path / "mse.yaml").write_text(BASES["small"].read_text().replace(sp, mse))
    with pytest.raises(UserError, match="a table needs a first stage of MSE and a self-perceptual one"):
        table_config(1, tmp_path / "mse.yaml")
    assert table_config(1, BASES["small"], ["stages.1.steps=7"]).stages[1].steps == 7

"""`fastsp reproduce`: a table from its configuration to the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastsp.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "run_dir=run",
    *(f"stages.{index}.steps=2" for index in range(3)),
    "evaluation.num_samples=6",
    "evaluation.seeds=[0]",
    "samples.count=2",
    "samples.steps=2",
)


def test_the_plan_is_a_configuration(command, tmp_path: Path) -> None:
    file = tmp_path / "table4.yaml"
    file.write_text(command("reproduce", 4, "--config", ROOT / "configs" / "digits.yaml", "--plan", "seed=5"))
    config = load_config(file)
    assert config.seed == 5 and [stage.name for stage in config.stages] == [
        "mse",
        "sp_offset",
        "sp_normal",
        "sp_uniform",
    ]


@pytest.mark.slow
def test_a_small_table(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastsp.evaluation.classifier.STEPS", 20)
    arguments = ("reproduce", 6, "--config", ROOT / "configs" / "digits.yaml", *TINY)
    written = command(*arguments)
    table = written[written.index("Table 6") :]
    assert "MSE model" in table and "SP model" in table and "26.61" in table and " - " not in table
    assert (tmp_path / "run.yaml").is_file() and (tmp_path / "run" / "stages" / "sp_repeat").is_dir()
    assert command(*arguments)[-len(table) :] == table, "again: nothing is left to do"


@pytest.mark.slow
def test_small_photographs(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two folders to the table; again, nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastsp.evaluation.classifier.STEPS", 4)
    for folder in ("train", "heldout"):
        (tmp_path / folder).mkdir()
        for index in range(12):
            picture = Image.effect_noise((32, 32), 80).convert("RGB")
            picture.save(tmp_path / folder / f"{index}.png")
            (tmp_path / folder / f"{index}.txt").write_text(f"a photo of a {('cat', 'dog')[index % 2]}")
    arguments = (
        *("reproduce", "photographs", "--config", ROOT / "configs" / "photographs.yaml", "run_dir=run"),
        *(f"stages.{index}.steps=2" for index in range(4)),
        *("data.source=images", "data.path=train", "data.batch_size=4", "evaluation.heldout=heldout"),
        *("evaluation.num_samples=6", "evaluation.steps=[2]", "samples.count=2", "samples.steps=2"),
    )
    written = command(*arguments)
    table = (tmp_path / "run" / "comparison.md").read_text()
    assert table in written and "| metric | sampling | mse | mse_longer | sp | sp_normalized |" in table
    rows = [line for line in table.splitlines() if line.startswith("| FID")]
    assert len(rows) == 3 and all(line.count(" to ") == 2 for line in rows), "two forms against the control"
    assert (tmp_path / "run" / "stages" / "sp_normalized_2").is_dir()
    assert table in command(*arguments)

    written = command(*arguments, "--bases", 2, "--trainings", 1)
    table = (tmp_path / "run" / "comparison.md").read_text()
    assert table in written and sum(line.count(" to ") for line in table.splitlines() if "FID" in line) >= 6
    stages = ("mse", "mse_longer_0", "sp_0", "sp_normalized_0")
    for seed in (0, 1):
        assert {path.name for path in (tmp_path / "run" / f"seed_{seed}" / "stages").iterdir()} == set(stages)


def test_mistakes(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "table 8: the paper has tables 1 to 7" in fails("reproduce", 8)
    assert "--scale, --trainings and --bases are of 'photographs' alone" in fails("reproduce", 3, "--bases", 2)
    assert "table 'photos': allowed are 1 to 7, and photographs" in fails("reproduce", "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fastsp.evaluation.reproduction.__file__", str(tmp_path / "site-packages" / "fastsp" / "reproduction.py")
    )
    message = fails("reproduce", 1, "--small")
    assert "configuration file configs/digits.yaml is neither here nor in " in message
    assert "run this in a clone of the repository, install from one with pip install -e, or" in message


def test_no_configuration_of_the_user_is_replaced(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("run_dir: precious")
    message = fails("reproduce", 4, "--config", ROOT / "configs" / "digits.yaml", "run_dir=mine")
    assert "mine.yaml is there already, and fastsp reproduce did not write it" in message
    assert file.read_text() == "run_dir: precious"


def test_it_works_in_any_folder(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the repository's configuration; one that lies here comes first."""
    monkeypatch.chdir(tmp_path)
    assert command("reproduce", 1, "--small", "--plan").startswith("run_dir: runs/reproduce/table1\n")
    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "digits.yaml").read_text()
    (tmp_path / "configs" / "digits.yaml").write_text(text.replace("runs/digits", "mine/digits"))
    assert command("reproduce", 1, "--small", "--plan").startswith("run_dir: mine/reproduce/table1\n")

"""The evaluation of a run: its rows, its noise, and going on after a stop. The run is untrained, the rest is real."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastsp.config import Config, GuidanceConfig
from fastsp.errors import UserError
from fastsp.evaluation import evaluate
from fastsp.evaluation.evaluate import Evaluation, evaluate_run
from fastsp.evaluation.plan import Planned, plan
from fastsp.evaluation.report import write_report
from fastsp.evaluation.rows import Setting
from fastsp.models import TextToImageModel, digits_model

STAGES = ["mse", "sp"]


@dataclass(frozen=True)
class Settings:
    num_samples: int = 12
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    steps: list[int] = field(default_factory=lambda: [2, 3])
    guidance: list[GuidanceConfig] = field(default_factory=lambda: [GuidanceConfig(stages=["mse"], scale=2.0)])
    unconditional: bool = True
    batch_size: int = 8
    features: str = "classifier"
    heldout: str | None = None
    captions: str | None = None
    reference: str | None = None


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSP_CACHE", str(shared_cache))
    monkeypatch.setattr("fastsp.evaluation.classifier.STEPS", 20)  # its quality is not the question here


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of two stages with random weights, finished as far as its files tell."""
    for seed, stage in enumerate(STAGES):
        model = digits_model(resolution=8, seed=seed)
        torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)  # the stages are to differ
        model.unet.save_pretrained(tmp_path / "run" / "stages" / stage)
    model.save(tmp_path / "run" / "final")
    data = {"source": "digits", "resolution": 8, "batch_size": 32}
    stages = [{"name": name, "objective": "mse", "steps": 1, "learning_rate": 1e-3} for name in STAGES]
    return Config.model_validate(
        {"run_dir": str(tmp_path / "run"), "model": {"preset": "digits"}, "data": data, "stages": stages}
    )


def test_the_plan_by_hand(config: Config) -> None:
    settings = list(dict.fromkeys(planned.setting for planned in plan(config, Settings())))
    assert settings == [
        Setting("real", True, 0.0, 0.0, 0),
        *(Setting(stage, True, 0.0, 0.0, steps) for steps in (2, 3) for stage in STAGES),
        Setting("mse", True, 2.0, 0.0, 2),
        *(Setting(stage, False, 0.0, 0.0, 2) for stage in STAGES),
    ]
    assert len(plan(config, Settings())) == 2 * len(settings)
    config.data.unconditional = True
    assert all(not planned.setting.conditional for planned in plan(config, Settings()))


def test_every_row_is_written_and_twice_is_the_same(config: Config) -> None:
    rows = evaluate_run(config, Settings())
    path = Path(config.run_dir) / "evaluation.json"
    assert json.loads(path.read_text()) == rows and len(rows) == len(plan(config, Settings())) == 16
    assert {"fid", "inception_score", "validity", "precision", "recall", "coverage", "features"} <= rows[0].keys()
    assert "memorised" not in rows[0] and "memorised" in rows[2]
    assert "caption_agreement" in rows[2] and "caption_agreement" not in rows[-1]
    path.unlink()
    again = evaluate_run(config, Settings())
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert (Path(config.run_dir) / "environment.json").exists()


def test_an_interrupted_evaluation_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Planned] = []
    original = Evaluation.row

    def stop_after_three(self: Evaluation, planned: Planned) -> dict:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(planned)
        return original(self, planned)

    monkeypatch.setattr(Evaluation, "row", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(config, Settings())
    kept = json.loads((Path(config.run_dir) / "evaluation.json").read_text())
    assert len(kept) == 3

    def compute(self: Evaluation, planned: Planned) -> dict:
        assert planned not in computed
        return original(self, planned)

    monkeypatch.setattr(Evaluation, "row", compute)
    rows = evaluate_run(config, Settings())
    assert rows[:3] == kept and len(rows) == 16


def test_without_a_terminal_each_new_row_is_one_line(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    settings = replace(Settings(), seeds=[0], guidance=[GuidanceConfig(stages=["mse"], scale=2.0, rescale=0.7)])
    written = io.StringIO()
    rows = evaluate_run(config, settings, console=Console(file=written, width=40))
    *lines, note = written.getvalue().splitlines()
    assert note.startswith("evaluation: 12 pictures are fewer than the 64 features: FID comes out too high")
    assert len(lines) == len(rows) == 8
    assert lines[0].startswith("evaluation 1/8: real, seed 0  FID ")
    assert lines[5].startswith("evaluation 6/8: mse, 2 steps, guidance 2, rescale 0.7, seed 0  FID ")
    assert "Loading" not in capfd.readouterr().err
    evaluate_run(config, settings, console=Console(file=written))
    assert written.getvalue().splitlines() == [*lines, note]  # nothing was left to do


def test_rows_of_another_number_of_samples_are_made_anew(config: Config) -> None:
    settings = replace(Settings(), steps=[2], seeds=[0], guidance=[], unconditional=False)
    evaluate_run(config, settings)
    rows = evaluate_run(config, replace(settings, num_samples=13))
    assert len(rows) == 3 and all(row["num_samples"] == 13 for row in rows)
    assert json.loads((Path(config.run_dir) / "evaluation.json").read_text()) == rows


def test_rows_that_fastsp_eval_added_stay(config: Config) -> None:
    path = Path(config.run_dir) / "evaluation.json"
    added = {**Setting("sp", True, 0.0, 0.0, 2)._asdict(), "seed": 0, "num_samples": 9, "features": "inception-1"}
    path.write_text(json.dumps([{**added, "reference": "val2014"}]))
    settings = replace(Settings(), steps=[2], seeds=[0], guidance=[], unconditional=False)
    rows = evaluate_run(config, settings)
    assert json.loads(path.read_text()) == [*rows, {**added, "reference": "val2014"}]


def pictures(config: Config, **changes: object) -> dict[Setting, torch.Tensor]:
    evaluation = Evaluation(config, replace(Settings(), **changes), torch.device("cpu"))
    chosen = [Planned(Setting(stage, True, 0.0, 0.0, 2), 0) for stage in STAGES]
    return {planned.setting: evaluation.pictures(planned).images for planned in chosen}


def test_noise_depends_on_neither_batch_size_nor_stage(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler is replaced by one that returns its noise: bit for bit the same; but another seed has another."""
    seen: list[list[str]] = []

    def identity(self: TextToImageModel, prompts: list[str], noise: torch.Tensor, *_: object) -> Iterator[Any]:
        seen.append(prompts)
        yield noise, noise

    monkeypatch.setattr(TextToImageModel, "sample", identity)
    monkeypatch.setattr(TextToImageModel, "decode", lambda self, latents: latents)
    (first, other_stage), (parts, _) = (pictures(config, batch_size=size).values() for size in (12, 5))
    assert torch.equal(first, parts) and torch.equal(first, other_stage)
    assert seen[0] == seen[1] == seen[2] + seen[3] + seen[4] and len(set(seen[0])) > 3
    evaluation = Evaluation(config, Settings(), torch.device("cpu"))
    other_seed = evaluation.pictures(Planned(Setting("sp", True, 0.0, 0.0, 2), 1)).images
    assert not torch.equal(first, other_seed)


def test_samples_do_not_depend_on_the_batch_size(config: Config) -> None:
    whole, parts = pictures(config, batch_size=12), pictures(config, batch_size=5)
    for setting, images in whole.items():
        assert torch.allclose(images, parts[setting], atol=1e-4), setting
    assert not torch.allclose(*whole.values(), atol=1e-2)  # the stages differ, so their weights were used


def test_captions_run_through_the_held_out_ones(config: Config) -> None:
    evaluation = Evaluation(config, replace(Settings(), num_samples=1000), torch.device("cpu"))
    captions, size = evaluation.captions(0), len(evaluation.heldout)
    assert sorted(captions[:size]) == sorted(evaluation.heldout.captions) and captions[size:] == captions[: 1000 - size]
    assert captions != evaluation.captions(1)


def test_unfinished_runs_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(Path(config.run_dir) / "stages" / "sp")
    monkeypatch.setattr(evaluate, "plan", lambda *_: [Planned(Setting("sp", True, 0.0, 0.0, 2), 0)])
    with pytest.raises(UserError, match="lacks stages/sp; train that stage first"):
        evaluate_run(config, Settings())
    shutil.rmtree(Path(config.run_dir) / "final")
    with pytest.raises(UserError, match="holds no finished run: it has no final/"):
        evaluate_run(config, Settings())


def test_other_data_needs_a_heldout_path(config: Config) -> None:
    config.data.source, config.data.path = "images", str(Path(config.run_dir))
    with pytest.raises(UserError, match=r"evaluation\.heldout is missing; data\.source=images has no held-out split"):
        Evaluation(config, Settings(), torch.device("cpu"))


def test_absent_files_are_named_in_one_line(config: Config) -> None:
    """A run on a machine without COCO ends well, and without `evaluation.json`."""
    written = io.StringIO()
    settings = replace(Settings(), captions="/nowhere/captions_val2014.json", features="/nowhere/inception.safetensors")
    assert evaluate_run(config, settings, console=Console(file=written, width=40)) == []
    assert written.getvalue() == (
        "evaluation skipped: evaluation.captions /nowhere/captions_val2014.json, evaluation.features "
        "/nowhere/inception.safetensors is not there; fastsp eval does it later\n"
    )
    assert not (Path(config.run_dir) / "evaluation.json").exists()


def test_captions_from_a_file(config: Config, tmp_path: Path) -> None:
    """A run whose data has no classifier of its own is evaluated as by `fastsp eval`, and reported."""
    (tmp_path / "captions.txt").write_text("a handwritten one\na handwritten two\n" * 4)
    written = io.StringIO()
    settings = replace(Settings(), num_samples=8, seeds=[0], steps=[2], captions=str(tmp_path / "captions.txt"))
    rows = evaluate_run(config, settings, console=Console(file=written, width=40))
    names = [(row["stage"], row["conditional"], row["guidance"]) for row in rows]
    assert names == [
        ("real", True, 0.0),
        ("mse", True, 0.0),
        ("mse", True, 2.0),
        ("mse", False, 0.0),
        ("sp", True, 0.0),
        ("sp", False, 0.0),
    ]
    assert written.getvalue().splitlines()[1].startswith("evaluation: mse, 2 steps, seed 0: FID ")
    assert json.loads((Path(config.run_dir) / "evaluation.json").read_text()) == rows
    (Path(config.run_dir) / "config.yaml").write_text(config.dump())
    assert write_report(Path(config.run_dir)).is_file()
    assert evaluate_run(config, settings, console=Console(file=written)) == rows

"""The evaluation of a run: its rows, its noise, and going on after a stop. The run is untrained, the rest is real."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import picture_folder, tiny_clip, tiny_clip_folder

from fastsp.config import Config, EvaluationConfig, GuidanceConfig
from fastsp.errors import UserError
from fastsp.evaluation import run as run_module
from fastsp.evaluation.clip import load_clip
from fastsp.evaluation.engine import Evaluation
from fastsp.evaluation.features import Features
from fastsp.evaluation.reference import Reference, still_source
from fastsp.evaluation.report import write_report
from fastsp.evaluation.rows import Job, Setting, plan
from fastsp.evaluation.run import check_evaluation, evaluate_run
from fastsp.models import TextToImageModel, digits_model

STAGES = ["mse", "sp"]
SMALL = EvaluationConfig(
    num_samples=12, seeds=[0, 1], steps=[2, 3], guidance=[GuidanceConfig(stages=["mse"], scale=2.0)], batch_size=8
)
LEAST = {"steps": [2], "seeds": [0], "guidance": [], "unconditional": False}


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
        torch.nn.init.normal_(model.network.conv_out.weight, std=0.1)  # the stages are to differ
        model.network.save_pretrained(tmp_path / "run" / "stages" / stage)
    model.save(tmp_path / "run" / "final")
    data = {"source": "digits", "resolution": 8, "batch_size": 32}
    stages = [{"name": name, "objective": "mse", "steps": 1, "learning_rate": 1e-3} for name in STAGES]
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"preset": "digits"},
            "data": data,
            "stages": stages,
            "evaluation": SMALL.model_dump(),
        }
    )


def with_settings(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})


def test_the_plan_by_hand(config: Config) -> None:
    settings = list(dict.fromkeys(job.setting for job in plan(config)))
    assert settings == [
        Setting("real", True, 0.0, 0.0, 0),
        *(Setting(stage, True, 0.0, 0.0, steps) for steps in (2, 3) for stage in STAGES),
        Setting("mse", True, 2.0, 0.0, 2),
        *(Setting(stage, False, 0.0, 0.0, 2) for stage in STAGES),
    ]
    assert len(plan(config)) == 2 * len(settings)
    config.data.unconditional = True
    assert all(not job.setting.conditional for job in plan(config))


def test_every_row_is_written_in_the_order_of_the_plan_and_twice_is_the_same(config: Config) -> None:
    rows = evaluate_run(config)
    path = Path(config.run_dir) / "evaluation.json"
    assert json.loads(path.read_text()) == rows and len(rows) == len(plan(config)) == 16
    assert [(row["stage"], row["steps"], row["seed"]) for row in rows] == [
        (job.setting.stage, job.setting.steps, job.seed) for job in plan(config)
    ]
    assert {"fid", "inception_score", "validity", "precision", "recall", "coverage", "features"} <= rows[0].keys()
    assert "memorised" not in rows[0] and "memorised" in rows[2]
    assert "caption_agreement" in rows[2] and "caption_agreement" not in rows[-1]
    assert not (Path(config.run_dir) / "evaluation").exists(), "what was kept of unfinished rows is gone"
    path.unlink()
    again = evaluate_run(config)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert (Path(config.run_dir) / "environment.json").exists()


def test_an_interrupted_evaluation_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Job] = []
    original = Evaluation._row

    def stop_after_three(self: Evaluation, row: dict, job: Job, *rest: object) -> dict:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(job)
        return original(self, row, job, *rest)

    monkeypatch.setattr(Evaluation, "_row", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(config)
    kept = json.loads((Path(config.run_dir) / "evaluation.json").read_text())
    assert len(kept) == 2 + 3

    def compute(self: Evaluation, row: dict, job: Job, *rest: object) -> dict:
        assert job not in computed
        return original(self, row, job, *rest)

    monkeypatch.setattr(Evaluation, "_row", compute)
    rows = evaluate_run(config)
    assert len(rows) == 16 and all(row in rows for row in kept)


def test_without_a_terminal_what_is_done_and_each_new_row_is_a_line(
    config: Config, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "empty"))  # so that the classifier is trained
    guidance = [GuidanceConfig(stages=["mse"], scale=2.0, rescale=0.7)]
    config = with_settings(config, seeds=[0], guidance=guidance)
    written = io.StringIO()
    rows = evaluate_run(config, Console(file=written, width=40))
    first, *lines, note = written.getvalue().splitlines()
    assert first == f"evaluation: 8 rows, into {config.run_dir}/evaluation.json"
    assert lines[0].startswith("evaluation: looking at ") and "evaluation: training the classifier" in lines
    lines = [line for line in lines if "FID" in line]
    assert note.startswith("evaluation: 12 images are fewer than the 64 features: FID comes out too high")
    assert len(lines) == len(rows) == 8
    assert lines[0].startswith("evaluation: real images: FID ")
    assert lines[3].startswith("evaluation: mse, 2 steps, guidance 2, rescale 0.7, seed 0: FID ")
    assert "Loading" not in capfd.readouterr().err
    evaluate_run(config, Console(file=written))
    assert written.getvalue().count("FID") == 8 + 1, "nothing was left to do"


def test_rows_that_cannot_be_compared_any_more_are_made_anew(config: Config) -> None:
    """Of another number of samples, of a stage that was trained on, of a version that named no reference."""
    path = Path(config.run_dir) / "evaluation.json"
    of_old = {**Setting("sp", True, 0.0, 0.0, 50)._asdict(), "seed": 9, "num_samples": 12, "features": "classifier-0"}
    path.write_text(json.dumps([of_old]))
    config = with_settings(config, **LEAST)
    evaluate_run(config)
    config.evaluation.num_samples = 13
    rows = evaluate_run(config)
    assert [row["num_samples"] for row in rows] == [13] * 3
    model = digits_model(resolution=8, seed=7)
    torch.nn.init.normal_(model.network.conv_out.weight, std=0.1)
    model.network.save_pretrained(Path(config.run_dir) / "stages" / "sp")
    again = evaluate_run(config)
    assert again[:2] == rows[:2] and len(again) == 3 and again[2]["fid"] != rows[2]["fid"]
    assert json.loads(path.read_text()) == again


def test_rows_that_fastsp_eval_added_stay(config: Config) -> None:
    path = Path(config.run_dir) / "evaluation.json"
    setting = Setting("sp", True, 0.0, 0.0, 2)._asdict()
    added = {**setting, "seed": 0, "num_samples": 9, "features": "inception-1", "reference": "val2014"}
    path.write_text(json.dumps([added]))
    rows = evaluate_run(with_settings(config, **LEAST))
    assert rows[-1] == added and [row["stage"] for row in rows] == ["real", "mse", "sp", "sp"]


def test_clip_scores(config: Config, tmp_path: Path) -> None:
    """Of samples, and of the held-out images whose captions a seed samples; rows of another CLIP go."""
    clips = [tiny_clip_folder(tmp_path / f"clip{seed}", tiny_clip(seed)) for seed in (4, 5)]
    settings = {**LEAST, "unconditional": True, "seeds": [0, 1], "clip": str(clips[0])}
    rows = evaluate_run(with_settings(config, **settings))
    scorer = load_clip(clips[0])
    captioned = [row for row in rows if row["conditional"]]
    assert len(captioned) == 6 and {row["clip"] for row in captioned} == {scorer.identity}
    assert len({row["clip_score"] for row in captioned}) == 6
    assert not any("clip" in row or "clip_score" in row for row in rows if not row["conditional"])
    source = still_source(config.data.model_copy(update={"split": "heldout"}), 1)
    (batch,) = source.batches(last_position=len(source), batch_size=len(source))
    scores = scorer.scores(scorer.extract(batch.pixel_values).features, batch.captions)
    for row in rows[:2]:
        chosen = scores[torch.randperm(len(source), generator=torch.Generator().manual_seed(row["seed"]))[:12]]
        assert row["stage"] == "real" and row["clip_score"] == pytest.approx(chosen.mean().item(), abs=1e-4)
    (Path(config.run_dir) / "config.yaml").write_text(config.dump())
    mean = sum(row["clip_score"] for row in rows[:2]) / 2
    page = write_report(Path(config.run_dir)).read_text()
    assert "CLIP score ↑" in page and f"{mean:.2f}" in page
    assert evaluate_run(with_settings(config, **settings | {"clip": None})) == rows, "they have all that is asked for"
    again = evaluate_run(with_settings(config, **settings | {"clip": str(clips[1]), "seeds": [0]}))
    assert [row["fid"] for row in again if row["seed"] == 0] == [row["fid"] for row in rows if row["seed"] == 0]
    assert {row.get("clip") for row in again} == {None, load_clip(clips[1]).identity}
    assert [row["conditional"] for row in again if row["seed"] == 1] == [False, False], "those have no CLIP score"


def test_what_is_no_clip_is_said_before_the_training(config: Config, tmp_path: Path) -> None:
    absent = with_settings(config, clip=str(tmp_path / "nowhere"))
    assert f"evaluation.clip {tmp_path}/nowhere is not there: unless it comes" in (check_evaluation(absent) or "")
    with pytest.raises(UserError, match=r"final: its config\.json is missing, or of another kind of model"):
        check_evaluation(with_settings(config, clip=f"{config.run_dir}/final"))
    assert check_evaluation(with_settings(config, clip=str(tiny_clip_folder(tmp_path / "clip")))) is None


def test_noise_and_captions_depend_on_the_seed_alone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On neither batch size nor stage, bit for bit. The sampler is replaced by one that returns its noise."""
    seen: list[tuple[list[str], torch.Tensor]] = []

    def identity(
        self: TextToImageModel, prompts: list[str], noise: torch.Tensor, steps: int, *_: object
    ) -> Iterator[Any]:
        seen.append((prompts, noise))
        yield from [(noise, noise)] * steps

    monkeypatch.setattr(TextToImageModel, "sample", identity)

    def sampled(batch_size: int, seed: int) -> list[tuple[list[str], torch.Tensor]]:
        seen.clear()
        (Path(config.run_dir) / "evaluation.json").unlink(missing_ok=True)
        evaluate_run(with_settings(config, **{**LEAST, "seeds": [seed], "batch_size": batch_size}))
        per_stage = -(-12 // batch_size)
        parts = [seen[start : start + per_stage] for start in (0, per_stage)]
        return [([p for ps, _ in part for p in ps], torch.cat([noise for _, noise in part])) for part in parts]

    first, other_stage = sampled(12, 0)
    parts, _ = sampled(5, 0)
    other_seed, _ = sampled(12, 1)
    assert torch.equal(first[1], parts[1]) and torch.equal(first[1], other_stage[1])
    assert first[0] == parts[0] == other_stage[0] and len(set(first[0])) > 3
    assert not torch.equal(first[1], other_seed[1]) and first[0] != other_seed[0]


def test_figures_do_not_depend_on_the_batch_size(config: Config) -> None:
    whole = evaluate_run(with_settings(config, **LEAST))
    (Path(config.run_dir) / "evaluation.json").unlink()
    parts = evaluate_run(with_settings(config, **LEAST, batch_size=5))
    for one, other in zip(whole, parts, strict=True):
        assert one["fid"] == pytest.approx(other["fid"], rel=1e-4)
    assert whole[1]["fid"] != pytest.approx(whole[2]["fid"], rel=1e-2), "the stages' own weights were used"


def test_captions_run_through_the_held_out_ones() -> None:
    heldout = [f"caption {index}" for index in range(300)]
    seen = Features(torch.zeros(300, 1), torch.zeros(300, 1), heldout)
    reference = Reference(torch.zeros(1), torch.zeros(1, 1), 300, 1.0, "", "", heldout=seen)
    captions = run_module._captions_of(reference, 1000, 0).texts
    assert sorted(captions[:300]) == sorted(heldout) and captions[300:600] == captions[:300] != heldout
    assert captions != run_module._captions_of(reference, 1000, 1).texts


def test_unfinished_runs_are_refused(config: Config) -> None:
    shutil.rmtree(Path(config.run_dir) / "stages" / "sp")
    with pytest.raises(UserError, match="the run has not finished that stage; finished: mse"):
        evaluate_run(config)
    shutil.rmtree(Path(config.run_dir) / "final")
    with pytest.raises(UserError, match="holds no finished run: it has no final/"):
        evaluate_run(config)


# Before the training


def photographs(tmp_path: Path, captions: int, **evaluation: object) -> Config:
    """A run on images, 130 of them, with so many distinct captions."""
    for name, count in (("train", 130), ("heldout", 5)):
        folder = picture_folder(tmp_path / name, count)
        for index in range(count):
            (folder / f"{index:03d}.txt").write_text(f"caption {index % captions}" if captions else "")
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"pretrained": "somebody/something"},
            "data": {"source": "images", "path": str(tmp_path / "train"), "resolution": 512, "batch_size": 2},
            "stages": [{"name": "mse", "objective": "mse", "steps": 1, "learning_rate": 1e-3}],
            "evaluation": evaluation,
        }
    )


def test_images_of_ones_own_need_no_evaluation(tmp_path: Path, config: Config) -> None:
    """The least configuration trains, and a line says why there will be no scores; asked for, it is an error."""
    least = photographs(tmp_path, 2)
    assert least.evaluation.enabled is False and "enabled: false" in least.dump()
    assert "evaluation: off; it needs evaluation.heldout, or" in (check_evaluation(least) or "")
    with pytest.raises(UserError, match=r"evaluation\.heldout is missing; data\.source=images has no held-out split"):
        check_evaluation(with_settings(least, enabled=True))
    heldout = least.model_dump() | {"evaluation": {"heldout": str(tmp_path / "heldout")}}
    assert Config.model_validate(heldout).evaluation.enabled is True
    assert check_evaluation(Config.model_validate(heldout)) is None
    digits = config.model_dump() | {"evaluation": {}}
    assert Config.model_validate(digits).evaluation.enabled is True


@pytest.mark.parametrize(
    ("captions", "changes", "message"),
    [
        (130, {}, "evaluation.features=classifier: the data has more than 100 distinct captions; allowed: 2 to 100"),
        (1, {}, "evaluation.features=classifier: the data has 1 distinct captions; allowed: 2 to 100"),
        (2, {"num_samples": 3}, "evaluation.num_samples=3; allowed: at least 4"),
        (2, {"heldout": "nowhere"}, "evaluation.heldout is 'nowhere'"),
        (2, {"features": "{tmp}/train/000.txt"}, "train/000.txt: not a safetensors file"),
    ],
)
def test_what_photographs_lack_is_said_before_the_training(
    tmp_path: Path, captions: int, changes: dict[str, Any], message: str
) -> None:
    changes = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    config = photographs(tmp_path, captions, **{"heldout": str(tmp_path / "heldout"), **changes})
    with pytest.raises(UserError) as caught:
        check_evaluation(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_inceptions_weights_goes_with_any_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_inception", lambda path: SimpleNamespace(identity=str(path)))
    weights = tmp_path / "inception.safetensors"
    weights.touch()
    config = photographs(tmp_path, 130, heldout=str(tmp_path / "heldout"), features=str(weights))
    assert check_evaluation(config) is None


def test_absent_files_are_named_in_one_line(config: Config) -> None:
    """A run on a machine without COCO ends well, and without `evaluation.json`."""
    written = io.StringIO()
    config = with_settings(config, captions="/nowhere/captions_val2014.json", features="/nowhere/inception.safetensors")
    assert "unless it comes, the evaluation after the training is skipped" in (check_evaluation(config) or "")
    assert evaluate_run(config, Console(file=written, width=40)) == []
    assert written.getvalue() == (
        "evaluation skipped: evaluation.captions /nowhere/captions_val2014.json, evaluation.features "
        "/nowhere/inception.safetensors is not there; fastsp eval does it later\n"
    )
    assert not (Path(config.run_dir) / "evaluation.json").exists()


def test_captions_from_a_file(config: Config, tmp_path: Path) -> None:
    """As by `fastsp eval`, and reported."""
    (tmp_path / "captions.txt").write_text("a handwritten one\na handwritten two\n" * 4)
    written = io.StringIO()
    config = with_settings(config, num_samples=8, steps=[2], captions=str(tmp_path / "captions.txt"))
    rows = evaluate_run(config, Console(file=written, width=40))
    names = [(row["stage"], row["conditional"], row["guidance"], row["seed"]) for row in rows]
    assert names[:4] == [
        ("real", True, 0.0, 0),
        ("mse", True, 0.0, 0),
        ("mse", True, 0.0, 1),
        ("mse", True, 2.0, 0),
    ]
    assert len(names) == 1 + 2 * 5
    assert "evaluation: mse, 2 steps, seed 0: FID " in written.getvalue()
    assert json.loads((Path(config.run_dir) / "evaluation.json").read_text()) == rows
    (Path(config.run_dir) / "config.yaml").write_text(config.dump())
    assert write_report(Path(config.run_dir)).is_file()
    assert evaluate_run(config, Console(file=written)) == rows

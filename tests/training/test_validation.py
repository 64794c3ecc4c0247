"""The validation loss: on fixed draws, the same at any number of processes and after a resume, and without effect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.processes import ROOT, metrics
from training.test_distributed import launch

from fastsp.config import load_config
from fastsp.data.config import DataConfig
from fastsp.data.source import open_source
from fastsp.diffusion import draws
from fastsp.errors import UserError
from fastsp.evaluation.report import write_report
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss
from fastsp.models import network_of
from fastsp.models.presets import preset_model
from fastsp.training.distributed import Ranks
from fastsp.training.step import TrainingStep
from fastsp.training.trainer import train
from fastsp.training.validation import FIRST_POSITION, SEED, Stratified, Validation

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SAMPLES = 30
OVERRIDES = [
    "data.batch_size=8",
    "stages=[{name: mse, objective: mse, steps: 5, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 4, learning_rate: 1e-4}]",
    *("optimizer.warmup_steps=0", "final=sp", "checkpoint={every: 2, keep: 9}", "log.every=1"),
    *("samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}", "evaluation.enabled=false"),
]
VALIDATION = f"validation={{every: 2, samples: {SAMPLES}, batch_size: 8}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("validation") / "run"
    train(load_config(QUICKSTART, [f"run_dir={run}", *OVERRIDES, VALIDATION]))
    return run


def validations(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(run) if "validation_mse" in row]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def test_every_so_many_steps_and_at_both_ends_of_a_stage(run):
    rows = validations(run)
    assert [(row["stage"], row["step"], row["global_step"]) for row in rows] == [
        *(("mse", 0, 0), ("mse", 2, 2), ("mse", 4, 4), ("mse", 5, 5)),
        *(("sp", 0, 5), ("sp", 2, 7), ("sp", 4, 9)),
    ]
    assert ["validation_self_perceptual" in row for row in rows] == [False] * 4 + [True] * 3
    assert rows[3]["validation_mse"] < rows[0]["validation_mse"]
    assert rows[4]["validation_mse"] == rows[3]["validation_mse"], "the stage starts from that average"


def test_the_losses_are_those_of_the_drop_in_losses(run):
    """On the held-out digits, with the draws written down by hand."""
    data = DataConfig(source="digits", split="heldout", resolution=8, batch_size=1)
    model = preset_model("digits", 8, 0)
    source = open_source(data, tokenizer=model.tokenizer, channels=1, seed=0, shuffle=False)
    source.order = lambda positions: positions * len(source) // SAMPLES
    batch = next(iter(source.batches(last_position=SAMPLES, batch_size=SAMPLES)))
    indices = torch.arange(SAMPLES)
    t, t_prime = (
        Stratified(stream, indices, SAMPLES).integers(1000)
        for stream in (draws.Stream.TIMESTEP, draws.Stream.PERCEPTUAL_TIMESTEP)
    )
    latents = batch.pixel_values
    noise = draws.random_normals(SEED, draws.Stream.NOISE, FIRST_POSITION + indices, latents.shape[1:])
    noisy = model.scheduler.add_noise(latents, noise, t)
    mse, sp = (network_of(run / "stages" / name).eval() for name in ("mse", "sp"))
    text = model.encode_ids(batch.input_ids).encoder_hidden_states
    with torch.no_grad():
        arguments = (sp(noisy, t, text).sample, latents, noise, t, text)
        perceptual = SelfPerceptualLoss(mse, model.scheduler)(*arguments, perceptual_timesteps=t_prime)
        plain = DenoisingLoss(model.scheduler)(*arguments)
    last = validations(run)[-1]
    assert last["validation_self_perceptual"] == pytest.approx(perceptual.item(), rel=1e-4)
    assert last["validation_mse"] == pytest.approx(plain.item(), rel=1e-4)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_draws_are_stratified(count):
    """One in each share of the distribution, in no order, and whatever the batch."""
    times, others = (Stratified(draws.Stream(number), torch.arange(count), count) for number in (0, 1))
    assert sorted((times.uniforms() * count).long().tolist()) == list(range(count))
    if count > 1:
        assert times.uniforms().argsort().tolist() not in (list(range(count)), others.uniforms().argsort().tolist())
    assert torch.equal(times.integers(1000), (times.uniforms().double() * 1000).long())
    assert torch.equal(Stratified(draws.Stream(0), torch.tensor([count - 1]), count).uniforms(), times.uniforms()[-1:])
    if count == 64:
        assert abs(times.normals().mean()) < 0.05 and times.normals().std() == pytest.approx(1, abs=0.1)


def test_it_changes_nothing(run, tmp_path):
    train(load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *OVERRIDES]))
    assert losses(tmp_path / "run") == losses(run)


@pytest.mark.parametrize("reached", [4, 5, 7])
def test_after_a_resume_it_is_the_same(run, tmp_path, reached):
    """In the middle of a stage, and between two, where the start of the next one is in the metrics already."""
    resumed = tmp_path / "run"
    unfinished = ["mse", "sp"] if reached < 5 else ["sp"]
    shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("final", ".lock", *unfinished))
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name[5:]) > reached:
            shutil.rmtree(folder)
    train(load_config(QUICKSTART, [f"run_dir={resumed}", *OVERRIDES, VALIDATION]), resume=True)
    assert validations(resumed) == validations(run)


class Half(Ranks):
    """One of two processes: the second gets what the first has found."""

    def exchange(self, values: Any) -> torch.Tensor:
        self.others.append(values)
        return torch.tensor([self.others[0], self.others[-1]])


@pytest.mark.parametrize("samples", [SAMPLES, 3])
def test_two_processes_see_what_one_sees(tmp_path, monkeypatch, samples):
    """Bit for bit, the same weights given."""
    whole, halves = [], []
    losses = Validation.losses

    def compare(self: Validation, step: TrainingStep, average: Any) -> dict[str, float]:
        whole.append(losses(self, step, average))
        others: list[Any] = []
        for rank in (0, 1):
            ranks = Half(rank, 2)
            object.__setattr__(ranks, "others", others)
            figures = losses(Validation(self.config, self.source, ranks), step, average)
        halves.append(figures)
        return figures

    monkeypatch.setattr(Validation, "losses", compare)
    few = f"validation={{every: 2, samples: {samples}, batch_size: 8}}"
    train(load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *OVERRIDES, few]))
    assert halves == whole and len(whole) == 7


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_real_processes(run, tmp_path, distributed):
    overrides = [f"run_dir={tmp_path / 'run'}", *OVERRIDES, VALIDATION, f"distributed={distributed}"]
    launch(2, tmp_path, {"overrides": overrides, "seen": str(tmp_path / "seen")})
    ours, theirs = validations(tmp_path / "run"), validations(run)
    if distributed == "ddp":  # shards lie in another memory format, which rounds otherwise
        assert ours[0] == theirs[0], "before the first step the weights are the same"
    assert ours[0]["validation_mse"] == pytest.approx(theirs[0]["validation_mse"], rel=1e-6)
    for name in ("validation_mse", "validation_self_perceptual"):
        figures, expected = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        assert figures == pytest.approx(expected, rel=1e-3)


def test_where_it_is_shown(run):
    page = write_report(run).read_text()
    assert page.count("Validation of ") == 3 and "self-perceptual over its steps" in page
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"validation/mse", "validation/self_perceptual"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation/mse")] == [0, 2, 4, 5, 5, 7, 9]


def test_what_is_refused(tmp_path):
    sd15 = ROOT / "configs" / "sd15.yaml"
    with pytest.raises(UserError, match=r"validation\.path: is missing: held-out data of the same kind"):
        load_config(sd15, ["validation.every=5"])
    config = load_config(sd15, ["validation.every=5", "evaluation.heldout=there", f"run_dir={tmp_path / 'run'}"])
    assert config.validation_data is not None and config.validation_data.path == "there"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="'there'"):
        train(config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "pictures")})}))

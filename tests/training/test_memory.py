"""What a run needs, counted: against what PyTorch allocates on a CPU, and against the sizes of published models."""

from __future__ import annotations

import json
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import tiny_flow_pipeline, tiny_pixart
from transformers import T5TokenizerFast
from typer.testing import CliRunner

from fastsp.cli import app
from fastsp.config import load_config
from fastsp.errors import UserError
from fastsp.generation.checkpoints import initial_model
from fastsp.models.published import PUBLISHED
from fastsp.models.skeleton import skeleton
from fastsp.training import memory
from fastsp.training.memory import ACTIVATIONS, Allocations, fused_attention, needs, skeleton_of
from fastsp.training.update import update_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_while_they_live(device):
    given = torch.ones(1000, device=device)
    with Allocations() as seen:
        view = given.view(10, 100).t()  # no storage of its own
        given.add_(1)
        assert (seen.now, seen.most) == (0, 0)
        one = given * 2  # 4,000 bytes: 8 blocks
        two = one[:1].clone()
        assert seen.now == seen.most == 4096 + 512
        del one
        assert (seen.now, seen.most) == (512, 4096 + 512)
        seen.mark()
        del two
        assert (seen.now, seen.most) == (0, 512)
    assert view.shape == (100, 10)


def test_attention_is_counted_without_its_matrix():
    q = torch.zeros(1, 2, 512, 8, device="meta", requires_grad=True)
    mask = torch.zeros(1, 1, 1, 512, dtype=torch.bool, device="meta")
    for given in ({}, {"attn_mask": mask}):
        with fused_attention(), Allocations() as seen:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, **given).sum().backward()
        assert seen.most < 512 * 512 * 4 * 2 + 12 * q.nbytes
        q.grad = None


@pytest.mark.parametrize("name", ["mse", pytest.param("sp", marks=pytest.mark.slow)])
def test_a_step_on_the_meta_device_allocates_as_on_a_cpu(name):
    """The trainer's own step, with values and without."""
    config = load_config(QUICKSTART, ["data.microbatch=4"])
    found = {}
    for device in ("cpu", "meta"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "META", torch.device(device))
            patch.setattr(memory, "fused_attention", nullcontext)
            model = initial_model(config) if device == "cpu" else skeleton_of(config)
            found[device] = needs(config, config.stage(name), model)
    ours, theirs = found["meta"], found["cpu"]
    assert (ours.held, ours.gradients, ours.parameters, ours.checkpoint) == (
        *(theirs.held, theirs.gradients, theirs.parameters, theirs.checkpoint),
    )
    assert ours.phases[ACTIVATIONS] == pytest.approx(theirs.phases[ACTIVATIONS], rel=0.05)


def test_what_is_held_adds_up():
    config = load_config(QUICKSTART, ["precision=bf16"])
    found = needs(config, config.stage("sp"), skeleton_of(config))
    count = found.trained
    assert count == found.parameters
    assert found.held["weights"] == 2 * count and found.held["master weights"] == 4 * count
    assert found.held["optimizer's state"] == 8 * count and found.held["moving average"] == 4 * count
    assert 0 < found.held["perceptual network"] < 2 * count and found.gradients == 2 * count
    assert found.most == sum(found.held.values()) + max(found.phases.values())
    assert found.checkpoint == pytest.approx(16 * count, rel=0.01)
    small = needs(
        load_config(QUICKSTART, ["precision=bf16", "optimizer.kind=adamw8bit"]),
        config.stage("mse"),
        skeleton_of(config),
    )
    assert small.held["optimizer's state"] < 0.35 * found.held["optimizer's state"]


def test_what_lies_in_the_host_s_memory_is_not_on_the_device():
    config = load_config(QUICKSTART, ["precision=bf16", "optimizer.offload=true", "ema.place=host"])
    found = needs(config, config.stage("mse"), skeleton_of(config))
    assert found.on_host == {"optimizer's state": 8 * found.trained, "moving average": 4 * found.trained}
    assert set(found.held) == {"weights", "master weights", "text encoders"}
    config = load_config(QUICKSTART, ["precision=bf16", "ema.place=none"])
    found = needs(config, config.stage("mse"), skeleton_of(config))
    assert not found.on_host and set(found.held) == {"weights", "master weights", "optimizer's state", "text encoders"}


@pytest.mark.parametrize(("kind", "size"), [("adamw", 8), ("muon", 8), ("prodigy", 16), ("adafactor", 1.7)])
def test_every_optimizer_s_state(kind, size):
    """Bytes per trained weight; a real one of the same weights has as many."""
    config = load_config(QUICKSTART, [f"optimizer.kind={kind}"])
    found = needs(config, config.stage("mse"), skeleton_of(config))
    assert found.held["optimizer's state"] == pytest.approx(size * found.trained, rel=0.1)
    unet = initial_model(config).network
    rule = update_of(config)({name: p.data for name, p in unet.named_parameters()}, config.optimizer)
    assert found.held["optimizer's state"] == pytest.approx(sum(t.nbytes for t in rule.held), rel=0.01)


def test_activations_grow_with_the_microbatch_and_checkpointing_saves_some():
    def activations(*overrides: str) -> int:
        config = load_config(QUICKSTART, overrides)
        return needs(config, config.stage("mse"), skeleton_of(config)).phases[ACTIVATIONS]

    whole, half = activations("data.microbatch=32"), activations("data.microbatch=16")
    assert half < 0.7 * whole
    assert activations("data.microbatch=32", "gradient_checkpointing=true") < 0.7 * whole


SIZES = {  # parameters, as the models' authors state them or their files add up to
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-2-1-base": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 610_856_096,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_their_size(name):
    model = skeleton(name)
    assert sum(p.numel() for p in model.network.parameters()) == SIZES[name]
    assert {p.device.type for p in model.network.parameters()} == {"meta"}


def test_a_folder_of_configurations_is_enough(tmp_path):
    """And its adapters, whose base is frozen."""
    for part in ("unet", "text_encoder", "vae"):
        (tmp_path / part).mkdir()
        config = PUBLISHED["stable-diffusion-v1-5/stable-diffusion-v1-5"][part]
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    lora = {"rank": 4, "alpha": 4.0, "target_modules": ["to_q", "to_v"]}
    model = skeleton(str(tmp_path), lora)
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    assert 0 < trained < 1_000_000 and {p.device.type for p in model.network.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["sd35", "flux", "alpha", "sigma", "dit"])
def test_a_step_of_a_transformer_is_counted_with_its_text_encoders(tmp_path, kind):
    more = ["model={preset: digits, network: dit}"]
    if kind != "dit":
        folder = (tiny_flow_pipeline if kind in ("sd35", "flux") else tiny_pixart)(tmp_path / kind, kind)
        more = [f"model={{pretrained: {folder}}}", "data={source: images, path: any, resolution: 16, batch_size: 4}"]
    config = load_config(QUICKSTART, more)
    model = skeleton_of(config)
    counted = needs(config, config.stage("sp"), model)
    real = initial_model(config)
    assert counted.parameters == sum(p.numel() for p in real.network.parameters())
    for ids, tokenizer in zip(memory.placeholder_ids(2, model), real.tokenizers, strict=True):
        length = tokenizer.model_max_length  # of a tiny T5 less than its pipeline's, which is counted
        assert ids.shape[1] == (model.kind.t5_tokens if isinstance(tokenizer, T5TokenizerFast) else length)
    held = sum(t.nbytes for part in real.text_encoders for t in (*part.parameters(), *part.buffers()))
    assert counted.held["text encoders"] == pytest.approx(held, rel=0.02) and model.kind is real.kind
    assert counted.held["perceptual network"] > 0 and counted.phases[ACTIVATIONS] > 0


def test_a_model_that_is_not_here_is_refused_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(UserError, match=r"nobody/nothing is neither a folder, nor in Hugging Face's cache, nor known"):
        skeleton("nobody/nothing")
    with pytest.raises(UserError, match=r"has neither unet/config\.json nor transformer/config\.json"):
        skeleton(str(tmp_path))


def test_the_command(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", "--dry-run", "--config", str(QUICKSTART), f"run_dir={run_dir}", "precision=bf16"]
    done = CliRunner().invoke(app, [*arguments, "checkpoint={keep: 2, keep_every: 100}"])
    assert done.exit_code == 0, done.output
    assert not run_dir.exists()
    said = done.output
    assert "counted on the meta device; nothing was downloaded, and nothing was run" in said
    assert "UNet2DConditionModel: 1.0 M parameters, of which 1.0 M are trained" in said
    for row in ("weights", "master weights", "moving average", "perceptual network", "at once at most"):
        assert f"  {row} " in said
    config = load_config(QUICKSTART)
    steps = config.stages[0].steps
    assert f"stage mse: {steps:,} steps of 32 samples, {steps * 32:,} in all" in said
    copies = 3 + sum(stage.steps // 100 for stage in config.stages)
    assert f"up to {copies} of them" in said


@pytest.mark.parametrize("kind", ["sd35", "flux", "pixart"])
def test_the_command_counts_adapters_of_transformers_with_buckets_and_masks(tmp_path, kind):
    folder = tiny_pixart(tmp_path / kind) if kind == "pixart" else tiny_flow_pipeline(tmp_path / kind, kind)
    arguments = ["train", "--dry-run", "--config", str(CONFIGS / f"{kind}-lora.yaml"), f"run_dir={tmp_path / 'run'}"]
    small = [f"model.pretrained={folder}", "data.resolution=16", "data.batch_size=2"]
    done = CliRunner().invoke(app, [*arguments, *small, "data.buckets=3", "data.masks=true"])
    assert done.exit_code == 0, done.output
    assert "data.buckets: squares are counted; no other shape has more pixels" in done.output
    assert "perceptual network" in done.output


def test_the_command_refuses_a_flow_s_settings_where_there_is_none(tmp_path):
    options = [f"model.pretrained={tiny_pixart(tmp_path / 'pixart')}", "model.flow.times=uniform"]
    config = load_config(CONFIGS / "pixart-lora.yaml", options)
    with pytest.raises(UserError, match=r"^model\.flow is set, and this model is not trained on a flow: remove it$"):
        skeleton_of(config)


def test_masks_are_counted():
    """A float32 weight for each pixel of the batch is there beside the rest."""
    counted = []
    for masks in ("false", "true"):
        config = load_config(
            QUICKSTART, [f"data={{source: images, path: any, resolution: 8, batch_size: 4, masks: {masks}}}"]
        )
        batch = memory._batch(config, skeleton_of(config))
        counted.append(sum(tensor.nbytes for tensor in batch.tensors().values()))
    data = config.data
    assert counted[1] - counted[0] == 4 * data.batch_size * data.resolution**2


def test_what_cannot_be_counted_is_one_line(monkeypatch):
    def needs_values(*_):
        return torch.ones((), device="meta").item()

    monkeypatch.setattr(memory, "needs", needs_values)
    with pytest.raises(UserError, match=r"^any\.yaml: stage mse cannot be counted on the meta device: [^\n]+$"):
        list(memory.report(load_config(QUICKSTART), "any.yaml", {}))

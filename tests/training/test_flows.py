"""Transformers trained on a rectified flow: on pixels, Stable Diffusion 3.5, FLUX, from a folder to `final/`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file
from tiny import T5_LENGTH, picture_folder, tiny_flow_pipeline
from training.processes import ROOT
from training.test_distributed import OVERRIDES, apart, job, launch, rewound

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config, read_config
from fastsp.diffusion.process import RectifiedFlow
from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.export.export import export_run
from fastsp.generation.generate import load_trained
from fastsp.models import load_model, load_pipeline
from fastsp.models.lora import COMFYUI_FILE, DIFFUSERS_FILE, base_of
from fastsp.perceptual.metric import CALIBRATION_SAMPLES
from fastsp.training.config_changes import config_changes
from fastsp.training.step import TrainingStep
from fastsp.training.trainer import METRIC, train

KINDS = ("dit", "sd35", "sd3", "flux", "schnell")
LORA = "model.lora={rank: 2, alpha: 4, target_modules: [to_q, to_v, add_k_proj]}"
PROMPTS = ["a handwritten one", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flows")
    picture_folder(folder / "pictures")
    for kind in KINDS[1:]:
        tiny_flow_pipeline(folder / kind, kind)
    return folder


def overrides(folder: Path, kind: str, name: str, *more: str) -> list[str]:
    """Of the quickstart's configuration."""
    where = [f"model={{pretrained: {folder / kind}}}"]
    where += [f"data={{source: images, path: {folder / 'pictures'}, resolution: 16, batch_size: 12}}"]
    if kind == "dit":
        where = ["model={preset: digits, network: dit, dit: {width: 32, depth: 3}}"]
    return [f"run_dir={folder / name}", *OVERRIDES, *where, *more]


def run(folder: Path, kind: str, name: str, *more: str, resume: bool = False) -> Path:
    train(load_config(ROOT / "configs" / "quickstart.yaml", overrides(folder, kind, name, *more)), resume)
    return folder / name


class Runs(dict[str, Path]):
    """One of each kind, trained when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        self[kind] = run(self.folder, kind, f"run_{kind}")
        return self[kind]


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Path]:
    return Runs(folder)


def rows(run_dir: Path, key: str = "loss") -> list[float]:
    every = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in every if key in row]


def weights(run_dir: Path, stage: str = "sp") -> dict[str, torch.Tensor]:
    (file,) = [file for file in (run_dir / "stages" / stage).glob("*.safetensors") if file.name != METRIC]
    return load_file(file)


def assert_equal(run_dir: Path, expected: Path) -> None:
    """Bit for bit."""
    assert rows(run_dir) == rows(expected)
    for stage in ("mse", "sp"):
        found, wanted = weights(run_dir, stage), weights(expected, stage)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (run_dir / "stages/sp" / METRIC).read_bytes() == (expected / "stages/sp" / METRIC).read_bytes()


def loaded(final: Path, kind: str, **parts: Any) -> Any:
    """diffusers' pipeline of a folder, with T5 in bfloat16 where the transformer does not take that."""
    none = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    dtypes = {"default": torch.float32, "text_encoder_3": torch.bfloat16}
    if "flux" in (kind, kind.replace("schnell", "flux")):
        dtypes["text_encoder_2"] = torch.bfloat16
    pipeline = DiffusionPipeline.from_pretrained(final, torch_dtype=dtypes, **none, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def theirs(
    pipeline: Any, kind: str, noise: torch.Tensor, steps: int, scale: float, height: int = 16, width: int = 16
) -> torch.Tensor:
    """Pictures of diffusers' own pipeline, in [-1, 1]."""
    keywords: dict[str, Any] = {"prompt": PROMPTS, "guidance_scale": max(scale, 1.0), "latents": noise}
    if kind == "sd35":
        keywords["max_sequence_length"] = T5_LENGTH
    if kind in ("flux", "schnell"):  # their pipeline passes T5's features on in T5's dtype
        del keywords["prompt"]
        keywords["latents"] = FluxPipeline._pack_latents(noise, *noise.shape)
        for name, prompts in (("", PROMPTS), ("negative_", ["", ""])):
            states = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=T5_LENGTH)
            keywords[f"{name}prompt_embeds"] = states.float()
            keywords[f"{name}pooled_prompt_embeds"] = pipeline._get_clip_prompt_embeds(prompts)
        keywords["true_cfg_scale"] = max(scale, 1.0) if kind == "schnell" else 1.0
    sizes = {"height": height, "width": width, "num_inference_steps": steps}
    return pipeline(**keywords, **sizes, output_type="pt").images * 2 - 1


def noise_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_its_metric_is_calibrated_first(runs, kind):
    run_dir = runs[kind]
    losses = rows(run_dir)
    assert len(losses) == 6 and all(math.isfinite(loss) and 0 < loss < 100 for loss in losses)
    learned = load_file(run_dir / "stages/sp" / METRIC)
    assert not (run_dir / "stages/mse" / METRIC).exists()
    assert int(learned["scales.0.samples"]) == CALIBRATION_SAMPLES and bool((learned["scales.0.variance"] > 0).all())
    first, last = weights(run_dir, "mse"), weights(run_dir)
    assert all(tensor.isfinite().all() for tensor in last.values())
    changed = [name for name in first if not torch.equal(first[name], last[name])]
    assert len(changed) > 0.8 * len(first)


def test_the_calibration_sees_no_more_samples_at_once_than_a_step(folder, monkeypatch):
    """64 pictures in the VAE together would take more memory than all else."""
    seen: list[int] = []
    encoded = TrainingStep.encoded
    monkeypatch.setattr(TrainingStep, "encoded", lambda step, batch: seen.append(len(batch)) or encoded(step, batch))
    run(folder, "dit", "calibrated", "stages.0.steps=1", "stages.1.steps=1", "data.batch_size=12")
    assert seen == [12, *[12] * 5, 4, 12]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_that_stopped_goes_on_bit_for_bit(folder, runs, kind, step):
    name = f"again_{kind}_{step}"
    rewound(runs[kind], step, folder / name)
    assert_equal(run(folder, kind, name, resume=True), runs[kind])


@pytest.mark.parametrize("kind", ["dit", "sd35"])
def test_its_configuration_says_nothing_of_a_prediction_and_is_that_of_the_same_run(folder, runs, kind):
    file = runs[kind] / "config.yaml"
    said = file.read_text()
    assert read_config(file).model.prediction is None and said.count("prediction: null") == 1
    earlier = said.replace("prediction: null", "prediction: v_zero_snr")
    plain = load_config(ROOT / "configs" / "quickstart.yaml", overrides(folder, kind, f"run_{kind}"))
    keep = plain.model_copy(update={"model": plain.model.model_copy(update={"prediction": "keep"})})
    assert not config_changes(said, plain) and not config_changes(said, keep) and not config_changes(earlier, plain)
    assert [change.key for change in config_changes(said, plain.model_copy(update={"seed": 1}))] == ["seed"]


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one_and_goes_on_bit_for_bit(folder):
    eager = run(folder, "dit", "eager_dit")
    compiled = run(folder, "dit", "compiled_dit", "compile=true")
    assert rows(compiled) == pytest.approx(rows(eager), rel=1e-3)
    assert rows(compiled) != rows(eager), "something was compiled"
    rewound(compiled, 4, folder / "compiled_again_dit")
    assert_equal(run(folder, "dit", "compiled_again_dit", "compile=true", resume=True), compiled)


@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_are_those_of_diffusers_pipeline(runs, kind, scale):
    final, noise = runs[kind] / "final", noise_of(kind)
    ours = load_trained(str(final)).generate(PROMPTS, noise, 4, Guidance(scale))
    expected = theirs(loaded(final, kind), kind, noise, 4, scale).clamp(-1, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float(ours.std()) > 0.05


def test_the_pixel_pipeline_loads_itself(runs):
    from fastsp.models import PixelTextToImagePipeline

    pipeline = PixelTextToImagePipeline.from_pretrained(runs["dit"] / "final")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pipeline(PROMPTS, 3, guidance_scale=2.0, latents=noise, output_type="pt").images
    expected = load_trained(str(runs["dit"] / "stages" / "sp")).generate(PROMPTS, noise, 3, Guidance(2.0))
    assert torch.equal(found, expected) and (runs["dit"] / "final" / "transformer").is_dir()


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_adapters_load_into_diffusers_and_comfyui_s_layout_has_alpha(folder, kind):
    quick = (LORA, "stages.0.learning_rate=1e-2", "stages.1.learning_rate=1e-2", "ema.decay=0.5")
    run_dir = run(folder, kind, f"lora_{kind}", *quick)
    final, noise = run_dir / "final", noise_of(kind)
    assert {file.name for file in (run_dir / "stages/sp").iterdir()} == {DIFFUSERS_FILE, METRIC, "raw"}
    pipeline = loaded(folder / kind, kind)
    before = theirs(pipeline, kind, noise, 3, 0.0)
    pipeline.load_lora_weights(final, weight_name=DIFFUSERS_FILE)
    expected = theirs(pipeline, kind, noise, 3, 0.0).clamp(-1, 1)
    found = load_trained(str(final)).generate(PROMPTS, noise, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((before - expected).abs().max()) > 1e-4
    assert read_config(run_dir / "config.yaml").model.prediction is None and base_of(final).prediction == "keep"
    own, comfyui = load_file(final / DIFFUSERS_FILE), load_file(final / COMFYUI_FILE)
    layers = {name.partition(".lora_")[0] for name in own}
    assert all(torch.equal(comfyui[name], own[name]) for name in own)
    assert {name for name in comfyui if name not in own} == {f"{layer}.alpha" for layer in layers}
    assert all(layer.startswith("transformer.") and float(comfyui[f"{layer}.alpha"]) == 4.0 for layer in layers)
    name = f"lora_again_{kind}"
    rewound(run_dir, 5, folder / name)
    assert_equal(run(folder, kind, name, *quick, resume=True), run_dir)


@pytest.mark.parametrize("kind", ["dit", "sd35", "flux"])
def test_an_export_is_the_same_model_with_a_card_that_says_so(folder, runs, kind):
    out = folder / f"export_{kind}"
    export_run(runs[kind], out)
    shape = (2, 1, 8, 8) if kind == "dit" else (2, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, expected = (load_trained(str(path)).generate(PROMPTS, noise, 2) for path in (out, runs[kind] / "final"))
    assert torch.equal(found, expected)
    card = (out / "README.md").read_text()
    assert "velocity of a rectified flow" in card and "features normalized, displacement normalized" in card
    other, file = folder / f"other_{kind}", folder / f"one_{kind}.safetensors"
    if kind == "dit":
        with pytest.raises(UserError, match="--single-file: "):
            export_run(runs[kind], other, file)
        assert not other.exists()
        return
    assert export_run(runs[kind], other, file) == [other, file]
    assert torch.equal(load_pipeline(str(file), str(other)).generate(PROMPTS, noise, 2), expected)
    holds = "The single file has the published layout of this transformer, for ComfyUI's `models/checkpoints`, with VAE"
    assert holds in (other / "README.md").read_text() and "single file" not in card


@pytest.mark.parametrize("more", ["data.microbatch=4", "gradient_checkpointing=true"])
@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_microbatches_and_checkpointing_change_nothing_but_rounding(folder, runs, kind, more):
    found = run(folder, kind, f"{more.replace('=', '_')}_{kind}", more)
    torch.testing.assert_close(rows(found), rows(runs[kind]), rtol=2e-4, atol=0)


def test_bfloat16_with_a_conditional_batch(folder, runs):
    found = run(folder, "flux", "bf16", "precision=bf16", "data.caption_dropout=1.0")
    assert all(math.isfinite(loss) for loss in rows(found))


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_encoded_latents_and_features_train_alike(folder, runs, kind, capsys):
    from fastsp.cli.encode import encode

    file, out = ROOT / "configs" / "quickstart.yaml", folder / f"latents_{kind}"
    encode(file, out, overrides(folder, kind, "unused"), text_features=True, dtype="float32", batch_size=8)
    capsys.readouterr()
    data = f"data={{source: latents, path: {out}, resolution: 16, batch_size: 12}}"
    found = run(folder, kind, f"encoded_{kind}", data)
    torch.testing.assert_close(rows(found), rows(runs[kind]), rtol=1e-4, atol=0)


def test_times_are_drawn_as_the_pipeline_samples(folder):
    flux = load_model(str(folder / "flux"))
    latents = torch.zeros(1, *flux.latent_shape(16))
    process = flux.of_size(flux.training_process, latents)
    assert isinstance(process, RectifiedFlow) and process.times == "logit_normal"
    tokens, low, high = 16, (4, 0.5), (64, 1.15)
    mu = low[1] + (high[1] - low[1]) * (tokens - low[0]) / (high[0] - low[0])
    assert process.shift == pytest.approx(math.exp(mu))
    sd = load_model(str(folder / "sd35"), flow={"times": "mode", "shift": 2.0})
    process = sd.of_size(sd.training_process, latents)
    assert isinstance(process, RectifiedFlow) and (process.times, process.shift) == ("mode", 2.0)
    assert isinstance(sd.process, RectifiedFlow) and sd.process.shift == 3.0


@pytest.mark.parametrize("setting", [{"clip_skip": 2}, {"token_chunks": 3}])
def test_text_settings_are_refused_in_one_line(folder, setting):
    with pytest.raises(UserError, match="token_chunks and clip_skip: StableDiffusion3Pipeline has neither"):
        load_model(str(folder / "sd35"), **setting)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("sd35-lora", "sd35"), ("flux-lora", "flux"), ("digits-dit", "dit")])
def test_the_shipped_configurations(folder, tmp_path, name, kind):
    small = [
        "run_dir={}",
        "stages.0.steps=2",
        "stages.1.steps=2",
        "data.batch_size=4",
        "samples={{count: 2, steps: 2}}",
    ]
    small += ["evaluation.enabled=false", "log.every=1"]
    if kind != "dit":
        small += [f"model.pretrained={folder / kind}", f"data.path={folder / 'pictures'}", "data.resolution=16"]
    else:
        small += ["stages.2.steps=2"]
    train(load_config(ROOT / "configs" / f"{name}.yaml", [word.format(tmp_path / "run") for word in small]))
    assert all(math.isfinite(loss) for loss in rows(tmp_path / "run"))
    assert (tmp_path / "run" / "final" / ("model_index.json" if kind == "dit" else COMFYUI_FILE)).is_file()


@pytest.mark.slow
def test_two_processes_are_as_one(folder, runs):
    """Loss of every step, the calibration, and the weights themselves, within rounding."""
    jobs = {}
    for kind in ("dit", "sd35", "flux"):
        for how in ("ddp", "fsdp"):
            jobs[f"{kind}_{how}"] = overrides(folder, kind, f"two_{kind}_{how}", f"distributed={how}")
    jobs["sd35_lora"] = overrides(folder, "sd35", "two_sd35_lora", LORA)
    launch(2, folder, *({**job(folder / f"two_{name}"), "overrides": words} for name, words in jobs.items()))
    run(folder, "sd35", "run_sd35_lora", LORA)
    for name in jobs:
        expected = folder / "run_sd35_lora" if "lora" in name else runs[name.rpartition("_")[0]]
        found = folder / f"two_{name}"
        torch.testing.assert_close(rows(found), rows(expected), rtol=2e-4, atol=0)
        calibrated = [load_file(run_dir / "stages/sp" / METRIC) for run_dir in (found, expected)]
        torch.testing.assert_close(calibrated[0], calibrated[1], rtol=1e-3, atol=1e-6)
        assert apart(found, expected) < 2e-3, name
        shutil.rmtree(found / "checkpoints")

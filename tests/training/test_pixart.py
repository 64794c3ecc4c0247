"""PixArt Alpha and Sigma: T5 alone with a mask, epsilon on a noise schedule, a variance that is not trained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny import PIXART, T5_LENGTH, picture_folder, tiny_pixart, tiny_t5_tokenizer
from tiny_transformers import batch_of
from training.processes import ROOT
from training.test_distributed import job, launch, rewound
from training.test_flows import assert_equal, overrides, rows, run, weights

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.export.export import export_run
from fastsp.families import family_of
from fastsp.families.pixart import PixArtFamily
from fastsp.generation.generate import load_trained
from fastsp.loss import SelfPerceptualLoss
from fastsp.models import load_pipeline
from fastsp.models.lora import COMFYUI_FILE, DIFFUSERS_FILE
from fastsp.training.trainer import train

KINDS = ("alpha", "sigma")
KEEP = "model.prediction=keep"
LORA = "model.lora={rank: 2, alpha: 4, target_modules: [to_q, to_v]}"
PROMPTS = ["A handwritten One", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    picture_folder(folder / "pictures")
    for number, picture in enumerate(sorted(picture_folder(folder / "wide").glob("*.png"))):
        if number % 2:
            Image.open(picture).resize((64, 16)).save(picture)
    for kind in KINDS:
        tiny_pixart(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Path]:
    return {kind: run(folder, kind, f"run_{kind}", KEEP) for kind in KINDS}


def pipeline_of(final: Path, **parts: Any) -> Any:
    dtypes = {"default": torch.float32, "text_encoder": torch.bfloat16}
    pipeline = DiffusionPipeline.from_pretrained(final, torch_dtype=dtypes, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def theirs(pipeline: Any, noise: torch.Tensor, steps: int, scale: float, height: int = 16) -> torch.Tensor:
    """Pictures of diffusers' own pipeline, in [-1, 1], from its own text features in float32."""
    kinds = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    features = pipeline.encode_prompt(PROMPTS, clean_caption=False, max_sequence_length=T5_LENGTH)
    encoder, pipeline.text_encoder = pipeline.text_encoder, None  # else they would be cast to its dtype
    given = {name: one.float() if "embeds" in name else one for name, one in zip(kinds, features, strict=True)}
    sizes = {"height": height, "width": 16, "use_resolution_binning": False, "num_inference_steps": steps}
    how = {"guidance_scale": max(scale, 1.0), "latents": noise, "output_type": "pt"}
    images = pipeline(negative_prompt=None, **given, **sizes, **how).images * 2 - 1
    pipeline.text_encoder = encoder
    return images


def noise_of(height: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, height, 8, generator=torch.Generator().manual_seed(0))


def proj_out(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """(patches' places, channels of the answer, width)."""
    return state["proj_out.weight"].unflatten(0, (4, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_everything_but_the_variance(folder, runs, kind):
    losses = rows(runs[kind])
    assert len(losses) == 6 and all(math.isfinite(loss) and 0 < loss < 100 for loss in losses)
    before = load_pipeline(str(folder / kind)).network.state_dict()
    first, last = weights(runs[kind], "mse"), weights(runs[kind], "sp")
    assert {name for name in last if torch.equal(first[name], before[name])} == set()
    assert {name for name in last if torch.equal(last[name], first[name])} == set()
    before, last = proj_out(before), proj_out(last)
    assert torch.equal(before[:, 4:], last[:, 4:])
    assert bool((before[:, :4] != last[:, :4]).any(dim=-1).all())


@pytest.mark.parametrize(("kind", "step"), [("alpha", 2), ("sigma", 5)])
def test_a_run_that_stopped_goes_on_bit_for_bit(folder, runs, kind, step):
    name = f"again_{kind}_{step}"
    rewound(runs[kind], step, folder / name)
    assert_equal(run(folder, kind, name, KEEP, resume=True), runs[kind])


@pytest.mark.parametrize(("scale", "height"), [(0.0, 8), (3.0, 8), (3.0, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_diffusers_pipeline(runs, kind, scale, height):
    """Alpha is told that an image is higher than wide, too."""
    final, noise = runs[kind] / "final", noise_of(height)
    ours = load_trained(str(final)).generate(PROMPTS, noise, 4, Guidance(scale))
    expected = theirs(pipeline_of(final), noise, 4, scale, 2 * height).clamp(-1, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float(ours.std()) > 0.05


@pytest.mark.parametrize(("kind", "name"), [("alpha", "PixArtAlphaPipeline"), ("sigma", "PixArtSigmaPipeline")])
def test_final_is_a_pipeline_of_the_same_class(runs, kind, name):
    final = runs[kind] / "final"
    assert json.loads((final / "model_index.json").read_text())["_class_name"] == name
    found = json.loads((final / "scheduler" / "scheduler_config.json").read_text())
    settings = (found[key] for key in ("beta_schedule", "beta_start", "beta_end", "prediction_type"))
    assert [*settings] == ["linear", 0.0001, 0.02, "epsilon"]
    assert (found["timestep_spacing"], found["rescale_betas_zero_snr"]) == ("trailing", False)


def test_text_features_are_t5_s_of_small_letters_and_zeros_in_the_padding(folder):
    model = load_pipeline(str(folder / "sigma"))
    features = model.encode_prompts(["AB", ""]).encoder_hidden_states
    tokenizer = tiny_t5_tokenizer()
    told = tokenizer(["ab", ""], padding="max_length", max_length=T5_LENGTH, return_tensors="pt")
    expected = model.text_encoder(told.input_ids, attention_mask=told.attention_mask)[0].float()
    mask = told.attention_mask.bool()
    assert torch.equal(features[mask], expected[mask]) and not features[~mask].any()
    keywords = family_of(model.network).keywords(model.network.config, Conditioning(features))
    assert torch.equal(keywords["encoder_attention_mask"], mask) and mask.sum(1).tolist() == [4, 1]


def test_a_kernel_that_it_cannot_have_is_refused_before_the_run_begins(folder):
    with pytest.raises(
        UserError, match=r"^attention: 'math' is not for a PixArtTransformer2DModel; it takes auto, sdpa$"
    ):
        run(folder, "sigma", "refused", "attention=math")
    assert not (folder / "refused").exists()


def test_a_run_to_v_and_zero_terminal_snr(folder):
    run_dir = run(folder, "sigma", "v")
    model = load_trained(str(run_dir / "final"))
    assert (model.prediction_type, float(model.scheduler.alphas_cumprod[-1])) == ("v_prediction", 0.0)
    noise = noise_of()
    expected = theirs(pipeline_of(run_dir / "final"), noise, 4, 2.0).clamp(-1, 1)
    torch.testing.assert_close(model.generate(PROMPTS, noise, 4, Guidance(2.0)), expected, rtol=0, atol=1e-5)


def test_adapters_load_by_peft_and_comfyui_s_layout_has_alpha(folder):
    quick = (KEEP, LORA, "stages.0.learning_rate=1e-2", "stages.1.learning_rate=1e-2", "ema.decay=0.5")
    run_dir = run(folder, "alpha", "lora", *quick)
    final, noise = run_dir / "final", noise_of()
    pipeline = pipeline_of(folder / "alpha")
    pipeline.scheduler = DDIMScheduler.from_pretrained(final / "scheduler")
    before = theirs(pipeline, noise, 4, 0.0)
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(final))
    expected = theirs(pipeline, noise, 4, 0.0).clamp(-1, 1)
    found = load_trained(str(final)).generate(PROMPTS, noise, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((before - expected).abs().max()) > 1e-4
    own, comfyui = load_file(final / DIFFUSERS_FILE), load_file(final / COMFYUI_FILE)
    layers = {name.partition(".lora_")[0] for name in own}
    assert len(layers) == 16 and all(torch.equal(comfyui[name], own[name]) for name in own)
    assert all(layer.startswith("transformer.") and float(comfyui[f"{layer}.alpha"]) == 4.0 for layer in layers)
    readme = (final / "README.md").read_text()
    assert f"import DDIMScheduler, {type(pipeline).__name__}" in readme
    assert 'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "THIS_FOLDER")' in readme
    name = "lora_again"
    rewound(run_dir, 5, folder / name)
    assert_equal(run(folder, "alpha", name, *quick, resume=True), run_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_same_model_with_a_card_that_says_so(folder, runs, kind):
    out = folder / f"export_{kind}"
    export_run(runs[kind], out)
    noise = noise_of()
    found, expected = (load_trained(str(path)).generate(PROMPTS, noise, 2) for path in (out, runs[kind] / "final"))
    assert torch.equal(found, expected)
    card = (out / "README.md").read_text()
    assert "epsilon" in card and "features normalized, displacement normalized" in card
    with pytest.raises(UserError, match="--single-file: "):
        export_run(runs[kind], folder / "other", folder / "one.safetensors")


def test_microbatches_and_checkpointing_change_nothing_but_rounding(folder, runs):
    found = run(folder, "alpha", "parts", KEEP, "data.microbatch=4", "gradient_checkpointing=true")
    torch.testing.assert_close(rows(found), rows(runs["alpha"]), rtol=2e-4, atol=0)


def test_buckets_in_bfloat16_with_a_critic(folder, monkeypatch):
    """Alpha is told the sizes that the pictures have."""
    told = set()
    keywords = PixArtFamily.keywords

    def noted(*args: Any) -> dict[str, Any]:
        given = keywords(*args)
        added = given["added_cond_kwargs"]
        told.update(map(tuple, torch.cat([added["resolution"], added["aspect_ratio"]], dim=1).tolist()))
        return given

    monkeypatch.setattr(PixArtFamily, "keywords", noted)
    data = f"data={{source: images, path: {folder / 'wide'}, resolution: 16, batch_size: 8, microbatch: 4, buckets: 2}}"
    more = ("precision=bf16", "stages.1.layers=[1, 3]", "stages.1.critic={warmup_steps: 1}")
    found = run(folder, "alpha", "buckets", KEEP, data, *more, "samples.every=0")
    assert all(math.isfinite(loss) for loss in rows(found))
    assert told == {(16.0, 16.0, 1.0), (8.0, 32.0, 0.25)}


def test_encoded_latents_and_features_train_alike(folder, runs, capsys):
    from fastsp.cli.encode import encode

    file, out = ROOT / "configs" / "quickstart.yaml", folder / "latents"
    encode(file, out, overrides(folder, "alpha", "unused"), text_features=True, dtype="float32", batch_size=8)
    capsys.readouterr()
    data = f"data={{source: latents, path: {out}, resolution: 16, batch_size: 12}}"
    found = run(folder, "alpha", "encoded", KEEP, data)
    torch.testing.assert_close(rows(found), rows(runs["alpha"]), rtol=1e-4, atol=0)


def test_alpha_s_text_features_are_none_of_sigma_s(folder, tmp_path):
    """One T5, for 120 tokens and for 300, where the tokenizer itself has no smaller limit."""
    prints, shapes = [], []
    for kind in KINDS:
        file = shutil.copytree(folder / kind, tmp_path / kind) / "tokenizer" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 512}))
        model = load_pipeline(str(tmp_path / kind))
        prints.append(model.text_fingerprint())
        shapes.append(model.encode_prompts(["a"]).encoder_hidden_states.shape[1])
    assert shapes == [120, 300] and prints[0] != prints[1]
    same = {load_pipeline(str(folder / kind)).text_fingerprint() for kind in KINDS}
    assert len(same) == 1, "of as many tokens they are the same features"


def test_a_vocabulary_that_needs_sentencepiece_says_so(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "sigma", tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer"
    (tokenizer / "tokenizer.json").rename(tokenizer / "spiece.model")
    monkeypatch.setattr("fastsp.models.pretrained.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tokenizer has its vocabulary in spiece\.model alone, which needs sentencepiece: pip install"
    ):
        load_pipeline(str(tmp_path / "model"))
    assert load_pipeline(str(folder / "sigma")).tokenizer.model_max_length == T5_LENGTH


def test_a_vocabulary_of_sentencepiece_is_read_in_small_letters(folder, tmp_path):
    """The files of published folders; what is written needs sentencepiece no more."""
    shutil.copytree(folder / "sigma", tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # as T5 has them
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a dog", "a tan cat", "a good dog"] * 10),
        model_prefix=str(tokenizer / "spiece"),
        vocab_size=32,
        hard_vocab_limit=False,
        minloglevel=2,
        **special,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spiece.model"))
    model = load_pipeline(str(tmp_path / "model"))
    model.save(tmp_path / "written")
    (tmp_path / "written" / "tokenizer" / "spiece.model").unlink(missing_ok=True)
    for loaded in (model, load_pipeline(str(tmp_path / "written"))):
        for prompt in ("A CAT and a Dog", "Goo  Été", ""):
            assert loaded.tokenizer(prompt).input_ids == [*pieces.encode(prompt.lower()), special["eos_id"]]


def test_the_perceptual_network_of_a_published_folder(folder):
    """Its files name the class of the network as it was called earlier."""
    criterion = SelfPerceptualLoss.from_pretrained(str(folder / "alpha"))
    assert family_of(criterion.perceptual_network.truncated).class_name == PIXART
    with pytest.raises(ValueError, match=r"added_cond_kwargs missing, .*resolution and aspect_ratio"):
        data = batch_of(PIXART)
        data.pop("added_cond_kwargs")
        criterion(torch.zeros_like(data["latents"]), **data)


@pytest.mark.slow
def test_the_shipped_configuration(folder, tmp_path):
    small = [f"run_dir={tmp_path / 'run'}", f"model.pretrained={folder / 'sigma'}", f"data.path={folder / 'pictures'}"]
    small += ["stages.0.steps=2", "stages.1.steps=2", "data.batch_size=4", "samples={count: 2, steps: 2}"]
    small += ["data.resolution=16", "data.buckets=off", "evaluation.enabled=false", "log.every=1"]
    train(load_config(ROOT / "configs" / "pixart-lora.yaml", small))
    assert all(math.isfinite(loss) for loss in rows(tmp_path / "run"))
    assert (tmp_path / "run" / "final" / COMFYUI_FILE).is_file()


@pytest.mark.slow
def test_two_processes_are_as_one(folder, runs):
    """Loss of every step, which the weights of all steps before decide, within rounding."""
    jobs = {}
    for kind in KINDS:
        for how in ("ddp", "fsdp"):
            jobs[f"{kind}_{how}"] = overrides(folder, kind, f"two_{kind}_{how}", KEEP, f"distributed={how}")
    launch(2, folder, *({**job(folder / f"two_{name}"), "overrides": words} for name, words in jobs.items()))
    for name in jobs:
        found = folder / f"two_{name}"
        torch.testing.assert_close(rows(found), rows(runs[name.partition("_")[0]]), rtol=2e-4, atol=0)

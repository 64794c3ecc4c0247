"""The CLIP score: against float64 and torchmetrics, with a tiny CLIP that has learned a few colours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation.test_reference import Means
from evaluation.test_samples import STEPS, Pixels, Steps
from PIL import Image
from tiny import CLIP_SIDE, tiny_clip, tiny_clip_folder
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastsp.errors import UserError
from fastsp.evaluation.captions import CaptionSet
from fastsp.evaluation.clip import ClipScorer, check_clip, load_clip
from fastsp.evaluation.engine import sample_features
from fastsp.evaluation.features import Features
from fastsp.evaluation.reference import Reference, load_reference, open_reference
from fastsp.generation.generate import Sampling
from fastsp.models import digits_model, digits_tokenizer
from fastsp.utils.progress import no_bar

COLOURS = {
    "red": (1.0, -1, -1),
    "green": (-1, 1.0, -1),
    "blue": (-1, -1, 1.0),
    "white": (1.0, 1, 1),
    "dark": (-1.0, -1, -1),
}
CAPTIONS = list(COLOURS)


def coloured(noise: float = 0.3, seed: int = 0, side: int = 20) -> torch.Tensor:
    """A picture for each colour, (5, 3, S, S) in [-1, 1], with noise."""
    plain = torch.tensor(list(COLOURS.values())).float()[:, :, None, None].expand(-1, -1, side, side)
    generator = torch.Generator().manual_seed(seed)
    return (plain * (1 - noise) + noise * torch.randn(plain.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP trained on colours and their names with its own contrastive loss."""
    clip = tiny_clip()
    tokens = digits_tokenizer()(CAPTIONS, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3)
    for step in range(60):
        pixels = F.interpolate(coloured(seed=step), (CLIP_SIDE, CLIP_SIDE), mode="bilinear", antialias=True) * 2
        loss = clip(**tokens, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tiny_clip_folder(tmp_path_factory.mktemp("clip"), clip.eval())


@pytest.fixture(scope="session")
def scorer(folder: Path) -> ClipScorer:
    return load_clip(folder)


def bytes_of(images: torch.Tensor) -> list[torch.Tensor]:
    """Each as uint8 (3, S, S), which is what other programs take."""
    return list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1))


def processor(**options: Any) -> CLIPImageProcessorPil:
    """transformers' own, which needs no torchvision."""
    crop = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    return CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=crop, **options)


def oracle(folder: Path, images: torch.Tensor, captions: list[str], **options: Any) -> torch.Tensor:
    """In float64, caption by caption without padding, on what transformers' processor makes of the pictures."""
    clip = CLIPModel.from_pretrained(folder).double().eval()
    pixels = processor(**options)(bytes_of(images), return_tensors="pt").pixel_values.double()
    found = []
    for picture, caption in zip(pixels, captions, strict=True):
        first, *words, last = digits_tokenizer()(caption).input_ids
        tokens = [first, *words[:14], last]  # of at most 16
        with torch.no_grad():
            seen = clip(input_ids=torch.tensor([tokens]), pixel_values=picture[None])
        cosine = (seen.image_embeds @ seen.text_embeds.T).item()  # both of length 1
        found.append(100 * max(cosine, 0.0))
    return torch.tensor(found, dtype=torch.float64)


def scores(scorer: ClipScorer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    return scorer.scores(scorer.extract(images).features, captions)


def wrong(captions: list[str]) -> list[str]:
    return captions[1:] + captions[:1]


@pytest.mark.parametrize("side", [8, 16, 37])
def test_against_float64_and_the_real_processor(folder: Path, scorer: ClipScorer, side: int) -> None:
    images, captions = coloured(side=side), ["red", "green red", "a handwritten seven", "", "dark"]
    expected = oracle(folder, images, captions)
    torch.testing.assert_close(scores(scorer, images, captions), expected, rtol=0, atol=1e-3)
    assert (expected == 0).any() and (expected > 5).sum() > 1, "negative cosines count as 0, others as they are"
    grey = images[:, :1]
    torch.testing.assert_close(scores(scorer, grey, captions), oracle(folder, grey, captions), rtol=0, atol=1e-3)


def test_as_torchmetrics_has_it(folder: Path, scorer: ClipScorer) -> None:
    """Its own code, for a CLIP of an older transformers, whose embeddings were plain tensors."""
    clip, images = CLIPModel.from_pretrained(folder), coloured()
    old = SimpleNamespace(
        config=clip.config,
        get_image_features=lambda pixels: clip.get_image_features(pixels).pooler_output,
        get_text_features=lambda *tokens: clip.get_text_features(*tokens).pooler_output,
    )
    old.to = lambda device: old

    def process(text: Any = None, images: Any = None, **options: Any) -> Any:
        return processor()(images, return_tensors="pt") if text is None else digits_tokenizer()(text, **options)

    theirs = clip_score(bytes_of(images), CAPTIONS, lambda: (old, process))
    assert scores(scorer, images, CAPTIONS).mean().item() == pytest.approx(theirs.item(), abs=1e-3)


def test_wrong_captions_score_lower(scorer: ClipScorer) -> None:
    images = coloured(seed=1000)
    right, mixed_up = scores(scorer, images, CAPTIONS), scores(scorer, images, wrong(CAPTIONS))
    assert (right > mixed_up + 10).all(), (right, mixed_up)


def test_the_end_of_a_long_caption_is_left_out(folder: Path, scorer: ClipScorer) -> None:
    """The token that ends it stays: from it comes the embedding."""
    images, long = coloured(), "red " * 30
    found = scores(scorer, images, [long] * 5)
    torch.testing.assert_close(found, oracle(folder, images, [long] * 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, scores(scorer, images, [long + "blue"] * 5))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_normalization_of_its_own(folder: Path, scorer: ClipScorer, tmp_path: Path, file: str) -> None:
    """transformers 5 writes the second file, and older versions wrote the first."""
    other = shutil.copytree(folder, tmp_path / "clip")
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (other / file).write_text(json.dumps({"image_processor": own} if file.startswith("processor") else own))
    ours, images = load_clip(other), coloured()
    assert ours.identity != scorer.identity, "its figures are not comparable"
    torch.testing.assert_close(
        scores(ours, images, CAPTIONS), oracle(folder, images, CAPTIONS, **own), rtol=0, atol=1e-3
    )


def test_the_identity_is_that_of_the_weights(folder: Path, scorer: ClipScorer, tmp_path: Path) -> None:
    assert load_clip(shutil.copytree(folder, tmp_path / "copy")).identity == scorer.identity
    assert load_clip(tiny_clip_folder(tmp_path / "other", tiny_clip(1))).identity != scorer.identity


# Samples


def sampled(clip: ClipScorer, folder: Path, steps: Steps) -> tuple[Features, float]:
    model = digits_model(resolution=8, seed=0)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.network.conv_out.weight, std=0.1)
    prompts = [f"a handwritten {word}" for word in ("one", "two", "three", "four", "five")]
    sampling = Sampling(STEPS, batch_size=2)
    return sample_features(model, prompts, sampling, Pixels(), folder, steps, True, clip)


def test_samples_that_were_stopped_have_the_same_scores(scorer: ClipScorer, tmp_path: Path) -> None:
    """Each with the caption that it was sampled from."""
    whole, _ = sampled(scorer, tmp_path / "whole", Steps())
    with pytest.raises(KeyboardInterrupt):
        sampled(scorer, tmp_path / "stopped", Steps(STEPS + 1))
    assert len(list((tmp_path / "stopped").glob("*.safetensors"))) == 1
    rest = Steps()
    again, _ = sampled(scorer, tmp_path / "stopped", rest)
    assert rest.done == 2 * STEPS, "the first batch was kept"
    assert whole.clip_scores is not None and again.clip_scores is not None
    assert torch.equal(again.clip_scores, whole.clip_scores) and len(set(whole.clip_scores.tolist())) == 5
    files = sorted((tmp_path / "whole" / "pictures").iterdir())
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])[:, None] / 127.5 - 1
    prompts = [Image.open(file).info["prompt"] for file in files]
    torch.testing.assert_close(whole.clip_scores, scores(scorer, pictures, prompts), rtol=0, atol=1e-3)


# Real images


@pytest.fixture
def coco(tmp_path: Path) -> CaptionSet:
    """Real pictures, and captions that name them in another order than that of the files."""
    for name, picture in zip(CAPTIONS, bytes_of(coloured()), strict=True):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{name}.png")
    return CaptionSet([{"caption": name, "image": f"{name}.png"} for name in CAPTIONS], "")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scorer: ClipScorer) -> Callable[..., Reference]:
    monkeypatch.setattr("fastsp.evaluation.reference.load_inception", lambda _: Means())

    def open_(captions: CaptionSet, reference: Path, clip: ClipScorer | None = scorer) -> Reference:
        return open_reference("inception", reference, captions, tmp_path / "work", no_bar, clip=clip)[1]

    return open_


def test_real_images_are_scored_with_their_own_captions(
    opened: Any, coco: CaptionSet, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: they are kept, for these captions, and with the statistics that a user saves."""
    real = tmp_path / "real"
    assert opened(coco, real, None).clip_scores is None
    found = opened(coco, real)
    expected = scores(scorer, coloured(), CAPTIONS)
    torch.testing.assert_close(found.clip_scores, expected, rtol=0, atol=1e-3)
    found.save(tmp_path / "kept.safetensors")
    others = zip(coco.rows, wrong(CAPTIONS), strict=True)
    mixed_up = CaptionSet([{**row, "caption": other} for row, other in others], "")
    assert opened(mixed_up, real).clip_scores.mean() < expected.mean() - 10
    monkeypatch.setattr("fastsp.evaluation.reference.see_files", lambda *_: pytest.fail("they were kept"))
    assert torch.equal(opened(coco, real).clip_scores, found.clip_scores)
    kept = tmp_path / "kept.safetensors"
    assert torch.equal(opened(coco, kept).clip_scores, found.clip_scores)
    assert opened(coco, kept, None).clip_scores is None
    assert load_reference(kept, found.features, "clip-of-another").clip_scores is None


def test_real_images_without_captions_have_no_score(opened: Any, coco: CaptionSet, tmp_path: Path) -> None:
    texts = CaptionSet([{"caption": caption} for caption in CAPTIONS], "")
    assert opened(texts, tmp_path / "real").clip_scores is None


# Folders that are something else


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def pickles_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    """What a clone of a repository holds in place of large files."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def text_model(folder: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=564, **size)).save_pretrained(folder)


def half_a_clip(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    text_model(folder)
    (folder / "config.json").write_text(config)


BAD = [
    (shutil.rmtree, "no such folder; allowed: a folder with a CLIPModel"),
    (lambda folder: (folder / "config.json").unlink(), "its config.json is missing, or of another kind"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    (text_model, "its config.json is missing, or of another kind"),
    (half_a_clip, "no CLIP's weights in .safetensors"),
    (pickles_only, "no CLIP's weights in .safetensors, and fastsp reads no others"),
    (torn, "cannot be loaded"),
    (pointer, "cannot be loaded"),
    (no_tokenizer, "its tokenizer has 2 tokens, its text encoder 564: it lacks its vocabulary"),
    (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [1], "image_std": "a"}'),
        "cannot be loaded",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_what_is_no_clip_is_refused(folder: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    spoil(bad)
    with pytest.raises(UserError) as caught:
        check_clip(bad)
    assert message in str(caught.value) and str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_folder_is_checked_without_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: pytest.fail("they were read"))
    check_clip(folder)

"""The real images: in bounded memory, their squares, their statistics, and the file in which these are kept."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import picture_folder

from fastsp.config import Config
from fastsp.errors import UserError
from fastsp.evaluation import classifier, reference
from fastsp.evaluation.captions import CaptionSet
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import frechet_distance, kernel_distance
from fastsp.evaluation.reference import (
    Reference,
    batch_size_of,
    image_files,
    load_reference,
    own_reference,
    see_files,
)
from fastsp.utils.progress import no_bar


class Corners(FeatureModel):
    """Sees the first pixel, and the size."""

    identity = "corners"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = torch.full((len(images), 1), float(images.shape[-1]))
        return torch.cat([images[:, :, 0, 0] * self.scale, size], 1), images[:, :2, 0, 0]


def seen(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return Features(draw * torch.arange(1, 7), draw[:, :3])


def of(*names: str) -> CaptionSet:
    """Captions of these images; of none."""
    return CaptionSet([{"caption": "", "image": name} for name in names] or [{"caption": ""}], "")


def distance(reference: Reference, samples: Features) -> float:
    return frechet_distance(reference.mean, reference.covariance, samples.features)


def test_statistics_are_as_good_as_the_features(tmp_path: Path) -> None:
    real, samples = seen(50, 0), seen(40, 1)
    statistics = Reference.of(real, "corners", "a folder")
    expected = distance(statistics, samples)
    assert distance(statistics, real) == pytest.approx(0, abs=1e-6)  # so the ground truth's 0.00 is no claim
    statistics.save(tmp_path / "kept.safetensors")
    kept = load_reference(tmp_path / "kept.safetensors", "corners")
    assert distance(kept, samples) == expected
    assert kept.scores(samples, ()) == statistics.scores(samples, ()) and "kid" in kept.scores(samples, ())
    assert (kept.count, kept.score, kept.source) == (50, statistics.score, "a folder")


def test_statistics_from_before_there_was_kid_are_read(tmp_path: Path) -> None:
    replace(Reference.of(seen(50, 0), "corners", "a folder"), sample=None).save(tmp_path / "old.safetensors")
    assert "kid" not in load_reference(tmp_path / "old.safetensors", "corners").scores(seen(40, 1), ())


def test_a_classifier_s_features_have_no_kid() -> None:
    statistics, samples = Reference.of(seen(50, 0), "corners", "a folder"), seen(40, 1)
    assert "kid" not in statistics.scores(samples, ("one", "two", "three")) and "kid" in statistics.scores(samples, ())


def test_kid_is_of_a_seeded_sample_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = seen(50, 0), seen(40, 1)
    monkeypatch.setattr(reference, "_IN_SAMPLE", 20)
    one, again = (Reference.of(real, "corners", "a folder") for _ in range(2))
    assert one.sample is not None and again.sample is not None and torch.equal(one.sample, again.sample)
    assert len(set(one.sample[:, 0].tolist()) & set(real.features[:, 0].float().tolist())) == 20
    assert one.scores(samples, ())["kid"] == kernel_distance(one.sample.double(), samples.features)


def test_images_of_several_sizes_keep_their_order(tmp_path: Path) -> None:
    """Of each the central square, upright, in colour."""
    for index, size in enumerate([(6, 4), (4, 6), (8, 8), (6, 4)]):
        picture = Image.new("RGB", size, (0, 0, 0))
        left, top = (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
        picture.putpixel((left, top), (255, 51 * index, 0))
        picture.save(tmp_path / f"{index}.png")
    Image.new("L", (4, 2), 255).save(tmp_path / "4.jpg")
    features = see_files(image_files(tmp_path, of()), Corners()).features
    assert features[:4, 3].tolist() == [4, 4, 8, 4] and features[4].tolist() == [1, 1, 1, 2]
    assert features[:4, 1] == pytest.approx(torch.arange(4) * 0.4 - 1)


def test_only_the_images_of_the_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert [file.name for file in image_files(tmp_path, of("c.png", "a.png"))] == ["c.png", "a.png"]
    with pytest.raises(UserError, match=r"lacks d\.png, which the captions are of"):
        image_files(tmp_path, of("a.png", "d.png"))
    (tmp_path / "d.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"d\.png cannot be read"):
        see_files(image_files(tmp_path, of()), Corners())
    with pytest.raises(UserError, match="there is no such folder"):
        image_files(tmp_path / "nowhere", of())


def test_all_broken_images_are_found_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.png", "d.jpg"):
        Image.effect_noise((64, 64), 80).save(tmp_path / name)
    seen: list[int] = []
    see_files(image_files(tmp_path, of()), Corners(), lambda: seen.append(1))
    assert len(seen) == 4
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:600])
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.jpg cannot be read: .* \(and 1 more\); fix or replace it$"):
        see_files(image_files(tmp_path, of()), Corners())


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("text", "model", "missing"):
        with pytest.raises(UserError, match="holds no statistics"):
            load_reference(tmp_path / f"{name}.safetensors", "corners")
    Reference.of(seen(9, 0), "inception-1", "a").save(tmp_path / "kept.safetensors")
    with pytest.raises(UserError, match="is of the features 'inception-1'; these are 'inception-2'"):
        load_reference(tmp_path / "kept.safetensors", "inception-2")
    with pytest.raises(UserError, match="1 images; allowed: at least 2"):
        Reference.of(seen(1, 0), "corners", "a")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on coloured images of two captions, with held-out ones in another folder."""
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 5)
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"preset": "digits"},
            "data": {
                "source": "images",
                "path": str(picture_folder(tmp_path / "train", 20)),
                "resolution": 16,
                "batch_size": 2,
            },
            "stages": [{"name": "mse", "objective": "mse", "steps": 1, "learning_rate": 1e-3}],
            "evaluation": {"heldout": str(picture_folder(tmp_path / "heldout", 6))},
        }
    )


class Means(FeatureModel):
    """Sees the mean of a channel."""

    identity = "means"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = images.mean((2, 3)) * self.scale
        return seen, seen


@pytest.mark.parametrize("features", ["classifier", "inception.safetensors"])
def test_of_a_runs_own_images_only_what_is_seen_is_kept(
    config: Config, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 images of 512 pixels are 31 GB; a batch of them is 256 MiB."""
    assert batch_size_of(512, 3) * 3 * 512**2 * 4 <= 2**28 and batch_size_of(16, 1) == 256
    monkeypatch.setattr(reference, "batch_size_of", lambda *_: 2)
    config.evaluation.features = features
    monkeypatch.setattr(reference, "load_inception", lambda _: Means())
    still_source, read, held = reference.still_source, [], []

    def watched(*arguments):
        source = still_source(*arguments)
        batches = source.batches

        def counted(**options):
            for batch in batches(**options):
                read.append(weakref.ref(batch.pixel_values))
                held.append(sum(pixels() is not None for pixels in read))
                yield batch

        source.batches = counted
        return source

    monkeypatch.setattr(reference, "still_source", watched)
    _, found = own_reference(config, 3, no_bar)
    assert found.train is not None and len(found.train.features) == len(found.train.captions) == 20
    assert found.heldout is not None and found.count == 6
    assert set(found.heldout.captions) == {"a handwritten one", "a handwritten two"}
    assert len(read) == 13 and max(held) <= 2, "the one that is looked at, and the next one"


def test_a_run_on_several_shapes_is_compared_in_squares(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks are not asked for: the held-out images have none."""
    monkeypatch.setattr(reference, "load_inception", lambda _: Means())
    for number, file in enumerate(sorted(Path(str(config.data.path)).glob("*.png"))):
        Image.open(file).resize((20, 30) if number % 2 else (30, 20)).save(file)
    config.evaluation.features = "inception.safetensors"
    config.data = config.data.model_copy(update={"buckets": 2, "masks": True})
    _, found = own_reference(config, 3, no_bar)
    assert found.train is not None and len(found.train.features) == 20 and found.count == 6


def test_too_few_held_out_images_are_refused(config: Config, tmp_path: Path) -> None:
    config.evaluation.heldout = str(picture_folder(tmp_path / "three", 3))
    with pytest.raises(UserError, match="the run's held-out images: 3 images; allowed: at least 4"):
        own_reference(config, 3, no_bar)

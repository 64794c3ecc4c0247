"""Real pictures: their squares, their statistics, and the file in which these are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import FrechetDistance
from fastsp.evaluation.real_pictures import (
    RealStatistics,
    check_pictures,
    load_statistics,
    picture_files,
    real_features,
)


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


def test_statistics_are_as_good_as_the_features(tmp_path: Path) -> None:
    real, samples = seen(50, 0), seen(40, 1)
    statistics = RealStatistics.of(real, "corners", "a folder")
    expected = FrechetDistance(real.features)(samples.features)
    assert statistics.distance()(samples.features) == pytest.approx(expected, rel=1e-9)
    assert statistics.distance()(real.features) == pytest.approx(0, abs=1e-6)  # so the ground truth's 0.00 is no claim
    statistics.save(tmp_path / "kept.safetensors")
    kept = load_statistics(tmp_path / "kept.safetensors", "corners")
    assert kept.distance()(samples.features) == pytest.approx(expected, rel=1e-9)
    assert (kept.count, kept.score, kept.source) == (50, statistics.score, "a folder")


def test_pictures_of_several_sizes_keep_their_order(tmp_path: Path) -> None:
    """Of each the central square, upright, in colour."""
    for index, size in enumerate([(6, 4), (4, 6), (8, 8), (6, 4)]):
        picture = Image.new("RGB", size, (0, 0, 0))
        left, top = (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
        picture.putpixel((left, top), (255, 51 * index, 0))
        picture.save(tmp_path / f"{index}.png")
    Image.new("L", (4, 2), 255).save(tmp_path / "4.jpg")
    features = real_features(picture_files(tmp_path), Corners()).features
    assert features[:4, 3].tolist() == [4, 4, 8, 4] and features[4].tolist() == [1, 1, 1, 2]
    assert features[:4, 1] == pytest.approx(torch.arange(4) * 0.4 - 1)


def test_only_the_pictures_of_the_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert [file.name for file in picture_files(tmp_path, ["c.png", "a.png"])] == ["c.png", "a.png"]
    with pytest.raises(UserError, match=r"lacks d\.png, which the captions are of"):
        picture_files(tmp_path, ["a.png", "d.png"])
    (tmp_path / "d.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"d\.png cannot be read"):
        real_features(picture_files(tmp_path), Corners())
    with pytest.raises(UserError, match="there is no such folder"):
        picture_files(tmp_path / "nowhere")


def test_all_broken_pictures_are_found_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.png", "d.jpg"):
        Image.effect_noise((64, 64), 80).save(tmp_path / name)
    seen: list[int] = []
    check_pictures(picture_files(tmp_path), lambda: seen.append(1))
    assert len(seen) == 4
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:600])
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.jpg cannot be read: .* \(and 1 more\); mend or replace it$"):
        check_pictures(picture_files(tmp_path))


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("text", "model", "missing"):
        with pytest.raises(UserError, match="holds no statistics"):
            load_statistics(tmp_path / f"{name}.safetensors", "corners")
    RealStatistics.of(seen(9, 0), "inception-1", "a").save(tmp_path / "kept.safetensors")
    with pytest.raises(UserError, match="is of the features 'inception-1'; these are 'inception-2'"):
        load_statistics(tmp_path / "kept.safetensors", "inception-2")
    with pytest.raises(UserError, match="1 pictures; allowed: at least 2"):
        RealStatistics.of(seen(1, 0), "corners", "a")

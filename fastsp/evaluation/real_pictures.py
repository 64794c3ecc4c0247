"""What real pictures look like to a feature model: statistics of a folder, kept in a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.data.folder import FolderReader
from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import FrechetDistance, inception_score
from fastsp.files import new_file

CHUNK = 64  # pictures read at once


@dataclass(frozen=True)
class RealStatistics:
    """Of N pictures in one feature model.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), with N - 1 below.
        count: N.
        score: their own Inception Score; None where a file does not say.
        features: identity of the feature model.
        source: in words, which pictures.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    score: float | None
    features: str
    source: str

    @classmethod
    def of(cls, seen: Features, features: str, source: str) -> RealStatistics:
        """Statistics of pictures that were looked at."""
        if len(seen.features) < 2:
            raise UserError(f"reference {source}: {len(seen.features)} pictures; allowed: at least 2")
        covariance = torch.cov(seen.features.T)
        score = inception_score(seen.logits)
        return cls(seen.features.mean(0), covariance, len(seen.features), score, features, source)

    def distance(self) -> FrechetDistance:
        """FID against these pictures."""
        return FrechetDistance((self.mean, self.covariance, self.count))

    def save(self, file: Path) -> None:
        """Write a safetensors file: mean, covariance, count, inception_score; the words in its metadata."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        if self.score is not None:
            tensors["inception_score"] = torch.tensor(self.score, dtype=torch.float64)
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as unfinished:
            save_file(tensors, unfinished, metadata={"features": self.features, "source": self.source})


def load_statistics(file: Path, features: str) -> RealStatistics:
    """Statistics that were saved.

    Args:
        file: of :meth:`RealStatistics.save`.
        features: the identity that they have to be of.

    Raises:
        UserError: no such file, another kind of file, or of another feature model.
    """
    try:
        with safe_open(file, "pt") as found:
            facts = found.metadata() or {}
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        mean, covariance, count = tensors["mean"], tensors["covariance"], int(tensors["count"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"reference {file} holds no statistics (mean, covariance, count): {error}") from None
    if facts.get("features") != features:
        raise UserError(f"reference {file} is of the features {facts.get('features')!r}; these are {features!r}")
    score = float(tensors["inception_score"]) if "inception_score" in tensors else None
    return RealStatistics(mean, covariance, count, score, features, facts.get("source", file.name))


def picture_files(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The pictures of a folder, sorted; or those of these names, all of which have to be there.

    Raises:
        UserError: no such folder, no pictures, or one that is named is not there.
    """
    if not folder.is_dir():
        raise UserError(f"reference {folder}: there is no such folder or file")
    if not names:
        return [folder / path for path in FolderReader(folder, captioned=False).paths]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"reference {folder} lacks {file.name}, which the captions are of")
    return files


def check_pictures(files: Sequence[Path], advance: Callable[[], Any] = lambda: None) -> None:
    """Decode picture files, to name the broken ones before the feature model, which takes much longer, begins.

    Args:
        files: of images.
        advance: called for every picture.

    Raises:
        UserError: some are no pictures: names the first, and says how many more there are.
    """
    broken: list[str] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), CHUNK):
            for fault in pool.map(_fault, files[start : start + CHUNK]):
                broken += [fault] if fault is not None else []
                advance()
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{more}; mend or replace it")


def _fault(file: Path) -> str | None:
    """Why a file is no picture."""
    try:
        _square(file)
    except UserError as error:
        return str(error)
    return None


def real_features(files: Sequence[Path], model: FeatureModel, advance: Callable[[], Any] = lambda: None) -> Features:
    """What the model sees in picture files: the largest square in the middle of each, in its own resolution.

    Args:
        files: of images.
        model: looks at them; it does the resizing.
        advance: called for every picture.

    Raises:
        UserError: a file that is no picture.
    """
    features: list[Tensor] = [torch.empty(0)] * len(files)
    logits: list[Tensor] = [torch.empty(0)] * len(files)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), CHUNK):
            of_size = defaultdict(list)
            for place, picture in enumerate(pool.map(_square, files[start : start + CHUNK]), start):
                of_size[picture.shape].append((place, picture))
            for group in of_size.values():
                seen = model.extract(torch.stack([picture for _, picture in group]))
                for row, (place, _) in enumerate(group):
                    features[place], logits[place] = seen.features[row], seen.logits[row]
                    advance()
    return Features(torch.stack(features), torch.stack(logits))


def _square(file: Path) -> Tensor:
    """(3, S, S) float32 in [-1, 1]."""
    try:
        with Image.open(file) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises anything from OSError to struct.error at damaged files
        raise UserError(f"reference {file} cannot be read: {error}") from None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1

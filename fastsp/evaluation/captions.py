"""The captions to sample: COCO's file, or one caption a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsp.errors import UserError
from fastsp.utils.files import read_lines, read_text


@dataclass(frozen=True)
class CaptionSet:
    """Captions in the order in which they are sampled."""

    texts: Sequence[str]  # one for each image
    choice: str  # in words, which captions these are
    images: Sequence[str] = ()  # file names of the images that they describe; empty where none are named
    annotations: Sequence[int] = ()  # COCO's ids of the captions; empty for other files

    def facts(self) -> dict[str, str]:
        """For a row of the evaluation: the choice, and a digest of the captions themselves."""
        return {"captions": self.choice, "captions_sha256": hashlib.sha256("\n".join(self.texts).encode()).hexdigest()}

    def lines(self) -> str:
        """JSON lines: index, caption, and where it came from."""
        rows: list[dict[str, Any]] = [{"index": i, "caption": text} for i, text in enumerate(self.texts)]
        for key, values in (("image", self.images), ("annotation", self.annotations)):
            for row, value in zip(rows, values, strict=False):
                row[key] = value
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_captions(file: Path, count: int | None = None) -> CaptionSet:
    """The first captions of a file; `UserError` if it is not what it should be, or has fewer than asked for.

    Of COCO's ``captions_*.json``: the first ``count`` images in the order of the file, and of each the caption that
    stands first there; None: at most 10,000, as in the paper. Of a text file: its first lines, empty ones left out;
    None: all of them.
    """
    name = f"captions {file}"
    images: Sequence[str] = ()
    annotations: Sequence[int] = ()
    if file.suffix.lower() == ".json":
        texts, images, annotations = _of_coco(read_text(file, name), name)
        count = min(10_000, len(texts)) if count is None else count
        choice = f"of each of the first {count} images in file order the caption that stands first"
    else:
        texts = read_lines(file, name)
        count = len(texts) if count is None else count
        choice = f"the first {count} lines"
    if count > len(texts) or not texts:
        raise UserError(f"{name}: {count} are asked for, it has {len(texts)}; give --num-samples")
    return CaptionSet(texts[:count], f"{file.name}: {choice}", images[:count], annotations[:count])


def _of_coco(text: str, name: str) -> tuple[list[str], list[str], list[int]]:
    """Of each image that has captions, in the order of the file: the first one, the image's name, the caption's id."""
    try:
        tree = json.loads(text)
        first: dict[Any, tuple[str, int]] = {}
        for entry in tree["annotations"]:
            first.setdefault(entry["image_id"], (" ".join(entry["caption"].split()), entry["id"]))
        images = [image for image in tree["images"] if image["id"] in first]
        names = [str(image["file_name"]) for image in images]
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is broken JSON: {error}") from None
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{name} is not COCO's: it lacks images (id, file_name) or annotations (id, image_id, caption)"
        ) from None
    texts, numbers = zip(*(first[image["id"]] for image in images), strict=True) if images else ((), ())
    return list(texts), names, list(numbers)

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
    """Captions in the order in which they are sampled.

    Attributes:
        texts: one for each image.
        choice: in words, which captions these are.
        images: file names of the images that they describe; empty where none are named.
        annotations: COCO's ids of the captions; empty for other files.
    """

    texts: Sequence[str]
    choice: str
    images: Sequence[str] = ()
    annotations: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def facts(self) -> dict[str, str]:
        """For a row of the evaluation: the choice, and a digest of the captions themselves."""
        digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
        return {"captions": self.choice, "captions_sha256": digest}

    def lines(self) -> str:
        """JSON lines: index, caption, and where it came from."""
        rows: list[dict[str, Any]] = [{"index": i, "caption": text} for i, text in enumerate(self.texts)]
        for key, values in (("image", self.images), ("annotation", self.annotations)):
            for row, value in zip(rows, values, strict=False):
                row[key] = value
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_captions(file: Path, count: int | None = None) -> CaptionSet:
    """The first captions of a file.

    Of COCO's ``captions_*.json``: the first ``count`` images in the order of the file, and of each the caption that
    stands first there. Of a text file: its first lines, empty ones left out.

    Args:
        file: JSON by its suffix, else text.
        count: how many; None: all of a text file, 10,000 images of COCO's, as in the paper, or all if it has fewer.

    Raises:
        UserError: no such file, not what it should be, or fewer captions than asked for.
    """
    name = f"captions {file}"
    if file.suffix.lower() == ".json":
        found = _of_coco(read_text(file, name), name, file.name)
        count = min(10_000, len(found)) if count is None else count
    else:
        found = CaptionSet(read_lines(file, name), f"{file.name}: the first {{count}} lines")
    count = len(found) if count is None else count
    if count > len(found) or not found.texts:
        raise UserError(f"{name}: {count} are asked for, it has {len(found)}; give --num-samples")
    choice = found.choice.replace("{count}", str(count))
    return CaptionSet(found.texts[:count], choice, found.images[:count], found.annotations[:count])


def _of_coco(text: str, name: str, file_name: str) -> CaptionSet:
    """Every image that has a caption, in the order of the file, with its first one."""
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
    chosen = [first[image["id"]] for image in images]
    choice = f"{file_name}: of each of the first {{count}} images in file order the caption that stands first"
    return CaptionSet([text for text, _ in chosen], choice, names, [number for _, number in chosen])

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

    rows: Sequence[dict[str, Any]]  # caption; of COCO's also image, its file's name, and annotation, the caption's id
    choice: str  # in words, which captions these are

    @property
    def texts(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    def facts(self) -> dict[str, str]:
        """For a row of the evaluation: the choice, and a digest of the captions themselves."""
        return {"captions": self.choice, "captions_sha256": hashlib.sha256("\n".join(self.texts).encode()).hexdigest()}

    def lines(self) -> str:
        """JSON lines: index, caption, and where it came from."""
        rows = ({"index": index, **row} for index, row in enumerate(self.rows))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_captions(file: Path, count: int | None = None) -> CaptionSet:
    """The first captions of a file; `UserError` if it is not what it should be, or has fewer than asked for.

    Of COCO's ``captions_*.json``: the first ``count`` images in the order of the file, and of each the caption that
    stands first there; None: at most 10,000, as in the paper. Of a text file: its first lines, empty ones left out;
    None: all of them.
    """
    name = f"captions {file}"
    if file.suffix.lower() == ".json":
        rows = _of_coco(read_text(file, name), name)
        count = min(10_000, len(rows)) if count is None else count
        choice = f"of each of the first {count} images in file order the caption that stands first"
    else:
        rows = [{"caption": line} for line in read_lines(file, name)]
        count = len(rows) if count is None else count
        choice = f"the first {count} lines"
    if count > len(rows) or not rows:
        raise UserError(f"{name}: {count} are asked for, it has {len(rows)}; give --num-samples")
    return CaptionSet(rows[:count], f"{file.name}: {choice}")


def _of_coco(text: str, name: str) -> list[dict[str, Any]]:
    """Of each image that has captions, in the order of the file, the one that stands first."""
    try:
        tree = json.loads(text)
        first: dict[Any, dict[str, Any]] = {}
        for entry in tree["annotations"]:
            row = {"caption": " ".join(entry["caption"].split()), "annotation": entry["id"]}
            first.setdefault(entry["image_id"], row)
        images = (image for image in tree["images"] if image["id"] in first)
        return [{"image": str(image["file_name"]), **first[image["id"]]} for image in images]
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is broken JSON: {error}") from None
    except (TypeError, KeyError, AttributeError):
        lacking = "images (id, file_name) or annotations (id, image_id, caption)"
        raise UserError(f"{name} is not COCO's: it lacks {lacking}") from None

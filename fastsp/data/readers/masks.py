"""Which files are masks of pictures: `NAME-masklabel.png`, as OneTrainer has them, and `NAME.mask.png`, of any suffix
that pictures have; in tars too, where `KEY.mask.png` is the usual form."""

from __future__ import annotations

from fastsp.data.readers.names import IMAGE_SUFFIXES, nfc, split_name

ENDS = ("-masklabel", ".mask")  # of a mask's name without its suffix


def key_of_mask(name: str) -> str | None:
    """The name without suffix of the picture that a file is a mask of; None: it is no mask."""
    key, suffix = split_name(nfc(name))
    end = next((end for end in ENDS if key.endswith(end) and len(key) > len(end)), None)
    return key.removesuffix(end) if end is not None and suffix in IMAGE_SUFFIXES else None


def note_on_masks(pictures: int, masked: int) -> str:
    """For a run's first lines."""
    return f"{masked} of {pictures} pictures have a mask; the others count everywhere"

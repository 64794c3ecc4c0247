"""Turning images upright: the orientation that cameras note in EXIF."""

from __future__ import annotations

from torch import Tensor

# By EXIF orientation: whether height and width change places, and which axes are mirrored after that.
TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def upright(image: Tensor, orientation: int) -> Tensor:
    """Turn and mirror an image as its EXIF orientation says.

    Args:
        image: (H, W, C), on any device.
        orientation: 1 .. 8; 1 is upright.

    Returns:
        (H, W, C) or (W, H, C), contiguous; the image itself where it is upright.
    """
    swapped, mirrored = TURNS[orientation]
    turned = image.transpose(0, 1) if swapped else image
    return (turned.flip(mirrored) if mirrored else turned).contiguous()

"""What every source delivers to the trainer: one batch type, whatever the data came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one optimizer step, in the order of their positions. B samples, C channels, L tokens.

    A sample whose data is bad keeps its position, so that every shape stays fixed and a resumed run sees the same
    order; its weight is 0, its pixels are those of a black image and its caption is empty.
    """

    positions: Tensor  # (B,) int64 on the CPU: positions of the samples in the run, the counters of every random draw
    weights: Tensor  # (B,) float32: 1, or 0 for a sample that was rejected
    captions: tuple[str, ...]  # the B captions as text
    input_ids: Tensor | None = None  # (B, L) int64: token ids of the captions, padded; None without a tokenizer
    input_ids_2: Tensor | None = None  # (B, L) int64: those of a second tokenizer, of Stable Diffusion XL, 3 and FLUX
    input_ids_3: Tensor | None = None  # (B, L) int64: those of Stable Diffusion 3's third tokenizer
    pixel_values: Tensor | None = None  # (B, C, H, W) float32 in [-1, 1] on the source's device, channels_last
    moments: Tensor | None = None  # (B, 2 C, H, W): mean and log variance of the VAE's posterior; of latents
    text_features: Tensor | None = None  # (B, L, D) of the text encoders, computed beforehand; else encode `input_ids`
    pooled_text_features: Tensor | None = None  # (B, P): the pooled ones beside them, of all but Stable Diffusion 1, 2
    original_sizes: Tensor | None = None  # (B, 2) int64: height and width before resizing, upright, for SDXL
    masks: Tensor | None = None  # (B, H, W) float32: weights of places in the loss; of pixels, or of latents
    crop_offsets: Tensor | None = None  # (B, 2) int64: top and left of the crop in the resized, perhaps mirrored image
    parts: tuple[Batch, ...] = ()  # of one shape each, where there are several; then only they hold what is optional

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> Batch:
        """The samples of a slice of a batch of one shape, as views."""
        assert not self.parts
        return replace(self, **{name: value[rows] for name, value in self._fields().items()})

    @property
    def token_ids(self) -> list[Tensor]:
        """Those of each tokenizer."""
        return [ids for ids in (self.input_ids, self.input_ids_2, self.input_ids_3) if ids is not None]

    def microbatches(self, size: int | None) -> Iterator[Batch]:
        """Slices of `size` samples of one shape, the last one of a shape perhaps smaller; None: as large as can be."""
        for part in self.parts:
            yield from part.microbatches(size)
        if self.parts:
            return
        size = size or len(self)
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def image_shapes(self) -> set[tuple[int, ...]]:
        """Those of the samples' images, or of what the VAE made of them."""
        images = self.moments if self.moments is not None else self.pixel_values
        own = set() if images is None else {tuple(images.shape[1:])}
        return own.union(*(part.image_shapes() for part in self.parts))

    def pinned(self) -> Batch:
        """The batch with what lies in the CPU's memory page-locked, so that copies of it to a GPU do not wait."""
        return self._mapped(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with everything the networks read on `device`; positions stay on the CPU.

        The current stream may read it: memory of another one, where images are decoded, is kept until it has.
        """
        read = {name: tensor for name, tensor in self.tensors().items() if name != "positions"}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in read.items()}
        for tensor in moved.values():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return replace(self, **moved, parts=tuple(part.to(device) for part in self.parts))

    def copy_to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on `device`, in separate memory."""
        return self._mapped(lambda tensor: tensor.to(device, copy=True))

    def tensors(self) -> dict[str, Tensor]:
        """What there is of the data, by field; all but captions and parts."""
        return {name: value for name, value in self._fields().items() if isinstance(value, Tensor)}

    def _mapped(self, function: Callable[[Tensor], Any]) -> Batch:
        mapped = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **mapped, parts=tuple(part._mapped(function) for part in self.parts))

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None and name != "parts"}

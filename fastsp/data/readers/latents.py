"""Latents that were computed once: their layout on disk.

A data set of latents is a folder with `latents.json`, the header, and tars `00000.tar`, `00001.tar`, ... in WebDataset
layout. Each sample is `KEY.safetensors` and `KEY.txt`, its caption. The tensors are `moments` (2 C, H, W), mean and log
variance of the VAE's posterior, `original_size` (2,) and `crop_offset` (2,) int64 and, if asked for, `text_features`
(L, D) and Stable Diffusion XL's `pooled_text_features` (P,). The moments are as the VAE gives them: the scaling factor
is applied when a latent is drawn. With masks
`mask` (H, W) weights the latents' places. A sample that could not be encoded keeps its place, so that the order of an
epoch is that of the pictures: its `KEY.safetensors` holds no tensors, and the reason under "bad" in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.readers.shards import ShardReader
from fastsp.data.repeats import Share
from fastsp.data.samples import BadSample
from fastsp.errors import UserError
from fastsp.utils.files import read_text, write_file

TEXT_TENSORS = ("text_features", "pooled_text_features")
HEADER = "latents.json"
VERSION = 1
_MAY_BE_NULL = ("captioned", "names_sha256")  # in a header: not compared then
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def bad_sample(reason: str, shape: tuple[int, int] | None = None) -> bytes:
    """What stands in the place of a sample that could not be encoded: safetensors without a tensor. With buckets it has
    a shape all the same, that of the latents."""
    if shape is None:
        return save({}, metadata={"bad": reason})
    # By hand: of several entries `save` writes now this one first, now another, and encoding again must give the same.
    header = json.dumps({"__metadata__": {"bad": reason, "shape": json.dumps(shape)}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def latents_size(head: bytes) -> tuple[int, int] | None:
    """Height and width of a sample's latents by its first bytes; (0, 0): they do not say, None: more are needed."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 + length:
        return None
    with suppress(ValueError, KeyError, TypeError):
        header = json.loads(head[8 : 8 + length])
        place = header["moments"]["shape"][1:] if "moments" in header else json.loads(header["__metadata__"]["shape"])
        height, width = map(int, place)
        return height, width
    return 0, 0


def find(config: DataConfig) -> Callable[[bool], LatentReader]:
    """A folder of latents that fit a configuration and are whole, see `fastsp.data.config.register`."""
    folder = Path(config.folder()).expanduser()
    header = LatentsHeader.load(folder)
    header.check(config)
    shards = [shard_path(folder, shard) for shard in range(header.shards)]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise UserError(
            f"data.path is {config.path!r}; {len(missing)} of {len(shards)} shards are missing, such as "
            f"{missing[0].name}: put back what was there, or let fastsp encode make it"
        )
    return lambda progress: LatentReader(header, shards, not config.unconditional, progress, config.repeats is not None)


class LatentReader(ShardReader):
    """The samples of a folder of latents, in the order of the pictures that they were made of."""

    suffixes = ("safetensors",)
    size_of = staticmethod(latents_size)

    def __init__(self, header: LatentsHeader, shards: Sequence[Path], captioned: bool, progress: bool, repeated: bool):
        super().__init__(shards, captioned, progress)
        self.header = header
        self.repeats = header.repeats if repeated else ()

    def sizes(self, workers: int, progress: bool) -> Tensor:
        """(N, 2) int64, heights and widths of the encoded images in pixels, upright; 0 where they are not known."""
        return super().sizes(workers, progress) * self.header.scale_factor

    def check(self, content: bytes) -> None:
        """Refuse what stands in the place of a bad sample."""
        if int.from_bytes(content[:8], "little") != len(content) - 8:  # more than a header
            return
        with suppress(ValueError, KeyError, TypeError):
            raise BadSample(f"could not be encoded: {json.loads(content[8:])['__metadata__']['bad']}")


@dataclass(frozen=True)
class LatentsHeader:
    """What a data set of latents holds. Pins the VAE, the pixels' resolution and the dtype."""

    vae: str  # where the VAE came from, for messages
    vae_sha256: str  # its `fingerprint`
    resolution: int  # side of the encoded images, in pixels
    dtype: str  # of moments and text features: "float16", "bfloat16" or "float32"
    moments_shape: tuple[int, ...]  # (2 C, H, W)
    text_shape: tuple[int, ...] | None  # (L, D) of the text features; None: there are none
    source_samples: int  # samples that were to be encoded, bad ones included
    samples_per_shard: int
    pooled_text_shape: tuple[int, ...] | None = None  # (P,) of Stable Diffusion XL's pooled text features
    text_sha256: str | None = None  # `fingerprint` of the text encoders, where there are text features
    captioned: bool | None = None  # whether samples, and text features, have captions; None: of an earlier version
    names_sha256: str | None = None  # `Source.names_sha256` of what was encoded: no other pictures are added to it
    repeats: tuple[Share, ...] = ()  # how often samples come in an epoch, where that was configured
    buckets: int | str = "off"  # `data.buckets`
    shapes: tuple[tuple[int, int], ...] = ()  # with buckets, heights and widths in pixels; moments_shape is the first's
    masked: bool = False  # whether there are masks, of the latents' places
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many tars the whole data set has."""
        return -(-self.source_samples // self.samples_per_shard)

    @property
    def scale_factor(self) -> int:
        """Pixels of an image's side for one of the latents' side."""
        return (self.shapes[0][0] if self.shapes else self.resolution) // self.moments_shape[1]

    def placeholder(self, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """A sample of zeros, in the shapes and dtypes of every sample, or with buckets of those of one shape."""
        dtype, pair, moments_shape = DTYPES[self.dtype], torch.zeros(2, dtype=torch.int64), self.moments_shape
        if shape is not None:
            moments_shape = (moments_shape[0], *(side // self.scale_factor for side in shape))
        tensors = {"moments": torch.zeros(moments_shape, dtype=dtype), "original_size": pair, "crop_offset": pair}
        if self.masked:
            tensors["mask"] = torch.zeros(moments_shape[1:], dtype=dtype)
        shapes = zip(TEXT_TENSORS, (self.text_shape, self.pooled_text_shape), strict=True)
        return tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes if shape is not None}

    def check(self, config: DataConfig, vae_sha256: str | None = None, text_sha256: str | None = None) -> None:
        """Refuse a configuration that these latents do not fit: UserError names the key, its value and the header's."""
        fixed_by = {"resolution": self.resolution, "buckets": self.buckets, "crop": "center", "flip": False}
        for key, value in fixed_by.items():
            given, fixed = str(getattr(config, key)).lower(), str(value).lower()
            if given != fixed:
                of_the_latents = f"of the latents in {config.path} it is {fixed}"
                raise UserError(f"data.{key} is {given}; {of_the_latents}: add data.{key}={fixed}")
        if config.masks and not self.masked:
            raise UserError(f"data.masks is true; the latents in {config.path} were encoded without masks")
        if vae_sha256 is not None and vae_sha256 != self.vae_sha256:
            raise UserError(f"the latents in {config.path} come from another VAE than the model's: {self.vae}")
        if self.captioned is False and not config.unconditional:
            raise UserError(f"data.unconditional is false; the latents in {config.path} were encoded without captions")
        if self.text_shape is not None and self.captioned and config.unconditional:
            raise UserError(f"data.unconditional is true; the text features in {config.path} are of captions")
        if self.text_shape is not None and config.captions is not None:
            fixed = f"the latents in {config.path} hold text features"
            raise UserError(f"data.captions is set, but {fixed} of captions as they were: add data.captions=null")
        if None not in (text_sha256, self.text_sha256) and text_sha256 != self.text_sha256:
            raise UserError(
                f"the text features in {config.path} come from other text encoders than the model's, or are of "
                "another length, or come with other model.token_chunks or model.clip_skip"
            )

    def save(self, folder: Path) -> None:
        """Write it, or see that the folder already has the same; UserError where it has another one, of which the first
        key that differs is named, or other files."""
        folder.mkdir(parents=True, exist_ok=True)
        others = [path for path in folder.iterdir() if path.name != "bad_samples.jsonl" and path.name[0] != "."]
        if others and not (folder / HEADER).exists():  # asked afterwards: another process writes it before its shards
            raise UserError(f"{folder} holds other files, such as {others[0].name}, and no latents; use another folder")
        if (folder / HEADER).exists():
            existing = asdict(LatentsHeader.load(folder))
            for key, value in asdict(self).items():
                if existing[key] != value and not (key in _MAY_BE_NULL and existing[key] is None):
                    other = f"with {key} = {existing[key]}, not {value}"
                    held = "of pictures with other names" if key == "names_sha256" else other
                    raise UserError(f"{folder} holds latents {held}; use another folder")
            return
        write_file(folder / HEADER, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> LatentsHeader:
        """The header of a folder of latents; UserError where there is none, or it cannot be read."""
        path = Path(folder).expanduser() / HEADER
        if not path.is_file():
            raise UserError(f"data.path is {str(folder)!r}; it must be written by fastsp encode, with {HEADER}")
        try:
            fields = json.loads(read_text(path))
            fields.pop("contents_sha256", None)  # of earlier versions
            fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
            fields["repeats"] = tuple(Share(*share) for share in fields.get("repeats", ()))
            fields["shapes"] = tuple((height, width) for height, width in fields.get("shapes", ()))
            header = cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if header.version != VERSION:
            raise UserError(f"{path} has version {header.version}; this fastsp reads {VERSION}")
        return header


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.tar"

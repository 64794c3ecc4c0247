"""The `data` section of a configuration, and all that a source is told. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fastsp.errors import UserError
from fastsp.utils.section import Fraction, NonNegative, PathText, Positive, Section

SOURCES = {
    "digits": "fastsp.data.readers.digits:find",
    "images": "fastsp.data.readers.folder:find",
    "shards": "fastsp.data.readers.shards:find",
    "latents": "fastsp.data.readers.latents:find",
    "arrow": "fastsp.data.readers.arrow:find",
}


def register(name: str, find: str) -> None:
    """Let `data.source` be `name`.

    `find` is "MODULE:FUNCTION", imported when it is needed. The function takes a `DataConfig`, raises UserError where
    there is nothing to read, and returns what opens it, as a function of whether to show the progress: a
    `fastsp.data.samples.SampleReader`.
    """
    SOURCES[name] = find


def _known(source: str) -> str:
    if source not in SOURCES:
        raise ValueError(f"input should be {' or '.join(map(repr, SOURCES))}")
    return source


def _off(buckets: object) -> object:
    if buckets is False or buckets == "off":  # `off` means false in YAML
        return "off"
    if type(buckets) is not int or buckets < 1:
        raise ValueError("input should be off, or how many shapes at most")
    return buckets


Buckets = Annotated[Literal["off"] | Positive, BeforeValidator(_off)]


class CaptionsConfig(Section):
    """What becomes of captions in training, drawn anew for every position; see :mod:`fastsp.data.captions`."""

    several: bool = False  # each line of a text, and each item of a JSON list, is a caption of its own; one is drawn
    shuffle_tags: bool = False
    tag_dropout: Fraction = 0.0  # probability of each tag
    keep_tags: NonNegative = 0  # the first so many are neither moved nor dropped
    separator: Annotated[str, Field(min_length=1)] = ","  # of tags
    trigger: Annotated[str, Field(min_length=1)] | None = None  # put before every caption that does not start with it

    @property
    def draws_tags(self) -> bool:
        """Whether tags are moved or dropped."""
        return self.shuffle_tags or self.tag_dropout > 0


class DataConfig(Section):
    """What the run is trained on."""

    source: Annotated[str, AfterValidator(_known)]
    path: PathText | list[PathText] | None = None  # a folder, or shard patterns; not for digits
    split: Literal["train", "heldout"] = "train"  # for digits
    resolution: Positive  # side of the square images, pixels; with buckets, of a square of their area
    buckets: Buckets = "off"  # at most so many shapes instead of one square; see fastsp.data.buckets
    crop: Literal["center", "random"] = "center"
    flip: bool = False  # mirror half of the samples
    batch_size: Positive  # samples of one optimizer step, over all ranks
    microbatch: Positive | None = None  # samples of one forward; None: the rank's whole share
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt
    captions: CaptionsConfig | None = None  # None: as they are, of a JSON list the first
    unconditional: bool = False  # every caption is empty
    # how often pictures come in an epoch: as `10_name`, their folder, says, or by folder; see fastsp.data.repeats
    repeats: Literal["folders"] | dict[str, Positive] | None = None
    masks: bool = False  # a mask beside a picture weights its places in the loss; see fastsp.data.readers.masks
    unmasked_weight: Fraction = 0.0  # of what a mask hides
    max_bad_fraction: Fraction = 0.01  # of the source; see fastsp.data.bad_samples
    workers: Positive = 8  # threads that read files
    threads: NonNegative = 0  # CPU threads of the decoder; 0: one per core
    prefetch: Positive = 2  # batches ready ahead of the training
    in_memory: bool = False  # decode every picture once and keep all on the device, which small data sets allow

    @model_validator(mode="after")
    def _pictures_stay_the_same(self) -> Self:
        if self.in_memory and (self.crop == "random" or self.flip or self.source == "latents"):
            raise ValueError("in_memory: true needs crop: center, flip: false and a source of pictures")
        if self.in_memory and self.buckets != "off":
            raise ValueError("in_memory: true keeps pictures of one shape: it needs buckets: off")
        return self

    @property
    def group(self) -> int:
        """Samples in a row that have one shape, with buckets."""
        return self.microbatch or self.batch_size

    def given_path(self) -> str | list[str]:
        """`path`, of a source that needs one and has no splits; else UserError."""
        if self.split != "train":
            raise UserError(f"data.split is {self.split!r}, but only the digits have splits: give a path")
        if self.path is None:
            raise UserError(f"data.path is missing; data.source {self.source!r} needs one")
        return self.path

    def folder(self) -> str:
        """The one folder that `path` is; else UserError."""
        path = self.given_path()
        if not isinstance(path, str):
            raise UserError(f"data.path is {path!r}; data.source {self.source!r} needs one folder")
        return path

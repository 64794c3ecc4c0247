"""The `data` section of a configuration, and all that a source is told. Imports no torch."""

from __future__ import annotations

from typing import Literal

from fastsp.utils.section import Fraction, NonNegative, PathText, Positive, Section


class DataConfig(Section):
    """What the run is trained on."""

    source: Literal["digits", "images", "shards", "latents"]
    path: PathText | list[PathText] | None = None  # a folder, or shard patterns; not for digits
    split: Literal["train", "heldout"] = "train"  # for digits
    resolution: Positive  # side of the square images, pixels
    crop: Literal["center", "random"] = "center"
    flip: bool = False  # mirror half of the samples
    batch_size: Positive  # samples of one optimizer step, over all ranks
    microbatch: Positive | None = None  # samples of one forward; None: the rank's whole share
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt
    unconditional: bool = False  # every caption is empty
    max_bad_fraction: Fraction = 0.01  # of the source; see fastsp.data.bad_samples
    workers: Positive = 8  # threads that read files
    threads: NonNegative = 0  # CPU threads of the decoder; 0: one per core
    prefetch: Positive = 2  # batches ready ahead of the training

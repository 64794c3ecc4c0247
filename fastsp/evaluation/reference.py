"""The real pictures of a run: what it was trained on and what was held out, as its own data pipeline delivers them."""

from contextlib import closing

import torch

from fastsp.config import DataConfig
from fastsp.data.source import open_source
from fastsp.errors import UserError
from fastsp.evaluation.picture_set import Pictures

MAX_PICTURES = 10_000  # of each set: bounds memory, and the paper's FID uses as many


def training_pictures(data: DataConfig, channels: int) -> Pictures:
    """The first pictures of the run's source, at most 10,000, cropped at the centre and not mirrored.

    Args:
        data: of the run.
        channels: 1 (grey) or 3 (RGB).
    """
    return _read(data, channels)


def heldout_pictures(data: DataConfig, channels: int, path: str | list[str] | None) -> Pictures:
    """Pictures that were not trained on; arguments and errors are those of `heldout_data`."""
    return _read(heldout_data(data, path), channels)


def heldout_data(data: DataConfig, path: str | list[str] | None) -> DataConfig:
    """Where they are: the digits' own split, or what `evaluation.heldout` names.

    Raises:
        UserError: other data than the digits and no path.
    """
    if data.source == "digits":
        return data.model_copy(update={"split": "heldout"})
    if path is None:
        raise UserError(
            f"evaluation.heldout is missing; data.source={data.source} has no held-out split of its own: give a path "
            "of the same kind as data.path, or set evaluation.enabled=false"
        )
    return data.model_copy(update={"path": path})


def _read(data: DataConfig, channels: int) -> Pictures:
    """One epoch, or its first 10,000, without the samples that cannot be decoded; captions even if trained without."""
    still = {"crop": "center", "flip": False, "unconditional": False, "max_bad_fraction": 1.0}
    source = open_source(data.model_copy(update=still), tokenizer=None, channels=channels, seed=0)
    images, captions = [], []
    batches = source.batches(last_position=min(len(source), MAX_PICTURES), batch_size=min(len(source), 256))
    with closing(batches):
        for batch in batches:
            whole = (batch.weights > 0).nonzero().flatten()
            assert batch.pixel_values is not None
            images.append(batch.pixel_values[whole].cpu())
            captions += [batch.captions[row] for row in whole.tolist()]
    return Pictures(torch.cat(images), captions if any(captions) else ())

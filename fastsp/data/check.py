"""`fastsp data check`: read a source once, as training would, and say what is in it."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsp.data.bad_samples import too_many, too_many_lost
from fastsp.data.buckets import bucket_lines
from fastsp.data.config import DataConfig
from fastsp.data.order import SampleOrder
from fastsp.data.readers.digits import SPLITS
from fastsp.data.readers.latents import HEADER
from fastsp.data.readers.names import IMAGE_SUFFIXES, split_name
from fastsp.data.repeats import Share, epoch_length, repeats_lines, shares_of
from fastsp.data.source import Source, open_source
from fastsp.errors import UserError
from fastsp.utils.progress import steps_bar

BATCH_SIZE = 64
LONG_CAPTION = 300  # characters: four for a token, or a little more
SHEET_IMAGES = 64
THUMBNAIL = 128  # pixels


def config_for(source: str, resolution: int, split: str | None = None, repeats: str | None = None) -> DataConfig:
    """What a person's SOURCE means: "digits", a folder of images, or shards (a tar, a folder of them, a pattern).

    A folder with images in it is one of images, though there may be tars in it too. UserError: there is nothing at
    SOURCE, it holds latents, or it has no such split. `repeats` is "folders", or NAME=TIMES with commas between them.
    """
    folder = Path(source).expanduser()
    if split is not None and (source != "digits" or split not in SPLITS):
        raise UserError(f"--split is {split!r}; allowed: {' and '.join(SPLITS)}, and only with the digits")
    if source == "digits":
        kind = "digits"
    elif (folder / HEADER).is_file():
        raise UserError(f"{source} holds latents, written by fastsp encode: give the pictures that were encoded")
    elif folder.is_dir() and (_holds_images(folder) or not any(folder.glob("*.tar"))):
        kind = "images"
    elif not folder.exists() and not set(source) & set("*?[{"):
        raise UserError(f"{source} does not exist: give a folder of images, tars, a folder of tars or 'digits'")
    else:
        kind = "shards"
    options: dict[str, Any] = {"split": split} if split else {"path": source} if kind != "digits" else {}
    if repeats is not None:
        options["repeats"] = _repeats(repeats, kind)
    return DataConfig.model_validate({"source": kind, "resolution": resolution, "batch_size": BATCH_SIZE, **options})


def _repeats(text: str, kind: str) -> str | dict[str, int]:
    found = [part.rpartition("=") for part in text.split(",")]
    if kind != "images" or (text != "folders" and not all(name and n.isdecimal() and int(n) for name, _, n in found)):
        raise UserError(f"--repeats is {text!r}; allowed: folders, or such as cats=10,dogs=5, for a folder of images")
    return text if text == "folders" else {name: int(times) for name, _, times in found}


def _holds_images(folder: Path) -> bool:
    visible = (path for path in folder.rglob("*") if "/." not in f"/{path.relative_to(folder)}")
    return any(split_name(path.name)[1] in IMAGE_SUFFIXES for path in visible)


def check_source(config: DataConfig, limit: int | None = None) -> tuple[dict[str, Any], Tensor, list[str]]:
    """Read a source once, in the order of the first epoch of seed 0, or its first `limit` samples.

    Bad samples never stop this, whatever `max_bad_fraction` is. UserError: there is nothing to read.

    Returns:
        The report, as it is written to JSON; and for a contact sheet the first good images, (N, 3, S, S) float32 in
        [-1, 1] with N up to 64 and S at most 128, and their labels: file names, or keys in a shard, and captions.

        Keys of the report: `samples`, bad ones included, of which `read` were read; `bad`, names and reasons; `lost`,
        samples that damaged shards have lost, at least; `epoch`, samples in one with repeats, and `repeats` by folder;
        `notes`, pairs of a file and what may surprise though nothing is lost; of the good images `heights` and `widths`
        in pixels, upright; `smaller_than_resolution`, how many are enlarged; `buckets`, with buckets a line for each
        shape and one for what is cropped away; `caption_characters`; `images_per_second`, decoded in this process;
        `seconds`; `stop`, why a run would stop, or None. Sizes and lengths are `smallest`, `median` and `largest`.
    """
    once = config.model_copy(update={"max_bad_fraction": 1.0, "in_memory": False})
    source = open_source(once, tokenizer=None, channels=3, seed=0, repeat=False, progress=True)
    shares = shares_of(source.reader)
    source.order, source.group = SampleOrder(len(source), seed=0), None  # with buckets too, each once
    count = min(len(source), limit or len(source))
    sizes: list[Tensor] = []
    lengths: list[int] = []
    images: list[Tensor] = []
    labels: list[str] = []
    side = min(THUMBNAIL, config.resolution)
    enlarged = 0
    start = time.perf_counter()
    batches = source.batches(batch_size=BATCH_SIZE, last_position=count)
    with closing(batches), steps_bar("read", count) as advance:
        for batch in chain.from_iterable(mixed.microbatches(None) for mixed in batches):
            good = batch.weights.nonzero()[:, 0]
            assert batch.original_sizes is not None and batch.pixel_values is not None
            sizes.append(batch.original_sizes[good])
            enlarged += int((sizes[-1] < torch.tensor(batch.pixel_values.shape[2:])).any(1).sum())
            captions = [batch.captions[row] for row in good.tolist()]
            lengths += map(len, captions)
            if len(labels) < SHEET_IMAGES:
                images.append(_thumbnails(batch.pixel_values[good], side))
                names = map(source.reader.name, source.order(batch.positions[good]).tolist())
                files = [re.sub(r".*(/|[.]tar#)", "", name) for name in names]
                labels += [f"{file}: {text}" for file, text in zip(files, captions, strict=True)]
            advance(len(batch))
    seconds = time.perf_counter() - start
    heights, widths = torch.cat(sizes).unbind(1)
    report = {
        "samples": len(source),
        "read": count,
        "bad": dict(source.bad_samples.reasons),
        "lost": source.reader.lost,
        "epoch": epoch_length(source.reader),
        "repeats": [share._asdict() for share in shares],
        "notes": _notes(config, source, lengths),
        "heights": _spread(heights.tolist()),
        "widths": _spread(widths.tolist()),
        "smaller_than_resolution": enlarged,
        "buckets": [] if source.buckets is None else [*bucket_lines(source.buckets)],
        "caption_characters": _spread(lengths),
        "images_per_second": count / seconds,
        "seconds": seconds,
        "stop": _stop(source, count, config.max_bad_fraction),
    }
    return report, torch.cat(images)[:SHEET_IMAGES], labels[:SHEET_IMAGES]


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report of `check_source` as text."""

    def spread(name: str) -> str:
        of = report[name]
        return f"{of['smallest']:g} to {of['largest']:g}, median {of['median']:g}" if of else "no"

    part = f", of which {report['read']} read" if report["read"] < report["samples"] else ""
    rows = {
        "samples": f"{report['samples']}{part}",
        "heights": f"{spread('heights')} pixels",
        "widths": f"{spread('widths')} pixels",
        "enlarged": f"{report['smaller_than_resolution']} images are smaller than the resolution",
        "captions": f"{spread('caption_characters')} characters",
        "speed": f"{report['images_per_second']:.0f} images/s ({report['seconds']:.1f} s)",
    }
    lines = [f"{name:<18}{text}" for name, text in rows.items()]
    if report["buckets"]:
        lines += [f"{'buckets':<18}width x height: images", *(f"  {line}" for line in report["buckets"])]
    if shares := [Share(**share) for share in report["repeats"]]:
        lines += [f"{'repeats':<18}{report['epoch']} samples an epoch", *(f"  {x}" for x in repeats_lines(shares))]
    for name, found in (("bad", report["bad"].items()), ("notes", report["notes"])):
        lines += [f"{name:<18}{len(found)}", *(f"  {where}: {what}" for where, what in sorted(found))]
    return lines


def _notes(config: DataConfig, source: Source, lengths: list[int]) -> list[tuple[str, str]]:
    """What the reader notes, and what may be wrong with the source as a whole."""
    notes = list(source.reader.notes)
    if long := sum(length > LONG_CAPTION for length in lengths):
        limit = f"more than {LONG_CAPTION} characters: Stable Diffusion's text encoders read 77 tokens, no more"
        notes.append(("captions", f"{long} of {limit}"))
    if config.source == "images" and (tars := len(list(Path(str(config.path)).glob("*.tar")))):
        notes.append((str(config.path), f"read as a folder of images; the {tars} tars in it are '{config.path}/*.tar'"))
    return notes


def _thumbnails(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side), of another shape with white margins."""
    height, width = (max(1, round(side * each / max(images.shape[2:]))) for each in images.shape[2:])
    small = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(small, (left, side - width - left, top, side - height - top), value=1.0)


def _spread(numbers: Sequence[float]) -> dict[str, float] | None:
    if not numbers:
        return None
    return {"smallest": min(numbers), "median": statistics.median(numbers), "largest": max(numbers)}


def _stop(source: Source, read: int, limit: float) -> str | None:
    """Why a run would stop that finds in all of the source what was found in the samples read; None: it would not."""
    size = len(source)
    bad = source.bad_samples.met_before(read) - source.bad_samples.met_before(0)
    why = too_many_lost(source.reader.lost, size, limit)
    if why is None and too_many(bad * size // read, size, limit):
        why = f"{bad} of {read} samples are bad ({bad / read:.1%}), more than data.max_bad_fraction = {limit:g} allows"
    return why and f"{why}: fix or remove them, or set it higher"

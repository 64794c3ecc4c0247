"""Lets `pytest benchmarks/data` import `benchmarks.data`, which no installation holds; and what its files share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.data.photographs import write_layouts, write_squares
from fastsp.evaluation.environment import environment

IMAGES = int(os.environ.get("FASTSP_BENCH_IMAGES", 1000))
SQUARES = int(os.environ.get("FASTSP_BENCH_SQUARES", 512))
PACKAGES = ("nvidia-nvimgcodec-cu13", "simplejpeg", "pillow", "webdataset")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="session")
def files() -> Path:
    """The photographs, in memory after the first round: decoding is measured, not the disk."""
    return made_once(f"photographs-{IMAGES}", lambda folder: write_layouts(folder, IMAGES))


@pytest.fixture(scope="session")
def squares() -> Path:
    """One tar of photographs of 512 x 512 pixels, and their captions."""
    return made_once(f"squares-{SQUARES}", lambda folder: write_squares(folder, SQUARES, 512)) / "00000.tar"


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """A folder among the temporary ones, which the next run finds again."""
    folder = Path(tempfile.gettempdir()) / f"fastsp-benchmarks-{name}"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        write(unfinished)
        unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A fast tokenizer that pads to 77, as CLIP's does."""
    words = ["<pad>", "<unk>", "picture", "of", "coloured", "rectangles", ",", "by", "pixels", *map(str, range(10_000))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=77)


@pytest.fixture
def record(benchmark, request) -> Callable[..., None]:
    """Notes a benchmark's figures beside the machine and the versions that they were measured with, and prints them.

    `aim` says what they should be. Nothing fails where they are not: a machine that is busy with other things is no
    fault of the code.
    """

    def note(device: str, aim: str = "", **figures: Any) -> None:
        benchmark.extra_info |= machine(device) | figures | ({"aim": aim} if aim else {})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
        print(f"\n{request.node.name}: {shown}" + (f" (aim: {aim})" if aim else ""))

    return note


def machine(device: str) -> dict[str, Any]:
    """The machine, and where on it this was measured, ``cpu`` or ``cuda``."""
    versions = {name: installed for name in PACKAGES if (installed := _version(name))}
    return {"on": device, "cores": len(os.sched_getaffinity(0)), "environment": environment() | versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""The attention kernel of a run, measured once for each shape of its images and kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastsp.config import Config
from fastsp.families import full_config
from fastsp.models import TextToImageModel
from fastsp.models.attention import (
    Calls,
    Choice,
    Kernel,
    attention_calls,
    available,
    by_length,
    choose_attention,
    kept_choice,
)
from fastsp.training.step import COMPUTE_DTYPES
from fastsp.utils.devices import device_name


def choose_kernel(
    config: Config,
    model: TextToImageModel,
    shapes: Sequence[tuple[int, int]],
    rows: int,
    file: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> Kernel:
    """The kernel for the whole run: a resumed one takes what is kept.

    Args:
        shapes: heights and widths of the images, pixels; where there are several, each has a file of its own.
        rows: samples of a forward.
        file: where the choice is kept.
        say: takes a line for each choice that was measured.
    """
    text = (rows, *model.encode_no_prompt().encoder_hidden_states.shape[1:])
    network, dtype = full_config(model.network), COMPUTE_DTYPES[config.precision]
    choices: list[tuple[Choice, Callable[[], Calls]]] = []
    for height, width in shapes:
        latents = (rows, *model.latent_shape((height, width)))
        place, of_shape = file, ""
        if len(shapes) > 1:
            place, of_shape = file.with_stem(f"{file.stem}-{width}x{height}"), f"{width} x {height}: "
        question = {
            "wanted": config.attention,
            "device": device_name(device),
            "torch": torch.__version__,
            "precision": config.precision,
            "latents": list(latents),
            "text": list(text),
            "available": list(available(device)),
        }
        make = partial(choose_attention, config.attention, network, latents, text, dtype, device)
        choice = kept_choice(place, question, make)
        if choice.milliseconds:
            say(f"{of_shape}{choice}")
        choices.append((choice, partial(attention_calls, network, latents, text)))
    return by_length(choices)

"""What becomes of a caption at a position of the run: one of several, its tags shuffled and dropped, a trigger word.

Everything drawn is a pure function of (seed, position), by word w of Philox's stream 8 at that position:

    which of k captions      w[0] * k >> 32
    order of the tags        by w[1 + 2 i], of tag i after the kept ones
    tag i is dropped         w[2 + 2 i] < probability * 2^32
"""

from __future__ import annotations

from collections.abc import Sequence

from fastsp_kernels import Stream, random_words
from torch import Tensor

from fastsp.data.config import CaptionsConfig

BETWEEN = "\x1e"  # the captions of a JSON list, in a sample's text


def captions_at(
    texts: Sequence[str], settings: CaptionsConfig | None, seed: int | None, positions: Tensor
) -> tuple[str, ...]:
    """The captions of B samples.

    Args:
        texts: as they were read; empty ones stay empty.
        settings: None: the first of several, as it is.
        seed: of the run; None: nothing is drawn: the first of several, with its tags as they are, and the trigger.
        positions: (B,) int64 on the CPU.
    """
    settings = settings or CaptionsConfig()
    choices = [_several(text, settings) for text in texts]
    if seed is None:
        return tuple(_with_trigger(several[0], settings) if several else "" for several in choices)
    tags = max((text.count(settings.separator) + 1 for text in texts), default=0) if settings.draws_tags else 0
    words = random_words(seed, Stream.CAPTION, positions, 1 + 2 * tags).tolist()
    drawn = []
    for several, (first, *others) in zip(choices, words, strict=True):
        text = several[first * len(several) >> 32] if several else ""
        text = _drawn_tags(text, settings, others) if settings.draws_tags else text
        drawn.append(_with_trigger(text, settings) if several else "")
    return tuple(drawn)


def _several(text: str, settings: CaptionsConfig) -> list[str]:
    parts = [part for item in text.split(BETWEEN) for part in (item.splitlines() if settings.several else [item])]
    found = [part.strip() for part in parts if part.strip()]
    return found if settings.several else found[:1]


def _drawn_tags(text: str, settings: CaptionsConfig, words: list[int]) -> str:
    tags = [tag.strip() for tag in text.split(settings.separator) if tag.strip()]
    kept, free = tags[: settings.keep_tags], tags[settings.keep_tags :]
    left = [i for i in range(len(free)) if words[2 * i + 1] >= settings.tag_dropout * 2**32]
    if settings.shuffle_tags:
        left.sort(key=lambda i: (words[2 * i], i))
    return f"{settings.separator} ".join([*kept, *(free[i] for i in left)])


def _with_trigger(text: str, settings: CaptionsConfig) -> str:
    if settings.trigger is None or text.startswith(settings.trigger):
        return text
    return f"{settings.trigger}{settings.separator} {text}" if text else settings.trigger

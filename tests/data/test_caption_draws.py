"""Captions drawn by position: several of an image, tags, a trigger; the same whatever the batch."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from fastsp_kernels import Stream, random_words
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.config import load_config
from fastsp.data.captions import BETWEEN, captions_at
from fastsp.data.config import CaptionsConfig, DataConfig
from fastsp.data.readers.captions import caption_from_record
from fastsp.data.source import open_source
from fastsp.errors import UserError
from fastsp.models import digits_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TAGS = "one girl, red hair, blue eyes, smile, outdoors"


def drawn(text: str, positions: Any, seed: int | None = 3, **settings: Any) -> tuple[str, ...]:
    positions = torch.as_tensor(positions)
    return captions_at([text] * len(positions), CaptionsConfig(**settings), seed, positions)


def test_the_draws_are_those_that_are_written_down():
    """Against a second reading of the module's text, with the words of Philox."""
    positions = torch.tensor([0, 5, 2**40])
    text = f"first{BETWEEN}{TAGS}"
    words = random_words(3, Stream.CAPTION, positions, 20).tolist()
    found = drawn(text, positions, several=True, shuffle_tags=True, tag_dropout=0.4, keep_tags=1)
    for word, caption in zip(words, found, strict=True):
        kept, *free = ["first", TAGS][word[0] // 2**31].split(", ")
        order = sorted(range(len(free)), key=lambda i: word[1 + 2 * i])
        assert caption == ", ".join([kept, *(free[i] for i in order if word[2 + 2 * i] >= 0.4 * 2**32)])


def test_a_caption_depends_on_its_position_alone():
    """Not on the batch, nor on how many tags the captions beside it have."""
    texts = [TAGS, "a", f"{TAGS}, {TAGS}", ""] * 8
    settings, positions = CaptionsConfig(shuffle_tags=True, tag_dropout=0.3, trigger="sks"), torch.arange(32)
    together = captions_at(texts, settings, 7, positions)
    apart = [captions_at([text], settings, 7, positions[i : i + 1])[0] for i, text in enumerate(texts)]
    assert list(together) == apart
    assert captions_at(texts, settings, 8, positions) != together
    assert captions_at([TAGS], settings, 7, torch.tensor([64])) != captions_at([TAGS], settings, 7, torch.tensor([0]))


def test_shares():
    """Every order and every caption about equally often; each tag is dropped with its probability."""
    orders = Counter(drawn("a, b, c", range(6000), shuffle_tags=True))
    assert len(orders) == 6 and all(850 < count < 1150 for count in orders.values())
    several = Counter(drawn(f"a{BETWEEN}b{BETWEEN}c", range(6000), several=True))
    assert set(several) == {"a", "b", "c"} and all(1850 < count < 2150 for count in several.values())
    left = Counter(tag for text in drawn("a, b, c", range(6000), tag_dropout=0.25) for tag in text.split(", "))
    assert all(4350 < left[tag] < 4650 for tag in "abc")
    pairs = Counter(drawn("a, b", range(6000), tag_dropout=0.5))
    assert all(1350 < pairs[text] < 1650 for text in ("a, b", "a", "b", "")), "tags are dropped independently"


def test_kept_tags_and_trigger_stay_in_front():
    found = drawn(TAGS, range(200), shuffle_tags=True, tag_dropout=0.5, keep_tags=2, trigger="sks")
    assert all(text.startswith("sks, one girl, red hair") for text in found) and len(set(found)) > 10
    assert drawn(TAGS, [0], trigger="one girl") == (TAGS,), "it is there already"
    assert set(drawn("a, b", range(50), tag_dropout=1.0, trigger="sks")) == {"sks"}
    assert drawn("a; b;c", [0], tag_dropout=0.0, shuffle_tags=True, keep_tags=3, separator=";") == ("a; b; c",)
    assert drawn("", [0], trigger="sks", shuffle_tags=True) == ("",), "an empty caption stays the empty prompt"


def test_nothing_is_drawn_outside_of_training():
    text = f"{TAGS}{BETWEEN}b"
    everything = {"several": True, "shuffle_tags": True, "tag_dropout": 0.9, "trigger": "sks"}
    assert set(drawn(text, range(20), None, **everything)) == {f"sks, {TAGS}"}
    assert captions_at([text, "x\ny"], None, 3, torch.arange(2)) == (TAGS, "x\ny"), "as they are by default"


def test_lines_and_lists():
    assert set(drawn("a\n\n b ", range(50), several=True)) == {"a", "b"}
    assert drawn("a\nb", [0]) == ("a\nb",)
    record = {"caption": [" a", "", "b"], "text": "c"}
    assert caption_from_record(record) == f"a{BETWEEN}b"
    assert caption_from_record({"caption": [], "text": "c"}) == "c"


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = picture_folder(tmp_path / "pictures", 12)
    for file in folder.glob("*.txt"):
        file.write_text(f"{file.stem}, {TAGS}\nanother of {file.stem}")
    file = folder / "000.txt"
    file.with_suffix(".json").write_text(json.dumps({"caption": ["first of 000", "second of 000"]}))
    file.unlink()
    return folder


def batches(pictures: Path, world_size: int, first: int = 0, **more: Any) -> list[str]:
    """The captions of two epochs, in the order of their positions."""
    captions = {"several": True, "shuffle_tags": True, "tag_dropout": 0.2, "keep_tags": 1, "trigger": "sks"}
    data = DataConfig(source="images", path=str(pictures), resolution=16, batch_size=6, captions=captions)
    steps: list[list[str]] = [[] for _ in range(4)]
    for rank in range(world_size):
        source = open_source(data, tokenizer=digits_tokenizer(), channels=3, seed=5, **more)
        with closing(source.batches(last_position=24, batch_size=6, rank=rank, world_size=world_size)) as found:
            for step, batch in zip(steps, found, strict=True):
                step += batch.captions
                assert batch.input_ids is not None and len(batch.input_ids) == len(batch.captions)
    return [caption for step in steps for caption in step]


def test_the_same_at_any_number_of_processes(pictures):
    pytest.importorskip("nvidia.dali")
    alone = batches(pictures, 1)
    assert alone == batches(pictures, 2) == batches(pictures, 3)
    assert len(set(alone)) > 18, "another epoch has other draws"
    assert all(caption.startswith("sks, ") for caption in alone)
    still = batches(pictures, 1, shuffle=False)
    assert still[:2] == ["sks, first of 000", f"sks, 001, {TAGS}"] and still[:12] == still[12:]
    raw = batches(pictures, 1, shuffle=False, raw_captions=True)
    assert raw[:2] == [f"first of 000{BETWEEN}second of 000", f"001, {TAGS}\nanother of 001"]


def test_latents_keep_what_is_to_be_drawn(pictures, tmp_path, monkeypatch):
    """Encoded captions are drawn as those of the pictures; with text features there is nothing to draw."""
    pytest.importorskip("nvidia.dali")
    from fastsp.cli.encode import encode

    model = tiny_stable_diffusion(tmp_path / "model")
    section = "data.captions={several: true, shuffle_tags: true, tag_dropout: 0.2, keep_tags: 1, trigger: sks}"
    overrides = [f"model.pretrained={model}", f"data.path={pictures}", "data.resolution=16", "data.flip=false", section]
    for name, features in (("plain", False), ("features", True)):
        encode(CONFIGS / "sd15.yaml", tmp_path / name, overrides, features, "float32", 4)
    data = load_config(CONFIGS / "sd15.yaml", overrides).data.model_copy(update={"batch_size": 6})
    found = {}
    for source, path in (("images", pictures), ("latents", tmp_path / "plain")):
        opened = open_source(
            data.model_copy(update={"source": source, "path": str(path)}), tokenizer=None, channels=3, seed=5
        )
        with closing(opened.batches(last_position=24, batch_size=6)) as steps:
            found[source] = [caption for batch in steps for caption in batch.captions]
    assert found["latents"] == found["images"]
    fixed = data.model_copy(update={"source": "latents", "path": str(tmp_path / "features")})
    with pytest.raises(UserError, match=r"hold text features of captions as they were: add data\.captions=null"):
        open_source(fixed, tokenizer=None, channels=3, seed=5)

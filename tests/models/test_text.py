"""Long captions in chunks and clip skip, against what transformers' encoders give when called by hand."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.data.config import DataConfig
from fastsp.data.source import open_source
from fastsp.diffusion.text import FILE, TextSettings, token_ids
from fastsp.errors import UserError
from fastsp.models import load_model, load_pipeline

KINDS = ("sd15", "sd21", "sdxl")
LONG = "a handwritten seven two nine one zero four six five three eight seven a b c d e f g h i j k"
PROMPTS = ["a handwritten seven", LONG, ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {kind: tiny_stable_diffusion(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    return {kind: load_pipeline(str(folder)) for kind, folder in folders.items()}


def with_text(model, **settings):
    return replace(model, text=TextSettings(**settings))


def chunks_by_hand(tokenizer, prompt, chunks):
    """kohya's rule, token by token."""
    inner, end, pad = tokenizer.model_max_length - 2, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=chunks * inner + 2).input_ids
    rows = []
    for start in range(1, chunks * inner + 1, inner):
        row = [ids[0], *ids[start : start + inner], ids[-1]]
        if row[-2] not in (end, pad):
            row[-1] = end
        if row[1] == pad:
            row[1] = end
        rows.append(row)
    return rows


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("number", ["tokenizer", "tokenizer_2"])  # they pad with the end, and with another token
def test_ids(models, number, chunks):
    tokenizer = getattr(models["sdxl"], number)
    expected = [chunks_by_hand(tokenizer, prompt, chunks) for prompt in PROMPTS]
    ids = token_ids(tokenizer, PROMPTS, chunks)
    assert ids.unflatten(1, (chunks, -1)).tolist() == expected and ids.dtype == torch.int64
    assert all(tokenizer.eos_token_id in chunk for rows in expected for chunk in rows)
    assert expected[1][1] != expected[0][1], "the long prompt has no second chunk"
    assert token_ids(tokenizer, [], chunks).shape == (0, ids.shape[1])


def test_one_chunk_is_the_tokenizers_own(models):
    tokenizer = models["sdxl"].tokenizer_2
    own = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    assert token_ids(tokenizer, PROMPTS).tolist() == own.input_ids


def states_by_hand(encoder, tokenizer, chunks, layer, normed):
    """(B, n (L - 2) + 2, D), and the first chunk's pooled features; one call for each chunk."""
    rows, pooled = [], []
    for prompt in PROMPTS:
        parts = []
        for ids in chunks_by_hand(tokenizer, prompt, chunks):
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
            states = output.hidden_states[-layer][0]
            parts.append(getattr(encoder, "text_model", encoder).final_layer_norm(states) if normed else states)
            pooled += [output.text_embeds[0]] if len(parts) == 1 and "text_embeds" in output else []
        rows.append(torch.cat([parts[0][:1], *(part[1:-1] for part in parts), parts[-1][-1:]]))
    return torch.stack(rows), torch.stack(pooled) if pooled else None


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features(models, kind, clip_skip):
    model = with_text(models[kind], token_chunks=3, clip_skip=clip_skip)
    found = model.encode_prompts(PROMPTS)
    is_xl = kind == "sdxl"
    layer = clip_skip or (2 if is_xl else 1)
    pairs = zip(model.text_encoders, (model.tokenizer, model.tokenizer_2), strict=False)
    states, pooled = zip(*(states_by_hand(*pair, 3, layer, normed=not is_xl) for pair in pairs), strict=True)
    torch.testing.assert_close(found.encoder_hidden_states, torch.cat(states, -1), rtol=1e-5, atol=1e-6)
    assert found.encoder_hidden_states.shape[1] == 3 * (model.tokenizer.model_max_length - 2) + 2
    if is_xl:
        torch.testing.assert_close(found.text_embeds, pooled[1], rtol=1e-5, atol=1e-6)


def test_clip_skip_is_that_of_diffusers_but_for_the_count(models, tmp_path):
    """The advice on a model card. For Stable Diffusion 1 diffusers' own cannot be called with transformers 5."""
    models["sdxl"].save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": -1}
    expected = pipeline.encode_prompt(PROMPTS, **options)[0]
    found = with_text(models["sdxl"], clip_skip=1)
    assert torch.equal(found.encode_prompts(PROMPTS).encoder_hidden_states, expected)
    assert not torch.equal(expected, models["sdxl"].encode_prompts(PROMPTS).encoder_hidden_states)
    assert "`clip_skip=-1`" in found.text.advice(is_xl=True) and "`clip_skip=1`" in TextSettings(1, 2).advice(
        is_xl=False
    )
    assert TextSettings().advice(is_xl=False) == ""


def test_the_data_is_cut_in_the_same_way(models, tmp_path):
    model = with_text(models["sdxl"], token_chunks=2)
    folder = picture_folder(tmp_path / "pictures", count=4)
    for text in folder.glob("*.txt"):
        text.write_text(LONG)
    config = DataConfig(source="images", path=str(folder), resolution=16, batch_size=4)
    tokenizers = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2}
    source = open_source(config, **tokenizers, token_chunks=2, channels=3, seed=0)
    with closing(source.batches(batch_size=4, last_position=4)) as batches:
        (batch,) = batches
    found, expected = model.encode_ids(batch.input_ids, batch.input_ids_2), model.encode_prompts([LONG] * 4)
    assert torch.equal(found.encoder_hidden_states, expected.encoder_hidden_states)
    assert torch.equal(found.text_embeds, expected.text_embeds)


def test_a_folder_keeps_them(models, tmp_path):
    settings = TextSettings(token_chunks=3, clip_skip=2)
    with_text(models["sd15"], **vars(settings)).save(tmp_path / "long")
    models["sd15"].save(tmp_path / "usual")
    assert load_pipeline(str(tmp_path / "long")).text == settings and not (tmp_path / "usual" / FILE).exists()
    assert load_model(str(tmp_path / "long"), token_chunks=1).text == TextSettings(1, 2)
    assert load_model(str(tmp_path / "long")).text == settings
    plain, long = (load_pipeline(str(tmp_path / name)).text_fingerprint() for name in ("usual", "long"))
    assert plain != long and plain == models["sd15"].text_fingerprint()


@pytest.mark.parametrize("content", ["{", '{"token_chunks": 0}', '{"clip_skip": 1.5}', '{"other": 1}', "[]"])
def test_a_damaged_file(models, tmp_path, content):
    models["sd15"].save(tmp_path)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_pipeline(str(tmp_path))


def test_a_layer_that_is_not_there(models, tmp_path):
    models["sd15"].save(tmp_path)
    with pytest.raises(UserError, match=r"^model.clip_skip 3: the text encoder has 2 layers$"):
        load_model(str(tmp_path), clip_skip=3)
    (tmp_path / FILE).write_text(json.dumps({"clip_skip": 3}))
    with pytest.raises(UserError, match="clip_skip 3: the text encoder has 2 layers"):
        load_pipeline(str(tmp_path))

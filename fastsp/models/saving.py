"""Pipeline folders that both current and older libraries read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from fastsp.models.quiet import quiet_libraries

_TEXT_PREFIX = "text_model."


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a diffusers pipeline folder, safetensors only.

    transformers 5 writes the weights of a ``CLIPTextModel`` under shorter names than transformers 4 reads, which then
    initialises them at random and only warns; and it writes no ``vocab.json`` and ``merges.txt``. It still reads the
    older layout, so the folder gets that one. transformers also loads a text encoder in the dtype of its configuration,
    while diffusers loads everything else in float32 by default: the configuration says float32, whatever the file has.
    """
    with quiet_libraries():
        pipeline.save_pretrained(folder, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTextModel):  # a CLIPTextModelWithProjection has kept them
            _with_older_names(folder / name / "model.safetensors")
        if isinstance(part, PreTrainedModel):
            file = folder / name / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if isinstance(part, CLIPTokenizer):
            _with_older_files(part, folder / name)


def _with_older_names(file: Path) -> None:
    tensors = load_file(file)
    if not any(name.startswith(_TEXT_PREFIX) for name in tensors):
        renamed = {_TEXT_PREFIX + name: tensor.clone() for name, tensor in tensors.items()}  # off the mapped file
        save_file(renamed, file, metadata={"format": "pt"})


def _with_older_files(tokenizer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

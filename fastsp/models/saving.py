"""Pipeline folders that both current and older libraries read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from fastsp.models.quiet import quiet_libraries
from fastsp.perceptual.pretrained import VARIANTS

_TEXT_PREFIX = "text_model."
_WEIGHTS = ("model", "diffusion_pytorch_model")  # transformers' and diffusers' names of files


def variant_of(folder: Path) -> str | None:
    """The variant of the weights in a folder, as in ``model.fp16.safetensors``: none, if there are plain ones."""
    found = {_variant_in(file.name) for file in folder.glob("*.safetensors")}
    return next((variant for variant in VARIANTS if variant in found), None)


@dataclass(frozen=True)
class Files:
    """The files that a frozen part was read from, to be written again as they are: in memory it has another dtype."""

    read: tuple[tuple[Path, int, int], ...]  # size, and time of the last change in ns
    variant: str | None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Those that libraries read in a part's folder."""
        variant, files = variant_of(folder), [folder / "config.json"]
        for file in folder.glob("*"):
            stem = file.name.partition(".")[0].partition("-")[0]
            if stem in _WEIGHTS and ".safetensors" in file.name and _variant_in(file.name) == variant:
                files.append(file)
        return cls(tuple((file, *_state(file)) for file in sorted(files)), variant)

    def are_there(self) -> bool:
        """As they were when they were read."""
        return all(file.is_file() and (size, time) == _state(file) for file, size, time in self.read)

    def copy(self, folder: Path) -> None:
        """Into a folder, without a variant in their names."""
        folder.mkdir(parents=True)
        for file, *_ in self.read:
            to = folder / self._plain(file.name)
            if ".index." in file.name:  # it names the others
                to.write_text(self._plain(file.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(file, to)

    def _plain(self, names: str) -> str:
        return names if self.variant is None else names.replace(f".{self.variant}", "")


def save_pipeline(pipeline: Any, folder: Path, files: Mapping[str, Files] | None = None) -> None:
    """Write a diffusers pipeline folder, safetensors only. Parts whose ``files`` are still there are copied.

    transformers 5 writes the weights of a ``CLIPTextModel`` under shorter names than transformers 4 reads, which then
    initialises them at random and only warns; and it writes no ``vocab.json`` and ``merges.txt``. It still reads the
    older layout, so the folder gets that one. transformers also loads a text encoder in the dtype of its configuration,
    while diffusers loads everything else in float32 by default: the configuration says float32, whatever the file has.
    """
    with quiet_libraries():
        for name, part in pipeline.components.items():
            if part is None:
                continue
            if files and name in files and files[name].are_there():
                files[name].copy(folder / name)
            else:
                part.save_pretrained(folder / name)
        pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTextModel):  # a CLIPTextModelWithProjection has kept them
            for file in (folder / name).glob("model*.safetensors*"):
                _with_older_names(file)
        if isinstance(part, PreTrainedModel):
            file = folder / name / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if isinstance(part, CLIPTokenizer):
            _with_older_files(part, folder / name)


def _variant_in(name: str) -> str | None:
    """``fp16`` in ``model.fp16.safetensors``, in the names of its shards, where a number stands before or after it, and
    in that of their index."""
    tag = name.partition(".")[2].replace("safetensors", "").replace("index", "").removesuffix("json")
    return tag.strip(".").partition("-")[0].strip(".") or None


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _with_older_names(file: Path) -> None:
    """Of weights, or of the index of several such files."""
    if file.suffix == ".json":
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = older_names(index["weight_map"])
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    tensors = load_file(file)
    if (renamed := older_names(tensors)).keys() != tensors.keys():
        # Off the mapped file
        save_file({name: tensor.clone() for name, tensor in renamed.items()}, file, metadata={"format": "pt"})


def older_names(named: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a CLIP under the names of transformers 4, which other programs know."""
    if any(name.startswith(_TEXT_PREFIX) for name in named):
        return named
    return {_TEXT_PREFIX + name: value for name, value in named.items()}


def _with_older_files(tokenizer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

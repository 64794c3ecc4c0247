"""Stable Diffusion 3's and FLUX's transformers in the layout in which they were published, which single files have.

The weights are diffusers' under other names. Query, key and value are one matrix, in FLUX's single blocks with the
first layer of the MLP. Where diffusers' last modulations give scale and shift, theirs give shift and scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]

_SD3 = {
    "pos_embed": "",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv"),
    **dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv"),
    **dict.fromkeys(("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    **dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_Names = dict[str, str]
# By class: modules outside of blocks, and for each list of blocks its name and the modules inside of one.
_LAYOUTS: dict[str, tuple[_Names, dict[str, tuple[str, _Names]]]] = {
    "SD3Transformer2DModel": (_SD3, {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)}),
    "FluxTransformer2DModel": (
        _FLUX,
        {
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
    ),
}
_MARKS = {"SD3Transformer2DModel": "joint_blocks.0.", "FluxTransformer2DModel": "double_blocks.0.img_attn."}
PREFIX = "model.diffusion_model."  # of whole checkpoints; files of a transformer alone have none


class Place(NamedTuple):
    """Where a tensor of a file comes from: the network's tensors, one below the other."""

    ours: list[str]
    swapped: bool  # shift and scale


def class_in(names: Iterable[str]) -> str | None:
    """The class of the transformer in a file, by the names of its tensors; None: there is none of these."""
    bare = [name.removeprefix(PREFIX) for name in names]
    return next((kind for kind, mark in _MARKS.items() if any(name.startswith(mark) for name in bare)), None)


def places(class_name: str, names: Collection[str]) -> dict[str, Place]:
    """By the name of each tensor in a file, where it comes from.

    Args:
        class_name: of the network.
        names: of its tensors.

    Raises:
        KeyError: the layout has no place for a tensor, which is named.
    """
    outside, lists = _LAYOUTS[class_name]
    found: dict[str, Place] = {}
    order = {ours: number for _, inside in lists.values() for number, ours in enumerate(inside)}
    for name in sorted(names, key=lambda name: order.get(_split(name)[1], 0)):
        block, module, kind = _split(name)
        if block is None:
            theirs, swapped = outside[module], module == "norm_out.linear"
        else:
            part, number = block
            theirs = f"{lists[part][0]}.{number}.{lists[part][1][module]}"
            # The last block of Stable Diffusion 3 only reads the text: of two modulations, not of six.
            reads = class_name.startswith("SD3") and f"{part}.{number}.ff_context.net.2.weight" not in names
            swapped = module == "norm1_context.linear" and reads
        if class_name.startswith("Flux") and ".norm_" in f".{module}" and kind == "weight" and block is not None:
            kind = "scale"
        found.setdefault(f"{theirs}.{kind}".lstrip("."), Place([], swapped)).ours.append(name)
    return found


def to_published(class_name: str, state: Mapping[str, Tensor]) -> State:
    """A network's tensors as its publisher has them, views where nothing is joined; KeyError: as :func:`places`."""
    published = {}
    for name, (ours, swapped) in places(class_name, state.keys()).items():
        tensor = torch.cat([state[one] for one in ours]) if len(ours) > 1 else state[ours[0]]
        published[name] = _swapped(tensor) if swapped else tensor
    return published


def from_published(class_name: str, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor]) -> State:
    """The way back.

    Args:
        class_name: of the network.
        shapes: of its tensors, by name.
        read: gives a tensor of the file by its name.

    Raises:
        ValueError: a tensor has another shape than the network's.
    """
    state: State = {}
    for name, (ours, swapped) in places(class_name, shapes.keys()).items():
        tensor = read(name)
        rows = [shapes[one][0] for one in ours]
        if tensor.shape != (sum(rows), *shapes[ours[0]][1:]):
            wanted = (sum(rows), *shapes[ours[0]][1:])
            raise ValueError(f"{name} is {tuple(tensor.shape)}, where the configuration has {tuple(wanted)}")
        parts = (_swapped(tensor) if swapped else tensor).split(rows)
        # Each in memory of its own, as they are saved.
        state |= dict(zip(ours, (part.clone() for part in parts) if len(ours) > 1 else parts, strict=True))
    return state


def _split(name: str) -> tuple[tuple[str, str] | None, str, str]:
    """Of a tensor's name: list and number of its block, the module inside, and which of its tensors it is."""
    module, _, kind = name.rpartition(".")
    found = re.fullmatch(r"(\w*transformer_blocks)\.(\d+)\.(.+)", module)
    return (None, module, kind) if found is None else ((found[1], found[2]), found[3], kind)


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])

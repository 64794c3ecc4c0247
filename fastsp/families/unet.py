"""diffusers' ``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x, XL, and any other configuration of the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fastsp.families.trained import TrainedFamily

_RESNET = {  # a resnet's modules, and their names in CompVis' code
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_NUM_TIME_IDS = 6  # of Stable Diffusion XL's sizes


class UNetFamily(TrainedFamily):
    """See :class:`fastsp.families.NetworkFamily`, also for what is not documented here."""

    class_name = "UNet2DConditionModel"
    conditions: tuple[str, ...] = ("added_cond_kwargs", "class_labels")
    normalize, displacement, reversed_time, repeats = "none", "none", False, False
    part = "unet"
    other_kernels: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    input_keys: tuple[str, ...] = (
        "in_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )

    def fault(self, config: Mapping[str, Any]) -> str | None:
        if _takes_labels(config):
            return "it takes class labels (num_class_embeds or class_embed_type), and no data source has them"
        if config.get("encoder_hid_dim_type") is not None:
            return f"its encoder_hid_dim_type is {config['encoder_hid_dim_type']!r}; allowed: null"
        if config.get("addition_embed_type") not in (None, "text_time"):
            return f"its addition_embed_type is {config['addition_embed_type']!r}; allowed: null and 'text_time'"
        if config["in_channels"] != config["out_channels"]:
            return f"it takes {config['in_channels']} channels and returns {config['out_channels']}; they must be equal"
        return None

    def layers(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        with_mid = config.get("mid_block_type", "default") is not None
        return ("mid", "encoder", "decoder", "encoder+mid") if with_mid else ("encoder", "decoder")

    def layers_fault(self, config: Mapping[str, Any], layers: Any) -> str | None:
        allowed = self.layers(config)
        reason = "has no mid block" if isinstance(layers, str) else "takes names"
        return None if layers in allowed else f"this network {reason}; use one of {', '.join(allowed)}"

    def stand_ins(self, network: Any, layers: str) -> dict[int, Any]:
        """With an empty decoder and no last convolution, the forward returns the mid block's output."""
        gone: list[tuple[Any, Any]] = [(network.conv_out, nn.Identity()), (network.conv_norm_out, None)]
        gone += [(network.up_blocks, nn.ModuleList())] if layers != "decoder" else []
        gone += [(network.mid_block, None)] if layers == "encoder" else []
        return {id(module): stand_in for module, stand_in in gone if module is not None}

    def features(self, network: Any, layers: str) -> tuple[list[nn.Module], bool]:
        observed = {"mid": [], "decoder": network.up_blocks}.get(layers, network.down_blocks)
        return list(observed), "mid" in layers

    def feature(self, output: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Down blocks return (hidden, skips), up blocks the hidden tensor."""
        return output[0] if isinstance(output, tuple) else output

    def feature_shapes(self, config: Mapping[str, Any], layers: str) -> list[tuple[int, ...]]:
        down = [(channels, -1, -1) for channels in config["block_out_channels"]]
        return {"mid": down[-1:], "encoder": down, "decoder": down[::-1]}.get(layers, [*down, down[-1]])

    def metric_fault(self, config: Mapping[str, Any]) -> str | None:
        channels, predicted = config["in_channels"], config["out_channels"]
        if channels == predicted:
            return None
        return (
            f"it takes {channels} channels and predicts {predicted}; a metric gets noisy latents and nothing beside "
            "them, so models for inpainting or image editing cannot be used"
        )

    def conditioning_fault(self, config: Mapping[str, Any], conditioning: Mapping[str, Any]) -> str | None:
        added = conditioning.get("added_cond_kwargs") or {}
        missing = [name for name in ("text_embeds", "time_ids") if name not in added]
        if pooled_width(config) is not None and missing:
            return f"added_cond_kwargs lacks {' and '.join(missing)}, which this UNet (SDXL) needs"
        if conditioning.get("encoder_hidden_states") is None:
            return "encoder_hidden_states is missing, which this UNet needs"
        if _takes_labels(config) and conditioning.get("class_labels") is None:
            return "class_labels is missing, which this UNet needs"
        return None

    def side(self, config: Mapping[str, Any]) -> int:
        """The smaller of two; diffusers' pipelines' default where the config has none."""
        size = config.get("sample_size")
        if size is None:
            return 64 if pooled_width(config) is None else 128
        return size if isinstance(size, int) else min(size)

    def text_widths(self, config: Mapping[str, Any]) -> tuple[int, int | None]:
        return config["cross_attention_dim"], pooled_width(config)

    def takes_sizes(self, config: Mapping[str, Any]) -> bool:
        return pooled_width(config) is not None

    def pipeline_class(self, config: Mapping[str, Any]) -> str:
        return "StableDiffusionPipeline" if pooled_width(config) is None else "StableDiffusionXLPipeline"

    def kohya_base(self, config: Mapping[str, Any]) -> str:
        names = {768: "sd_v1", 1024: "sd_v2_v", 2048: "sdxl_base_v1-0"}
        return names.get(config["cross_attention_dim"], "unknown")

    def keywords(self, config: Mapping[str, Any], conditioning: Any, guidance: float = 1.0) -> dict[str, Any]:
        added = None
        if conditioning.text_embeds is not None:
            assert conditioning.time_ids is not None
            added = {"text_embeds": conditioning.text_embeds, "time_ids": conditioning.time_ids}
        return {"encoder_hidden_states": conditioning.encoder_hidden_states, "added_cond_kwargs": added}

    def example_inputs(
        self, config: Mapping[str, Any], latents: tuple[int, ...], text: tuple[int, ...]
    ) -> dict[str, Any]:
        rows, added = latents[0], None
        if (width := pooled_width(config)) is not None:
            added = {"text_embeds": torch.empty(rows, width), "time_ids": torch.empty(rows, _NUM_TIME_IDS)}
        return {
            "sample": torch.empty(latents),
            "timestep": torch.zeros(rows, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(text),
            "added_cond_kwargs": added,
        }

    def batched(self, conditioning: Mapping[str, Any], rows: int) -> dict[str, Any]:
        return dict(conditioning)

    def trace_fault(self) -> str | None:
        return None

    def call(self, network: Any, sample: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        states = conditioning["encoder_hidden_states"].to(sample.dtype)
        return network(sample, time, **{**conditioning, "encoder_hidden_states": states}, return_dict=False)[0]

    def blocks(self, network: Any) -> list[nn.Module]:
        mid = [] if network.mid_block is None else [network.mid_block]
        return [*network.down_blocks, *mid, *network.up_blocks]

    def input_weight(self, network: Any) -> Tensor:
        return network.conv_in.weight

    def keep_channels_last(self, module: nn.Module) -> None:
        from fastsp.families.channels_last import keep_channels_last  # imports diffusers' models

        keep_channels_last(module)

    def original_names(self, network: Any) -> Iterator[tuple[str, str]]:
        """CompVis' numbering: `conv_in`, every resnet and every downsampler is one of `input_blocks`, every resnet of
        the way up one of `output_blocks`, whose upsampler comes last in it."""
        for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
            yield from ((f"{ours}.linear_1", f"{theirs}.0"), (f"{ours}.linear_2", f"{theirs}.2"))
        yield "conv_in", "input_blocks.0.0"
        place = count(1)
        for b, block in enumerate(network.down_blocks):
            for layer in range(len(block.resnets)):
                yield from _original_layer(f"down_blocks.{b}", layer, f"input_blocks.{next(place)}")
            yield f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{next(place)}.0.op"
        # The middle alternates: resnet, attention, resnet, ...
        for layer in range(len(network.mid_block.resnets) if network.mid_block is not None else 0):
            yield from _original_resnet(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
            yield f"mid_block.attentions.{layer}", f"middle_block.{2 * layer + 1}"
        place = count()
        for b, block in enumerate(network.up_blocks):
            for layer in range(len(block.resnets)):
                theirs = f"output_blocks.{next(place)}"
                yield from _original_layer(f"up_blocks.{b}", layer, theirs)
            last_in_block = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{b}.upsamplers.0.conv", f"{theirs}.{last_in_block}.conv"
        yield from (("conv_norm_out", "out.0"), ("conv_out", "out.2"))


def pooled_width(config: Mapping[str, Any]) -> int | None:
    """Width of the pooled text features that Stable Diffusion XL's UNet takes beside the sizes; None: it takes none."""
    if config.get("addition_embed_type") != "text_time":
        return None
    return config["projection_class_embeddings_input_dim"] - _NUM_TIME_IDS * config["addition_time_embed_dim"]


def _takes_labels(config: Mapping[str, Any]) -> bool:
    return config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None


def _original_layer(block: str, layer: int, theirs: str) -> Iterator[tuple[str, str]]:
    """A resnet and the attention that may follow it."""
    yield from _original_resnet(f"{block}.resnets.{layer}", f"{theirs}.0")
    yield f"{block}.attentions.{layer}", f"{theirs}.1"


def _original_resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{our_part}", f"{theirs}.{their_part}") for our_part, their_part in _RESNET.items())

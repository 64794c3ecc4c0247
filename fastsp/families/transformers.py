"""Diffusers' diffusion transformers, one instance for each class: Flux2, Chroma, DiT and others.

They differ in how they are told the time, in what a block returns, and in where the image's tokens are. All else is the
same: a list or two of blocks, one after the other. A truncated copy has pass-throughs in the place of the blocks after
the last one that is observed. Those hold nothing, and lists keep their lengths, from which some classes count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

_CAST = ("encoder_hidden_states", "pooled_projections", "encoder_hidden_states_image")
IDS = ("img_ids", "txt_ids")


class Pass(nn.Module):
    """Returns the image's tokens as they came; of two streams, both."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if self.pair else hidden_states


@dataclass(eq=False)
class TransformerFamily:
    """See :class:`fastsp.families.MetricFamily`, also for what is not documented here.

    ``layers`` is ``mid``, the output of block L // 2 of L; a depth between 0 and 1; or numbers of blocks, from 1, in
    the order of the forward. Features are (B, N, C), the image's tokens alone.
    """

    class_name: str
    needs: tuple[str, ...] = ("encoder_hidden_states",)  # keywords of the forward
    takes: tuple[str, ...] = ()
    lists: tuple[str, ...] = ("transformer_blocks",)
    pairs: tuple[str, ...] = ()  # those of `lists` whose blocks return (text, image)
    input: str = "pos_embed.proj"
    width: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")  # entries of the config to multiply
    divisor: int = 1  # of the process's sigma x 1000, or timestep, for what the network is told
    text_first: bool = False  # in the sequences of the lists that return no pairs
    untraceable: str | None = None
    reversed_time: bool = False
    repeats: bool = True
    normalize: str = "channel"
    displacement: str = "normalized"

    @property
    def conditions(self) -> tuple[str, ...]:
        return (*self.needs, *self.takes)

    def fault(self, config: Mapping[str, Any]) -> str | None:
        return f"the trainer does not know {self.class_name} yet; fastsp.loss.SelfPerceptualLoss takes it"

    def layers_fault(self, config: Mapping[str, Any], layers: Any) -> str | None:
        kinds = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
        if kinds and all(type(kind) is int and kind >= 1 for kind in kinds):
            return None  # how many blocks there are is seen in the network
        if layers == "mid" or (isinstance(layers, float) and 0 < layers < 1):
            return None
        return "this network takes mid, a depth between 0 and 1, or numbers of blocks, from 1"

    def stand_ins(self, network: Any, layers: Any) -> dict[int, Any]:
        blocks = self._blocks(network)
        last = max(self._numbers(len(blocks), layers))
        return {id(block): Pass(pair) for block, pair in blocks[last:]}

    def features(self, network: Any, layers: Any) -> tuple[list[nn.Module], bool]:
        blocks = self._blocks(network)
        return [blocks[number - 1][0] for number in self._numbers(len(blocks), layers)], False

    def feature(self, output: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        if isinstance(output, tuple):
            return output[1]
        return output[:, conditioning["encoder_hidden_states"].shape[1] :] if self.text_first else output

    def feature_shapes(self, config: Mapping[str, Any], layers: Any) -> list[tuple[int, ...]]:
        count = 1 if isinstance(layers, str | int | float) else len(layers)
        return [(-1, prod(config[name] for name in self.width))] * count

    def metric_fault(self, config: Mapping[str, Any]) -> str | None:
        return None

    def conditioning_fault(self, config: Mapping[str, Any], conditioning: Mapping[str, Any]) -> str | None:
        needs = self.needs
        if config.get("guidance_embeds") and "guidance" in self.takes:
            needs = (*needs, "guidance")
        missing = [name for name in needs if conditioning.get(name) is None]
        return f"{' and '.join(missing)} missing, which {self.class_name} needs" if missing else None

    def batched(self, conditioning: Mapping[str, Any], rows: int) -> dict[str, Any]:
        given = {name: value for name, value in conditioning.items() if value is not None and name != "img_shapes"}
        for name in IDS:
            if name in given and given[name].ndim == 2:  # one for all samples
                given[name] = given[name].expand(rows, -1, -1)
        return given

    def trace_fault(self) -> str | None:
        return self.untraceable and f"{self.class_name} {self.untraceable}"

    def call(self, network: Any, sample: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        told = time if self.divisor == 1 else time / self.divisor
        answer = network(**self._arguments(network, sample, conditioning), timestep=told, return_dict=False)[0]
        return self._prediction(answer, sample)

    def input_weight(self, network: Any) -> Tensor:
        return network.get_submodule(self.input).weight

    def blocks(self, network: Any) -> list[nn.Module]:
        return [block for block, _ in self._blocks(network)]

    def _arguments(self, network: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of the forward beside the time."""
        given = {name: value for name, value in conditioning.items() if value is not None}
        return (
            given | {name: given[name].to(sample.dtype) for name in _CAST if name in given} | {"hidden_states": sample}
        )

    def _prediction(self, answer: Tensor, sample: Tensor) -> Tensor:
        return answer[:, : sample.shape[1]]  # the rest is a variance

    def _blocks(self, network: Any) -> list[tuple[nn.Module, bool]]:
        """In the order of the forward, and whether each returns a pair."""
        return [(block, name in self.pairs) for name in self.lists for block in getattr(network, name)]

    def _numbers(self, total: int, layers: Any) -> list[int]:
        if layers == "mid":
            return [max(1, total // 2)]
        if isinstance(layers, float):
            return [max(1, int(layers * total))]
        numbers = [layers] if isinstance(layers, int) else list(layers)
        if wrong := [number for number in numbers if not 1 <= number <= total]:
            raise ValueError(f"layers {wrong[0]}: this network has the blocks 1 to {total}")
        return sorted(set(numbers))


class PackedFamily(TransformerFamily):
    """Networks that take latents as sequences of patches, and the patches' places as ids; both are made here."""

    def _arguments(self, network: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        given = super()._arguments(network, sample, conditioning)
        packed, rows, columns = _packed(network, sample)
        given["hidden_states"] = packed
        if "img_shapes" in self.takes:
            return given | {"img_shapes": [[(1, rows, columns)]] * len(sample)}
        axes = len(_config(network)["axes_dims_rope"])
        text = given["encoder_hidden_states"].shape[1]
        kind: dict[str, Any] = {"device": sample.device, "dtype": torch.float32}
        image = torch.zeros(rows, columns, axes, **kind)
        image[..., 1] = torch.arange(rows, **kind)[:, None]
        image[..., 2] = torch.arange(columns, **kind)
        texts = torch.zeros(text, axes, **kind)
        if axes == 4:  # Flux2's fourth is the place in the text
            texts[:, 3] = torch.arange(text, **kind)
        made = {"img_ids": image.flatten(0, 1), "txt_ids": texts}
        return given | {name: given[name][0] if name in given else made[name] for name in IDS}

    def _prediction(self, answer: Tensor, sample: Tensor) -> Tensor:
        images = sample.flatten(1, -3)
        height, width = images.shape[-2:]
        side = isqrt(images[0].numel() // answer.shape[1] // images.shape[1])
        patches = answer.view(len(sample), height // side, width // side, images.shape[1], side, side)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)


def _config(network: Any) -> Mapping[str, Any]:
    """Of a network, also inside DDP."""
    return getattr(network, "module", network).config


def _packed(network: Any, sample: Tensor) -> tuple[Tensor, int, int]:
    """Patches as (B, N, C), and how many rows and columns of them. Latents may have a dimension of one frame."""
    images = sample.flatten(1, -3)
    batch, channels, height, width = images.shape
    side = isqrt(_config(network)["in_channels"] // channels)
    patches = images.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, -1, channels * side * side), height // side, width // side


class Lumina2Family(TransformerFamily):
    """Its sequences have the text first, without the text's padding."""

    def feature(self, output: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        texts = conditioning["encoder_attention_mask"].sum(1)
        places = torch.arange(output.shape[1] - int(texts.max()), device=output.device) + texts[:, None]
        return output.gather(1, places[..., None].expand(-1, -1, output.shape[2]))


class ZImageFamily(TransformerFamily):
    """It takes lists of samples and of texts, is told 1 - sigma, and answers x0 - eps, which its pipeline negates."""

    patch = 2  # of the forward's default

    def feature(self, output: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        return output[:, : sample.shape[-2] * sample.shape[-1] // self.patch**2]  # the image comes first

    def call(self, network: Any, sample: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        images = list(sample.unsqueeze(2) if sample.ndim == 4 else sample)
        texts = [text.to(sample.dtype) for text in conditioning["encoder_hidden_states"]]
        answer = network(images, (1000 - time) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(answer)).view(sample.shape)


LISTS = ("transformer_blocks", "single_transformer_blocks")
FLUX: dict[str, Any] = {"lists": LISTS, "input": "x_embedder", "divisor": 1000}
_MASK = ("encoder_hidden_states", "encoder_attention_mask")

TRANSFORMERS: tuple[TransformerFamily, ...] = (
    PackedFamily(
        "Flux2Transformer2DModel",
        takes=("guidance", *IDS),
        pairs=("transformer_blocks",),
        text_first=True,
        **FLUX,
    ),
    PackedFamily(
        "ChromaTransformer2DModel",
        takes=("attention_mask", *IDS),
        pairs=("transformer_blocks",),
        text_first=True,
        **FLUX,
    ),
    TransformerFamily("DiTTransformer2DModel", ("class_labels",)),
    TransformerFamily("SanaTransformer2DModel", takes=("encoder_attention_mask", "guidance"), input="patch_embed.proj"),
    PackedFamily(
        "QwenImageTransformer2DModel",
        takes=("encoder_hidden_states_mask", "img_shapes"),
        pairs=("transformer_blocks",),
        input="img_in",
        divisor=1000,
    ),
    Lumina2Family(
        "Lumina2Transformer2DModel",
        _MASK,
        lists=("layers",),
        input="x_embedder",
        width=("hidden_size",),
        divisor=1000,
        untraceable="reads the lengths of its texts",
        reversed_time=True,
    ),
    ZImageFamily(
        "ZImageTransformer2DModel",
        lists=("layers",),
        input="all_x_embedder.2-1",
        width=("dim",),
        untraceable="takes lists",
    ),
    TransformerFamily(
        "WanTransformer3DModel", takes=("encoder_hidden_states_image",), lists=("blocks",), input="patch_embedding"
    ),
)

"""Families of networks: what differs between one class of denoising network and another, in one file for each.

Everything else asks :func:`family_of`. A family from outside of the package is added by one call, before the network is
used: ``fastsp.families.register(MyFamily())``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from fastsp.families.mmdit import MMDITS
from fastsp.families.pixart import PIXART
from fastsp.families.transformers import TRANSFORMERS
from fastsp.families.unet import UNetFamily

Config = Mapping[str, Any]  # a network's, as diffusers writes it to config.json
_SPLIT = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}


class MetricFamily(Protocol):
    """What the losses have to know about a class of networks. Methods that take a ``config`` need no weights."""

    class_name: str
    """Of the networks; those that inherit from it belong to the family too."""
    normalize: str
    displacement: str
    """What the losses' options of these names are where none is given."""
    reversed_time: bool
    """Whether on a flow its networks are told ``1 - sigma`` and predict ``x0 - eps``."""
    repeats: bool
    """Whether its blocks are alike: they are compiled, and differentiated in the metric, one by one."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """The keywords that a caller of the loss may give beside the text features."""

    def fault(self, config: Config) -> str | None:
        """Why such a network cannot be trained from latents and captions, as a message; None: it can."""

    def layers_fault(self, config: Config, layers: Any) -> str | None:
        """Why its perceptual network cannot answer with ``layers``, as a message; None: it can."""

    def stand_ins(self, network: Any, layers: Any) -> dict[int, Any]:
        """By the ``id`` of each module that ``layers`` does not need, what a truncated copy has in its place."""

    def features(self, network: Any, layers: Any) -> tuple[list[nn.Module], bool]:
        """The blocks of a truncated copy whose outputs are features, and whether its own answer is the last feature."""

    def feature(self, output: Any, sample: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The feature in what such a block returns, in a call with these arguments."""

    def feature_shapes(self, config: Config, layers: Any) -> list[tuple[int, ...]]:
        """Of those features of one sample: (C, H, W) of images, (N, C) of tokens; -1 where a size is not fixed."""

    def metric_fault(self, config: Config) -> str | None:
        """Why such a network cannot be a perceptual network, as a message; None: it can."""

    def conditioning_fault(self, config: Config, conditioning: Mapping[str, Any]) -> str | None:
        """What ``conditioning``, keywords of its forward, lacks, as a message; None: nothing."""

    def batched(self, conditioning: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """``conditioning`` such that the first dimension of every tensor is ``rows``, that of the samples."""

    def trace_fault(self) -> str | None:
        """Why its forward cannot be traced, as a message; None: it can be tried."""

    def call(self, network: Any, sample: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The network's answer, in its dtype, to samples (B, C, H, W) in that dtype; ``network`` may be truncated.

        ``time``, (B,), is what the process tells the network. ``conditioning`` has its other keywords, in any dtype.
        """

    def input_weight(self, network: Any) -> Tensor:
        """The weight that the latents meet first: its dtype, device and memory layout are those the network wants."""

    def blocks(self, network: Any) -> list[nn.Module]:
        """In the order of the forward; FSDP gathers and shards one at a time."""


class NetworkFamily(MetricFamily, Protocol):
    """What the trainer has to know beside that."""

    part: str
    """What diffusers' pipelines call such a network."""
    other_kernels: tuple[str, ...]
    """Those of :data:`fastsp.models.attention.NAMES` that its attention cannot be given. If ``sdpa`` alone is left, it
    is not asked for `example_inputs`."""
    lora_targets: tuple[str, ...]
    """The layers that usually get adapters, by the ends of their names."""
    input_keys: tuple[str, ...]
    """The entries of a config that say what a network takes: equal ones can stand in for one another."""

    def network_class(self) -> type[Any]:
        """The class itself, with diffusers' ``from_config`` and ``from_pretrained``."""

    def side(self, config: Config) -> int:
        """Side of the square latents that it was made for."""

    def largest_side(self, config: Config) -> int | None:
        """Of the latents that it takes; None: there is no such limit."""

    def patch(self, config: Config) -> int:
        """The sides of latents have to be multiples of it."""

    def tokens(self, config: Config, height: int, width: int) -> int:
        """How many tokens it makes of such latents."""

    def latent_channels(self, config: Config) -> int:
        """Channels of the latents that it takes."""

    def text_widths(self, config: Config) -> tuple[int, int | None]:
        """Of the text features that it takes, and of the pooled ones; None: it takes none of these."""

    def takes_sizes(self, config: Config) -> bool:
        """Whether it is told the sizes of images, as Stable Diffusion XL is."""

    def embeds_guidance(self, config: Config) -> bool:
        """Whether it is told the scale of guidance, and answers as if guided."""

    def pipeline_class(self, config: Config) -> str:
        """The diffusers class of the pipelines that such a network belongs to."""

    def kohya_base(self, config: Config) -> str:
        """What kohya's scripts call the base model of adapters, or ``unknown``."""

    def keywords(self, config: Config, conditioning: Any, guidance: float = 1.0) -> dict[str, Any]:
        """A ``fastsp.diffusion.conditioning.Conditioning`` as keywords of the forward and of the losses.

        ``guidance`` is the scale that a network which embeds it is told.
        """

    def example_inputs(self, config: Config, latents: tuple[int, ...], text: tuple[int, ...]) -> dict[str, Any]:
        """Keywords of one forward, of latents (B, C, H, W) and text features (B, L, D); values do not matter."""

    def exchange_attention(self, network: Any, exchange: Callable[[Any], Any]) -> None:
        """Set ``exchange(processor)`` in the place of every attention processor."""

    def keep_channels_last(self, module: nn.Module) -> None:
        """Let the networks in ``module`` keep their images in channels_last, in place, as far as they have images."""

    def original_names(self, network: Any) -> Iterable[tuple[str, str]]:
        """Names of modules, here and in the single files that user interfaces exchange."""


_families: dict[str, Any] = {}  # those that the trainer knows are NetworkFamilies, the others say so in `fault`


def register(family: MetricFamily) -> None:
    """Make a family known under its ``class_name``; a later one replaces an earlier one of that name."""
    _families[family.class_name] = family


def family_of(network: Any) -> NetworkFamily:
    """The family of a network, also of one inside DDP or ``torch.compile``, or sharded by FSDP2.

    Raises:
        ValueError: its class is unknown.
    """
    names = [kind.__name__ for kind in type(unwrapped(network)).__mro__]
    return next((_families[name] for name in names if name in _families), None) or family_named(names[0])


def compile_network(network: Any, **options: Any) -> None:
    """Hand a network to ``torch.compile``, in place: as a whole or, where its blocks repeat, one block at a time.

    Blocks of equal structure share their compiled code, so that compiling takes as long for many of them as for few.
    """
    family = family_of(network)
    for module in family.blocks(network) if family.repeats else [network]:
        module.compile(**options)


def unwrapped(network: Any) -> Any:
    """The network inside DDP, ``torch.compile`` and peft's ``PeftModel``, in any order."""
    while isinstance(network, nn.Module):
        held = network.__dict__.get("_modules", {})
        if "base_model" in held:  # peft's, which holds a tuner, which holds the network as `model`
            held = {"module": held["base_model"]._modules.get("model")}
        inner = [held[name] for name in ("_orig_mod", "module") if held.get(name) is not None]
        if not inner:
            break
        network = inner[0]
    return network


def full_config(network: Any) -> dict[str, Any]:
    """The configuration of a network, with the name of its class, which diffusers adds where it reads or writes it."""
    return {**network.config, "_class_name": type(network).__name__}


def family_named(class_name: str) -> NetworkFamily:
    """The family of a class by its name, as a ``config.json`` has it.

    Raises:
        ValueError: the name is unknown.
    """
    if class_name not in _families:
        raise ValueError(
            f"{class_name} is no class of networks that fastsp knows; known: {', '.join(sorted(_families))}; "
            "fastsp.families.register adds another"
        )
    return _families[class_name]


def family_of_config(config: Config) -> NetworkFamily:
    """The family of a network by its ``config.json``; without a ``_class_name``, that of a ``UNet2DConditionModel``.

    Folders of earlier versions of diffusers have ``Transformer2DModel``, which has been split by its norm since.

    Raises:
        ValueError: its class is unknown.
    """
    name = str(config.get("_class_name", "UNet2DConditionModel"))
    return family_named(_SPLIT.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name)


register(UNetFamily())
for _family in (*TRANSFORMERS, *MMDITS, PIXART):
    register(_family)

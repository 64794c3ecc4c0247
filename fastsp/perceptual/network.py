"""The perceptual network: a frozen, truncated copy of a network that answers with its hidden features.

Section 5 of the paper: the MSE-trained network itself is the perceptual metric. Cut after its mid block, diffusers' own
forward returns the mid-block feature, and the decoder (514 of Stable Diffusion 2.1's 866 M parameters) is never held.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastsp.families import family_of, unwrapped
from fastsp.options import Layers, one_of
from fastsp.perceptual.blocks import Block, exchange


class AlwaysEval(nn.Module):
    """Stays in eval mode: a metric must not change from call to call."""

    def train(self, mode: bool = True) -> Self:
        del mode
        return super().train(False)


class PerceptualNetwork(AlwaysEval):
    """Frozen features of a network of a known family: a ``UNet2DConditionModel`` or one of diffusers' transformers.

    Args:
        network: the MSE-trained network. It is copied, never changed. DDP, ``torch.compile`` and peft are unwrapped.
        layers: ``mid`` (the paper's choice), ``encoder`` (the output of every down block), ``decoder`` (of every up
            block) or ``encoder+mid``. Only ``decoder`` holds the up blocks. Transformers: ``mid`` (the output of block
            L // 2), a depth between 0 and 1, or numbers of blocks, from 1; no later block is held.
        dtype: of the copy's parameters; None keeps the network's.
        share_frozen: hold the network's frozen parameters themselves, no copies. For LoRA: the adapters are copied,
            the base is held once. They must stay frozen, and in their dtype.

    Raises:
        ValueError: unknown ``layers``; ``share_frozen`` with another ``dtype``; a network without a mid block where
            ``layers`` needs one; what :func:`unwrap` refuses.
    """

    def __init__(
        self, network: Any, layers: Any = "mid", dtype: torch.dtype | None = None, share_frozen: bool = False
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            one_of("layers", layers, Layers)
        network = unwrap(network)
        self.family = family_of(network)
        if (fault := self.family.layers_fault(network.config, layers)) is not None:
            raise ValueError(f"layers {layers!r}: {fault}")
        if share_frozen and dtype not in (None, network.dtype):
            raise ValueError(
                f"share_frozen keeps the network's dtype, which is {network.dtype}: dtype {dtype} is not possible"
            )
        self.layers = layers
        self.truncated = truncated_copy(network, layers, share_frozen).requires_grad_(False)
        if dtype is not None:
            cast(self.truncated, dtype)
        self._collected: list[Any] = []
        self.blocks: list[Block] = []  # where they repeat
        if self.family.repeats:
            blocks, (observed, _) = self.family.blocks(self.truncated), self.family.features(self.truncated, layers)
            self.blocks = exchange(self.truncated, blocks[: blocks.index(observed[-1]) + 1])
        observed, self._ends_with_answer = self.family.features(self.truncated, layers)
        for block in observed:
            block.register_forward_hook(self._collect)
        self.train(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``forward`` expects its sample in."""
        weight: Tensor = self.family.input_weight(self.truncated)
        if weight.is_floating_point():
            return weight.dtype
        return next(p.dtype for p in self.truncated.parameters() if p.is_floating_point())  # the others are quantized

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.family.input_weight(self.truncated).device

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Of one sample's features: (C, H, W) of images, (N, C) of tokens; -1 where a size is not fixed."""
        return self.family.feature_shapes(self.truncated.config, self.layers)

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of its convolutions' weights, which its inputs should have too."""
        weight = self.family.input_weight(self.truncated)
        if weight.ndim != 4 or weight.is_contiguous():
            return torch.contiguous_format
        channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if channels_last else torch.contiguous_format

    def compile(self, **options: Any) -> None:
        """As :func:`fastsp.families.compile_network` does it."""
        for module in [block.block for block in self.blocks]:
            module.compile(**options)
        if not self.blocks:
            super().compile(**options)

    def forward(
        self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None, **conditioning: Any
    ) -> tuple[Tensor, ...]:
        """Features ``p_l(x_t', t', c)``, one tensor for each layer, in the network's dtype.

        Args:
            sample: x_t', (B, C, H, W).
            timesteps: t', (B,), as the process tells it.
            encoder_hidden_states: the text features c, (B, L, D), any float dtype.
            **conditioning: the other keywords of the network's own forward, such as ``added_cond_kwargs``.
        """
        self._collected.clear()
        conditioning = {"encoder_hidden_states": encoder_hidden_states, **conditioning}
        last = self.family.call(self.truncated, sample, timesteps, conditioning)
        features = tuple(self.family.feature(output, sample, conditioning) for output in self._collected)
        self._collected.clear()  # nothing outlives the call
        return (*features, last) if self._ends_with_answer else features

    def conditioning_fault(self, conditioning: dict[str, Any]) -> str | None:
        """What the network's configuration asks for and ``conditioning`` lacks; None: nothing."""
        return self.family.conditioning_fault(self.truncated.config, conditioning)

    def _collect(self, _block: nn.Module, _args: Any, output: Any) -> None:
        self._collected.append(output)


def unwrap(network: Any) -> Any:
    """The network under DDP, ``torch.compile`` and peft's wrapper.

    Raises:
        ValueError: it is of no known family, or cannot be used: sharded by FSDP, or with inputs beside the noisy
            latents (inpainting, image editing).
    """
    network = unwrapped(network)
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        hint = ", but it has one: give its unet" if hasattr(network, "unet") else ""
        raise ValueError(f"{kind} is no network{hint}")
    if any("FSDP" in cls.__name__ or "FullyShardedDataParallel" in cls.__name__ for cls in type(network).__mro__):
        raise ValueError("the network is sharded by FSDP: build the criterion before wrapping the network")
    family, config = family_of(network), getattr(network, "config", {})
    if (fault := family.metric_fault(config)) is not None:
        raise ValueError(f"this network cannot be a perceptual network: {fault}")
    return network


def cast(module: Any, dtype: torch.dtype) -> Any:
    """``module.to(dtype)``, in place, without the warning that diffusers' own ``to`` gives for every network."""
    return nn.Module.to(module, dtype)


def shared_copy(module: Any) -> Any:
    """A deep copy that holds the frozen parameters of ``module`` themselves: of adapters on a base that stays."""
    return copy.deepcopy(module, _frozen_parameters(module))


def _frozen_parameters(module: nn.Module) -> dict[int, Any]:
    """deepcopy's memo that leaves the frozen ones where they are."""
    return {id(p): p for p in module.parameters() if not p.requires_grad}


def truncated_copy(network: Any, layers: Any, share_frozen: bool = False) -> Any:
    """A deep copy of ``network`` without what ``layers`` does not need.

    The parts that go are put into deepcopy's memo with their stand-ins, so that not even a transient copy of them is
    made. The stand-ins let the network's own forward return the feature.
    """
    memo: dict[int, Any] = _frozen_parameters(network) if share_frozen else {}
    frozen = copy.deepcopy(network, memo | family_of(network).stand_ins(network, layers))
    for module in frozen.modules():  # what belongs to somebody's training loop stays behind
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
        for wrapper in ("forward", "_original_forward"):
            module.__dict__.pop(wrapper, None)
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return frozen

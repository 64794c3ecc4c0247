"""Perceptual metrics: how far predicted and real samples at t' are apart, one number per sample.

The loss asks a :class:`PerceptualMetric` and nothing else. To add one, subclass it and register what builds it
(:func:`register_metric`); ``SelfPerceptualLoss(..., metric=NAME)`` takes it then.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsp.options import Distance, Normalize, Teacher, one_of
from fastsp.perceptual.half_backward import HalfBackward, Misaligned
from fastsp.perceptual.network import AlwaysEval, PerceptualNetwork

Conditioning = dict[str, Any]  # the network's keywords beside sample and time: tensors (B, ...), dicts of them, None
Features = tuple[Tensor, ...]  # one tensor per layer

_log = logging.getLogger(__name__)


class PerceptualMetric(AlwaysEval, ABC):
    """A frozen module that compares [x^_t' ; x_t']. Its ``state_dict`` is all its state; it stays in eval mode.

    Attributes:
        order: the power of ``|c_f|`` that small distances go with: 2 for squares, 1 for absolute values.
    """

    order: int = 2

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which :meth:`distance` wants its inputs; None: that of the prediction."""
        return None

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format in which :meth:`distance` wants its inputs."""
        return torch.contiguous_format

    @abstractmethod
    def distance(self, inputs: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """(B,) float32, differentiable with respect to the first half of ``inputs``.

        Args:
            inputs: [x^_t' ; x_t'], (2B, C, H, W): predicted half, then real half.
            time: what a network of the process is told about t', (B,).
            conditioning: of B samples.
        """

    def compile_network(self, **options: Any) -> None:
        """Hand what is expensive to ``torch.compile``, with its keywords. May be called at any time."""


METRICS: dict[str, Callable[..., PerceptualMetric]] = {}


def register_metric(name: str) -> Callable[[Callable[..., PerceptualMetric]], Any]:
    """Decorator: let ``build(unet, **options)`` make the metric ``name``.

    The options are the keywords of :class:`FrozenFeatures`; a metric may ignore what has no meaning for it.
    """

    def register(build: Callable[..., PerceptualMetric]) -> Any:
        METRICS[name] = build
        return build

    return register


def build_metric(name: str, unet: nn.Module, **options: Any) -> PerceptualMetric:
    """The metric registered as ``name``, frozen.

    Raises:
        ValueError: there is none of that name, or it refuses the network or an option.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown: use one of {', '.join(METRICS)}")
    return METRICS[name](unet, **options).train(False).requires_grad_(False)


@register_metric("frozen_features")
class FrozenFeatures(PerceptualMetric):
    """Distance of hidden features of the frozen, truncated network: equation (11) of Lin & Yang (arXiv 2401.00110).

    The options are those of :class:`fastsp.loss.SelfPerceptualLoss`, where ``calls`` is ``teacher``. What cannot be
    traced falls back from ``batched`` to ``split``.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        layers: str = "mid",
        distance: str = "mse",
        normalize: str | bool = "none",
        calls: str = "batched",
        dtype: torch.dtype | None = None,
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(normalize, bool):
            normalize = "sample" if normalize else "none"
        if one_of("normalize", normalize, Normalize) == "channel":
            raise ValueError("normalize 'channel' is not available yet: use one of none, sample")
        self.normalize = normalize
        self.kind = one_of("distance", distance, Distance)
        self.order = 2 if distance == "mse" else 1
        self.calls = one_of("teacher", calls, Teacher)
        self.network = PerceptualNetwork(unet, layers=layers, dtype=dtype, share_frozen=share_frozen)
        self._half_backward = HalfBackward(self.network)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        return self.network.memory_format

    def distance(self, inputs: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """(B,) float32: each layer's distance within a sample, then the plain mean over layers."""
        pred, real = self._features(inputs, {"timesteps": time, **conditioning})
        return torch.stack([self._layer_distance(p, r) for p, r in zip(pred, real, strict=True)]).mean(0)

    def compile_network(self, **options: Any) -> None:
        """Compile both ways of calling it; neither costs anything before it is used."""
        self._half_backward.compile(options)
        self.network.compile(**options)

    def _features(self, inputs: Tensor, conditioning: Conditioning) -> tuple[Features, Features]:
        """Features of the predicted half, and of the real half without gradient."""
        if (fault := self.network.conditioning_fault(conditioning)) is not None:
            raise ValueError(fault)
        if self.calls == "split" or not inputs.requires_grad or torch.compiler.is_compiling():
            return self._split(inputs, conditioning)
        try:
            halves = [feature.chunk(2) for feature in self._half_backward(inputs, conditioning)]
        except Misaligned as reason:
            features = self._split(inputs, conditioning)  # if the arguments are wrong, this raises, and nothing changes
            _log.warning("teacher='batched' is not possible here, 'split' is used: %s", reason)
            self.calls = "split"
            return features
        return tuple(pred for pred, _ in halves), tuple(real.detach() for _, real in halves)

    def _split(self, inputs: Tensor, conditioning: Conditioning) -> tuple[Features, Features]:
        """Two calls: the real half without gradient, then the predicted one."""
        pred, real = inputs.chunk(2)
        is_compiled = self._half_backward.compile_options is not None and not torch.compiler.is_compiling()
        # More shapes than torch.compile keeps versions for are an error; by default it goes on uncompiled.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True) if is_compiled else nullcontext():
            with torch.no_grad():
                real_features = self.network(real.detach(), **conditioning)
            return self.network(pred, **conditioning), real_features

    def _layer_distance(self, pred: Tensor, real: Tensor) -> Tensor:
        """(B, ...) features -> (B,)."""
        pred, real = pred.float().flatten(1), real.float().flatten(1)
        distance, tiny = self._mean(pred - real), torch.finfo(torch.float32).tiny
        return distance if self.normalize == "none" else distance / self._mean(real).clamp_min(tiny)

    def _mean(self, features: Tensor) -> Tensor:
        """Mean square, or mean absolute value, of each sample: (B, N) -> (B,)."""
        return features.abs().mean(1) if self.kind == "mae" else features.square().mean(1)

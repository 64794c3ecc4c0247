"""Perceptual metrics: how far predicted and real samples at t' are apart, one number per sample.

The loss asks a :class:`PerceptualMetric` and nothing else. To add one, subclass it and register what builds it
(:func:`register_metric`); ``SelfPerceptualLoss(..., metric=NAME)`` takes it then.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastsp.options import Distance, Normalize, Teacher, one_of
from fastsp.perceptual.half_backward import HalfBackward, Misaligned
from fastsp.perceptual.network import AlwaysEval, PerceptualNetwork

Conditioning = dict[str, Any]  # the network's keywords beside sample and time: tensors (B, ...), dicts of them, None
Features = tuple[Tensor, ...]  # one tensor per layer
CALIBRATION_SAMPLES = 64  # after which the scale of channels is frozen
SMALLEST_VARIANCE = 1e-4  # of a channel, in units of the mean over channels

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
    def calibration(self) -> dict[str, Tensor]:
        """What the metric learns from the first real samples that it sees, by name, live; empty: it learns nothing."""
        return {}

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """What the metric sees in here is all that it learns from, of all ranks, which may see different numbers."""
        yield

    def freeze_calibration(self) -> None:
        """Learn no more from samples."""

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format in which :meth:`distance` wants its inputs."""
        return torch.contiguous_format

    @abstractmethod
    def distance(
        self, inputs: Tensor, time: Tensor, conditioning: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """(B,) float32, differentiable with respect to the first half of ``inputs``.

        Args:
            inputs: [x^_t' ; x_t'], (2B, C, H, W): predicted half, then real half.
            time: what a network of the process is told about t', (B,).
            conditioning: of B samples.
            weights: of every place, (B, 1, H, W) float32. A metric without this argument is not called with weights.
        """

    def compile_network(self, **options: Any) -> None:
        """Hand what is expensive to ``torch.compile``, with its keywords. May be called at any time."""


METRICS: dict[str, Callable[..., PerceptualMetric]] = {}


def register_metric(name: str) -> Callable[[Callable[..., PerceptualMetric]], Any]:
    """Decorator: let ``build(network, **options)`` make the metric ``name``.

    The options are the keywords of :class:`FrozenFeatures`; a metric may ignore what has no meaning for it.
    """

    def register(build: Callable[..., PerceptualMetric]) -> Any:
        METRICS[name] = build
        return build

    return register


def build_metric(name: str, network: nn.Module, **options: Any) -> PerceptualMetric:
    """The metric registered as ``name``, frozen.

    Raises:
        ValueError: there is none of that name, or it refuses the network or an option.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown: use one of {', '.join(METRICS)}")
    return METRICS[name](network, **options).train(False).requires_grad_(False)


class ChannelScale(nn.Module):
    """The standard deviation of each channel of real features, from the first 64 samples seen, then frozen.

    It is in the ``state_dict``, and stays float32. In many processes it is that of all ranks' samples: each rank has to
    take part in the first 64 / ranks calls, as in a training loop. Nothing waits for a GPU. A channel's variance counts
    as at least 1e-4 of the layer's mean one: what hardly varies is no measure.
    """

    samples: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.seen = 0  # at least so many by this process, known without asking the device
        self.alone = False  # no other rank takes part in the calls, and all samples count
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("mean", torch.zeros(channels, device=device))
        self.register_buffer("variance", torch.zeros(channels, device=device))

    @torch.no_grad()
    def merge_ranks(self) -> None:
        """End what began with ``alone``: the moments become those of all ranks' samples. All take part."""
        self.alone = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean = self.mean.double()
            moments = torch.stack([mean, self.variance.double() + mean.square(), torch.ones_like(mean)]) * self.samples
            dist.all_reduce(moments)
            mean, square = moments[:2] / moments[2]
            self.mean.copy_(mean)
            self.variance.copy_(square - mean.square())
            self.samples.copy_(moments[2, 0])

    def freeze(self) -> None:
        """See no more samples, however few there were."""
        self.seen = CALIBRATION_SAMPLES

    def forward(self, real: Tensor) -> Tensor:
        """(B, ..., C) float32 features of real samples -> (C,)."""
        if self.alone or self.seen < CALIBRATION_SAMPLES:
            self._calibrate(real.detach())
        return self.variance.clamp_min(SMALLEST_VARIANCE * self.variance.mean()).clamp_min(1e-20).sqrt()

    @torch.no_grad()
    def _calibrate(self, real: Tensor) -> None:
        """Add a batch's moments (Chan et al. 1979), where the samples so far are too few."""
        variance, mean = torch.var_mean(real.flatten(0, -2), dim=0, correction=0)
        batch: Any = len(real)
        self.seen += batch
        if not self.alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Ranks may hold batches of unequal sizes, and have to stop after the same call.
            self.seen += dist.get_world_size() - batch
            mean, variance = mean.double(), variance.double()
            moments = batch * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
            dist.all_reduce(moments)
            batch, (mean, square) = moments[0, 0].long(), moments[1:] / moments[0]
            mean, variance = mean.float(), (square - mean.square()).float()
        share = batch / (self.samples + batch)
        shift = mean - self.mean
        mean_of_all = self.mean + share * shift
        variance_of_all = (1 - share) * self.variance + share * variance + share * (1 - share) * shift.square()
        learning = (self.samples < CALIBRATION_SAMPLES) | self.alone
        self.mean.copy_(torch.where(learning, mean_of_all, self.mean))
        self.variance.copy_(torch.where(learning, variance_of_all, self.variance))
        self.samples += batch * learning

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.mean, self.variance = self.mean.float(), self.variance.float()
        return self


@register_metric("frozen_features")
class FrozenFeatures(PerceptualMetric):
    """Distance of hidden features of the frozen, truncated network: equation (11) of Lin & Yang (arXiv 2401.00110).

    The options are those of :class:`fastsp.loss.SelfPerceptualLoss`, where ``calls`` is ``teacher``. What cannot be
    traced falls back from ``batched`` to ``split``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Any = "mid",
        distance: str = "mse",
        normalize: str | bool = "none",
        calls: str = "batched",
        dtype: torch.dtype | None = None,
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(normalize, bool):
            normalize = "sample" if normalize else "none"
        self.normalize = one_of("normalize", normalize, Normalize)
        self.kind = one_of("distance", distance, Distance)
        self.order = 2 if distance == "mse" else 1
        self.calls = one_of("teacher", calls, Teacher)
        self.network = PerceptualNetwork(network, layers=layers, dtype=dtype, share_frozen=share_frozen)
        self._half_backward = HalfBackward(self.network)
        self._told_of_one = False
        self.scales: Any = nn.ModuleList()
        if normalize == "channel":
            channels = [shape[0] if len(shape) == 3 else shape[-1] for shape in self.network.feature_shapes]
            self.scales.extend(ChannelScale(width, self.network.device) for width in channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def calibration(self) -> dict[str, Tensor]:
        return dict(self.scales.named_buffers(prefix="scales"))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        for scale in self.scales:
            scale.alone = True
        yield
        for scale in self.scales:
            scale.merge_ranks()
        self.freeze_calibration()

    def freeze_calibration(self) -> None:
        for scale in self.scales:
            scale.freeze()

    @property
    def memory_format(self) -> torch.memory_format:
        return self.network.memory_format

    def distance(
        self, inputs: Tensor, time: Tensor, conditioning: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """(B,) float32: each layer's distance within a sample, then the plain mean over layers. Weights are averaged
        over what each place of a feature covers."""
        conditioning = self.network.family.batched(conditioning, len(inputs) // 2)
        pred, real = self._features(inputs, {"timesteps": time, **conditioning})
        scaled = self._scaled_distance if self.normalize == "channel" else self._layer_distance
        scales = self.scales if self.normalize == "channel" else [None] * len(real)
        layers = zip(scales, pred, real, strict=True)
        return torch.stack([scaled(*layer, weights) for layer in layers]).mean(0)

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
            if len(inputs) > 2 or self.network.family.trace_fault() is not None:
                _log.warning("teacher='batched' is not possible here, 'split' is used: %s", reason)
                self.calls = "split"
            elif not self._told_of_one:  # some networks multiply one sample by other operators than two
                _log.info(
                    "a batch of one cannot be 'batched' here, 'split' is used for it, at the same cost: %s", reason
                )
                self._told_of_one = True
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

    def _scaled_distance(self, scale: ChannelScale, pred: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
        """(B, ..., C) tokens or (B, C, H, W) images -> (B,), every channel in units of its own spread."""
        weights = None if weights is None else weights_of_places(weights, real)
        if real.ndim == 4:
            pred, real = pred.movedim(1, -1), real.movedim(1, -1)
            weights = None if weights is None else weights.movedim(1, -1)
        deviation = scale(real.float())
        weights = None if weights is None else weights.flatten(1)
        return self._mean(((pred.float() - real.float()) / deviation).flatten(1), weights)

    def _layer_distance(self, _scale: None, pred: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
        """(B, ...) features -> (B,)."""
        weights = None if weights is None else weights_of_places(weights, real).flatten(1)
        pred, real = pred.float().flatten(1), real.float().flatten(1)
        distance, tiny = self._mean(pred - real, weights), torch.finfo(torch.float32).tiny
        return distance if self.normalize == "none" else distance / self._mean(real).clamp_min(tiny)

    def _mean(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean square, or mean absolute value, of each sample, weighted: (B, N) -> (B,)."""
        sizes = features.abs() if self.kind == "mae" else features.square()
        return (sizes if weights is None else sizes * weights).mean(1)


def weights_of_places(weights: Tensor, feature: Tensor) -> Tensor:
    """Weights of the latents' places for a feature's: averages over what each covers.

    Args:
        weights: (B, 1, H, W).
        feature: (B, C, h, w), or (B, N, C) of tokens that are the latents' patches, row by row.

    Returns:
        A view of the feature's shape.

    Raises:
        ValueError: the tokens are not the patches of such latents.
    """
    if feature.ndim == 4:
        return F.adaptive_avg_pool2d(weights, (feature.shape[2], feature.shape[3])).expand_as(feature)
    height, width = weights.shape[-2:]
    side = math.isqrt(height * width // feature.shape[1]) or 1
    pooled = F.adaptive_avg_pool2d(weights, (height // side, width // side)).flatten(2).movedim(1, 2)
    if pooled.shape[1] != feature.shape[1]:
        raise ValueError(f"weights: {feature.shape[1]} tokens are not the patches of {height} x {width} latents")
    return pooled.expand_as(feature)

"""Critic heads: small networks on the frozen network's features that learn to tell real samples from predicted ones.

Lin & Yang end with the wish that the loss be learned (section 6.7 of arXiv 2401.00110). Here it is in part: the trunk
stays frozen, the heads are trained beside the network, both from one call of the trunk. With D the mean of the heads'
scores, x^_t' and x_t' the predicted and the real sample at t', and c_f the share of the prediction's error that arrives
there,

    d       = (D(x_t') - D(x^_t')) / max(|c_f|, 0.05)             what both samples share cancels
    heads     minimise  softplus(-d) + 0.01 (D(x_t') + D(x^_t'))^2
    network   minimises  an anchor + weight * softplus(d)

Near t' = t this is the Jacobian-vector form of *Continuous Adversarial Flow Models* (arXiv 2604.11521) with a frozen
trunk. Without an anchor the heads ruin the network, so nothing here minimises d alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastsp.perceptual.half_backward import without_autocast
from fastsp.perceptual.metric import Conditioning, Features, FrozenFeatures, register_metric

SMALLEST_DISPLACEMENT = 0.05  # |c_f| below it counts as this much
CENTRE = 0.01  # weight of (D + D^)^2, which keeps the scores around 0


class Verdict(NamedTuple):
    """What the heads say of a batch, one value per sample, (B,)."""

    gap: Tensor  # d, with gradient to the predicted samples alone
    loss: Tensor  # the heads', with gradient to the heads alone

    @property
    def accuracy(self) -> Tensor:
        """1 where the real sample has the higher score, 0.5 where both have the same."""
        return (self.gap.detach().sign() + 1) / 2


class Heads(nn.Module):
    """One small network on each of the features, in float32.

    Args:
        shapes: of the features of one sample: (C, H, W) of images, for which there are convolutions (1x1, 3x3, 1x1), or
            (N, C) of tokens, for which there is a perceptron. Only C is looked at.
        width: channels of the hidden layers.
        seed: of the initial weights. The last layer starts at zero, and so do all scores.
        device: of the parameters.

    Raises:
        ValueError: a width that is not positive.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], width: int, seed: int, device: torch.device) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"heads {width!r}: the width of the heads must be at least 1")
        with torch.device("meta"):
            self.heads: Any = nn.ModuleList(
                _of_images(shape[0], width) if len(shape) == 3 else _of_tokens(shape[-1], width) for shape in shapes
            )
        self.to_empty(device=device)
        self.start(seed)

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Begin anew, in float32 whatever the parameters have been cast to."""
        self.float()
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
            else:
                p.fill_(name.endswith("weight"))  # of a norm
        for head in self.heads:
            head[-1].weight.zero_()

    def forward(self, features: Features) -> Tensor:
        """D, (B,): each head's mean over places, then the mean over heads."""
        scores = []
        with without_autocast(features[0].device.type):  # d is a small difference of large numbers
            for head, feature in zip(self.heads, features, strict=True):
                scores.append(head(feature.to(head[0].weight.dtype)).flatten(1).mean(1))
        return torch.stack(scores).mean(0)


def _of_images(channels: int, width: int) -> nn.Sequential:
    norms = [nn.GroupNorm(math.gcd(width, 128) // 4 or 1, width) for _ in range(2)]  # of 4 channels or more
    first, second = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
    return nn.Sequential(first, norms[0], nn.SiLU(), second, norms[1], nn.SiLU(), nn.Conv2d(width, 1, 1))


def _of_tokens(channels: int, width: int) -> nn.Sequential:
    first, second = nn.Linear(channels, width, bias=False), nn.Linear(width, width, bias=False)
    norms = [nn.LayerNorm(width) for _ in range(2)]
    return nn.Sequential(first, norms[0], nn.SiLU(), second, norms[1], nn.SiLU(), nn.Linear(width, 1))


@register_metric("critic")
class Critic(FrozenFeatures):
    """The distance of :class:`fastsp.perceptual.metric.FrozenFeatures`, and heads that judge the same features.

    Args:
        network: as there, like the other options.
        heads, seed: the heads' width, and the seed of their weights; see :class:`Heads`.
    """

    def __init__(self, network: nn.Module, *, heads: int = 128, seed: int = 0, **options: Any) -> None:
        super().__init__(network, **options)
        self.heads = Heads(self.network.feature_shapes, heads, seed, self.network.device)
        self._compared: tuple[Features, Features] | None = None

    def _features(self, inputs: Tensor, conditioning: Conditioning) -> tuple[Features, Features]:
        self._compared = super()._features(inputs, conditioning)
        return self._compared

    def judge(self, c_f: Tensor) -> Verdict:
        """The heads' verdict on the features that :meth:`distance` has just compared; it forgets them.

        Args:
            c_f: how much of the prediction's error arrives at t', (B,) float32.
        """
        assert self._compared is not None, "distance() comes first"
        (pred, real), self._compared = self._compared, None
        scale = c_f.abs().clamp_min(SMALLEST_DISPLACEMENT)
        of_real, of_pred = self.heads(real), self.heads(tuple(feature.detach() for feature in pred))
        loss = F.softplus((of_pred - of_real) / scale) + CENTRE * (of_real + of_pred).square()
        frozen = {name: p.detach() for name, p in self.heads.named_parameters()}
        return Verdict((of_real.detach() - functional_call(self.heads, frozen, (pred,))) / scale, loss)

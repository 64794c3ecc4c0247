"""What the kernels should compute, written again in float64 and Python integers from the paper's equations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from fastsp_kernels import Stream
from fastsp_kernels.philox import _random_normals_reference
from torch import Tensor

SHAPES = [(1, 1, 3, 5), (3, 4, 7, 6), (2, 16, 6, 6)]  # the last takes two Triton programs a sample, one of them ragged
# Samples of which 4 is no divisor, of one channel, and of more elements than any program takes.
SEEDED_SHAPES = [(1, 1, 3, 5), (3, 1, 23, 29), (1, 16, 13, 11), (2, 4, 33, 17), (1, 4, 37, 31)]
BLOCKS = [128, 2048]  # that interpreted kernels are told to take, beside the first one they are tuned over
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
VIEWS = ["every other", "column", "expanded"]
PREDICTION_TYPES = ["v_prediction", "epsilon", "sample"]


@dataclass
class Tables:
    """A variance preserving schedule, and its coefficients as the ops take them."""

    alphas_cumprod: Tensor

    def marginal(self, t: Tensor, prediction_type: str = "v_prediction") -> Tensor:
        """a, s, p, q: (4, B) float32."""
        a, s = (level.flatten() for level in levels64(self, t))
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        of_prediction = {"v_prediction": (-s, a), "epsilon": (zero, one), "sample": (one, zero)}[prediction_type]
        return torch.stack([a, s, *of_prediction]).float().to(t.device)

    def transition(self, t: Tensor, t2: Tensor, prediction_type: str = "v_prediction") -> Tensor:
        """c_x, c_f from the table of the design, (2, B) float32; 1 and 0 where the times are equal."""
        (a, s), (a2, s2) = ([level.flatten() for level in levels64(self, time)] for time in (t, t2))
        if prediction_type == "v_prediction":
            difference = torch.atan2(s2, a2) - torch.atan2(s, a)
            pair = difference.cos(), difference.sin()
        elif prediction_type == "epsilon":
            pair = a2 / a, s2 - s * a2 / a
        else:
            pair = s2 / s, a2 - a * s2 / s
        identity = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        return torch.where((t == t2).cpu(), identity, torch.stack(pair)).float().to(t.device)


def make_tables(length: int = 50, first: float = 0.99, last: float = 0.0) -> Tables:
    """alpha_bar from `first` down to `last`, by default to zero terminal SNR."""
    return Tables(torch.linspace(first**0.5, last**0.5, length, dtype=torch.float64).square())


def per_sample_view(values: Tensor, view: str) -> Tensor:
    """(..., B) values in a tensor that is not contiguous, one of VIEWS; `expanded` repeats the first sample's."""
    if view == "expanded":
        return values[..., :1].expand(values.shape)
    if view == "every other":
        return values.repeat_interleave(2, -1)[..., ::2]
    by_sample = values.movedim(-1, 0)
    return torch.stack([by_sample, by_sample + 7], dim=-1)[..., 0].movedim(0, -1)


def stream_noise(seed: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The normals of stream NOISE by the reference, on the CPU, also where ops on CPU tensors run the kernel."""
    count = math.prod(shape)
    drawn = _random_normals_reference(torch.tensor(seed), positions.cpu(), int(Stream.NOISE), count)
    return drawn.view(len(positions), *shape)


def levels64(tables: Tables, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    alphas = tables.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def diffuse64(latents: Tensor, noise: Tensor, timesteps: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2."""
    a, s = levels64(tables, timesteps)
    latents, noise = latents.cpu().double(), noise.cpu().double()
    return a * latents + s * noise, a * noise - s * latents


def reproject64(
    model_pred: Tensor, latents: Tensor, noise: Tensor, t: Tensor, t2: Tensor, tables: Tables, prediction_type: str
) -> Tensor:
    """Equations 7 to 10 as the paper writes them, through x0 and eps and not through a rotation."""
    (a, s), (a2, s2) = levels64(tables, t), levels64(tables, t2)
    x_t, _ = diffuse64(latents, noise, t, tables)
    if prediction_type == "v_prediction":
        sample, epsilon = a * x_t - s * model_pred, a * model_pred + s * x_t
    elif prediction_type == "epsilon":
        sample, epsilon = (x_t - s * model_pred) / a, model_pred
    else:
        sample, epsilon = model_pred, (x_t - a * model_pred) / s
    real = a2 * latents.cpu().double() + s2 * noise.cpu().double()
    return torch.cat((a2 * sample + s2 * epsilon, real))


def assert_rounded(actual: Tensor, oracle: Tensor, atol: float) -> None:
    """Within `atol` of the float64 oracle, plus one unit in the last place where `actual` is a half type."""
    assert actual.shape == oracle.shape
    bound = torch.full_like(oracle, atol)
    if actual.dtype != torch.float32:
        finfo = torch.finfo(actual.dtype)
        exponent = oracle.abs().clamp(min=finfo.smallest_normal).log2().floor()
        bound += finfo.eps * exponent.exp2()
    error = (actual.detach().cpu().double() - oracle.detach()).abs()
    assert bool((error <= bound).all()), f"off by up to {(error - bound).max():.3g} beyond the bound"  # NaN fails too


def philox_words(seed: int, stream: int, position: int, count: int) -> list[int]:
    """Philox 4x32-10 in Python integers, after section 3.3 of Salmon et al. 2011."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        counter = [block, stream, position % 2**32, position >> 32]
        key = [seed % 2**32, (seed >> 32) % 2**32]
        for _ in range(10):
            left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                (right >> 32) ^ counter[1] ^ key[0],
                right % 2**32,
                (left >> 32) ^ counter[3] ^ key[1],
                left % 2**32,
            ]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        words += counter
    return words[:count]


def normals(words: list[int]) -> list[float]:
    """Box-Muller in Python floats, from an even number of words."""
    result: list[float] = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (second >> 8) / 2**24
        result += [radius * math.cos(angle), radius * math.sin(angle)]
    return result

"""Noise processes: how clean samples and noise mix at a time t, and how a prediction at t carries over to another time.

With clean samples x0 and noise eps, everything is linear in the network's own prediction f:

    x_t  = a x0 + s eps           f_t = p x0 + q eps                   marginal(t)       -> a, s, p, q
    x_t' = c_x x_t + c_f f                                             transition(t, t') -> c_x, c_f

A process is those four coefficients as functions of t. Two follow from them by solving for x0 and eps, with
``D = a q - s p``:

    c_x = (a' q - s' p) / D       c_f = (s' a - a' s) / D

For v-prediction they are the cosine and sine of the angle between the two times (Lin & Yang, arXiv 2401.00110,
equations 7 to 10). The perceptual loss goes from t to t' by one transition; so does each step of a deterministic
sampler (DDIM, Euler on a flow). To add a process, subclass :class:`Process` and call :func:`register_process`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from math import exp, pi
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fastsp.options import FlowTimes, PredictionType, one_of

# How t' is drawn from around t (Table 4 of the paper), in thousandths of the process: the normal's spread, the offset.
NORMAL_STD = 100.0
OFFSET = 40
SMALLEST_SIGMA = 2.0**-24  # that training draws
FLOW_RANGE = (0.02, 0.98)  # of t' on a flow: at the ends a network is told of a time that it hardly ever saw

# Stable Diffusion's betas, 1.x, 2.x and XL alike.
NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


class Random(Protocol):
    """A source of random numbers, one for each of B samples: see :mod:`fastsp.diffusion.draws`."""

    def integers(self, bound: int) -> Tensor:
        """(B,) int64, uniform over 0 .. bound - 1."""

    def uniforms(self) -> Tensor:
        """(B,) float32, uniform over [0, 1)."""

    def normals(self) -> Tensor:
        """(B,) float32, standard normal."""


class Process(ABC):
    """A noise process together with what its network predicts.

    Times are (B,) or 0-d tensors in the process's own unit. Nothing here waits for a GPU.

    Attributes:
        dtype: of times.
        last: the largest time; the smallest is 0.
        sampler: what its deterministic sampler is called.
    """

    dtype: torch.dtype
    last: float
    sampler = "DDIM"

    @abstractmethod
    def exact_marginal(self, t: Tensor) -> Tensor:
        """a, s, p, q at ``t``: (4, B) float64."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the network is told about ``t``."""

    @abstractmethod
    def grid(self, num_steps: int) -> Tensor:
        """The sampler's way down: ``num_steps + 1`` times from pure noise, the last one clean (a = 1, s = 0).

        Raises:
            ValueError: the process has no such grid.
        """

    @abstractmethod
    def draw(self, random: Random) -> Tensor:
        """t for training, (B,)."""

    @abstractmethod
    def draw_perceptual(self, random: Random, t: Tensor, policy: str = "uniform") -> Tensor:
        """t' for the perceptual loss, by a policy of ``fastsp.options.TimestepSampling``. (B,)."""

    def check(self, name: str, t: Tensor) -> Tensor:
        """``t`` in the process's dtype.

        Raises:
            ValueError: a time outside of the process. Seen only on a CPU: a GPU would have to be waited for.
        """
        return _within(name, t, self.last).to(self.dtype)

    def from_model_time(self, name: str, t: Tensor) -> Tensor:
        """The times that a training loop holds, in the unit in which the network is told them, as the process has them.

        Raises:
            ValueError: as :meth:`check`.
        """
        return self.check(name, t)

    def to(self, device: torch.device | str) -> Self:
        """Move what the process holds to ``device``, in place; returns ``self``."""
        del device
        return self

    def marginal(self, t: Tensor) -> Tensor:
        """a, s, p, q at ``t``: (4, B) float32."""
        return self.exact_marginal(t).float()

    def transition(self, t: Tensor, t_prime: Tensor) -> Tensor:
        """c_x, c_f from ``t`` to ``t_prime``: (2, B) float32, from float64. Exactly 1 and 0 where the two are equal."""
        a, s, p, q = self.exact_marginal(t)
        a_prime, s_prime, _, _ = self.exact_marginal(t_prime)
        determinant = a * q - s * p
        c_x = (a_prime * q - s_prime * p) / determinant
        c_f = (s_prime * a - a_prime * s) / determinant
        same = t == t_prime
        return torch.stack([c_x.masked_fill(same, 1.0), c_f.masked_fill(same, 0.0)]).float()

    def reversed(self) -> Process:
        """The same process told from the other end, if it is one that some networks are told so."""
        return self

    def of_size(self, tokens: int) -> Process:
        """The process for images of so many tokens, where it depends on that."""
        del tokens
        return self

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weight of the squared error of f such that x0's is weighted by ``min(SNR, gamma)``. (B,) float32.

        Source: Hang et al. (arXiv 2303.09556). SNR is ``a^2 / s^2``; an error of f is that of x0 times ``-D / s``.
        """
        a, s, p, q = self.exact_marginal(t)
        return (torch.minimum(a.square(), gamma * s.square()) / (a * q - s * p).square()).float()


class NoiseSchedule:
    """A variance preserving schedule: the table of alpha_bar_t.

    Attributes:
        alphas_cumprod: alpha_bar_t, (T,) float64.

    Raises:
        ValueError: the table is not 1-D, is empty, or has a value outside [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        if alphas_cumprod.ndim != 1 or alphas_cumprod.numel() == 0:
            raise ValueError(f"alphas_cumprod must be a non-empty 1-D tensor, got shape {tuple(alphas_cumprod.shape)}")
        table = alphas_cumprod.detach().double().cpu()
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("alphas_cumprod must lie in [0, 1]")
        self.alphas_cumprod = table

    @classmethod
    def stable_diffusion(cls, zero_terminal_snr: bool = True) -> NoiseSchedule:
        """Stable Diffusion's schedule of 1000 steps, by default rescaled to zero terminal SNR."""
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
        table = torch.cumprod(1.0 - betas, dim=0)
        return cls(rescale_zero_terminal_snr(table) if zero_terminal_snr else table)

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler, of a 1-D tensor of alpha_bar, or of a ``NoiseSchedule`` (itself).

        A scheduler's table is taken as it stands: whether terminal SNR is zero is the scheduler's own setting.

        Raises:
            ValueError: the object has no 1-D ``alphas_cumprod``.
        """
        if isinstance(scheduler, NoiseSchedule):
            return scheduler
        table = scheduler if isinstance(scheduler, Tensor) else getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise ValueError(
                f"scheduler {type(scheduler).__name__} has no alphas_cumprod: "
                "give a diffusers scheduler that has one, a NoiseSchedule or a 1-D tensor of alpha_bar"
            )
        return cls(table)

    def __len__(self) -> int:
        return self.alphas_cumprod.numel()

    @property
    def signal(self) -> Tensor:
        """``a_t = sqrt(alpha_bar_t)``, (T,) float32."""
        return self.alphas_cumprod.sqrt().float()

    @property
    def noise_level(self) -> Tensor:
        """``s_t = sqrt(1 - alpha_bar_t)``, (T,) float32."""
        return (1.0 - self.alphas_cumprod).sqrt().float()


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale ``sqrt(alpha_bar)`` so that the last step is pure noise and the first keeps its value.

    Source: Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed* (arXiv 2305.08891), Algorithm 1.
    """
    signal = alphas_cumprod.double().sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


class VariancePreserving(Process):
    """``a = sqrt(alpha_bar_t)``, ``s = sqrt(1 - alpha_bar_t)``; the network predicts v, epsilon or the sample.

    Times are int64 indices into the table, 0 .. T-1 (the paper's 1 .. T); T itself stands for the clean sample.

    Raises:
        ValueError: an unknown prediction type; one that leaves x0 or eps undetermined somewhere in the table:
            ``epsilon`` where alpha_bar = 0 (zero terminal SNR), ``sample`` where alpha_bar = 1.
    """

    dtype = torch.int64

    def __init__(self, schedule: NoiseSchedule, prediction_type: str = "v_prediction") -> None:
        one_of("prediction_type", prediction_type, PredictionType)
        alpha_bar = schedule.alphas_cumprod
        if prediction_type == "epsilon" and bool((alpha_bar == 0).any()):
            raise ValueError(
                "prediction_type 'epsilon' cannot be used with zero terminal SNR: where alpha_bar = 0 the noise says "
                "nothing about the sample; use 'v_prediction', or a schedule without rescaling"
            )
        if prediction_type == "sample" and bool((alpha_bar == 1).any()):
            raise ValueError(
                "prediction_type 'sample' cannot be used where alpha_bar = 1: the sample says nothing about the noise"
            )
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(schedule)
        self.last = self.num_train_timesteps - 1
        alpha_bar = torch.cat([alpha_bar, alpha_bar.new_ones(1)])
        a, s = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        p, q = {"v_prediction": (-s, a), "epsilon": (zero, one), "sample": (one, zero)}[prediction_type]
        self.table = torch.stack([a, s, p, q])  # (4, T + 1) float64

    def to(self, device: torch.device | str) -> Self:
        self.table = self.table.to(device)
        return self

    def exact_marginal(self, t: Tensor) -> Tensor:
        return self.table[:, t]

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def grid(self, num_steps: int) -> Tensor:
        """Trailing spacing: evenly from T-1 downward (arXiv 2305.08891, Table 2), rounded as in diffusers."""
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"number of sampling steps {num_steps} must be between 1 and {total}")
        # Python rounds halves to even, as NumPy does in diffusers.
        times = [round(total - i * total / num_steps) - 1 for i in range(num_steps)]
        return torch.tensor([*times, total], device=self.table.device)

    def draw(self, random: Random) -> Tensor:
        return random.integers(self.num_train_timesteps)

    def draw_perceptual(self, random: Random, t: Tensor, policy: str = "uniform") -> Tensor:
        if policy in ("uniform", "same"):
            return random.integers(self.num_train_timesteps)
        if policy == "lower":
            return torch.minimum((random.uniforms().double() * (t + 1)).long(), t)
        return (t + _displacement(random, policy).round().long()).clamp(0, self.last)


@dataclass(frozen=True)
class ShiftBySize:
    """The shift of a flow by the number of an image's tokens, as diffusers' pipelines compute it: mu lies on the line
    through two points; the shift is e^mu, or mu itself."""

    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)
    exponential: bool = True

    def __call__(self, tokens: int) -> float:
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        mu = self.mu[0] + slope * (tokens - self.tokens[0])
        return exp(mu) if self.exponential else mu


class RectifiedFlow(Process):
    """``x = (1 - sigma) x0 + sigma eps``; the network predicts the velocity ``eps - x0`` (arXiv 2209.03003).

    Times are sigma in [0, 1], float32; 1 is pure noise, 0 the clean sample.

    Args:
        shift: moves training times and sampling grid towards noise, ``shift u / (1 + (shift - 1) u)`` (Esser et al.,
            arXiv 2403.03206, equation 23).
        time_scale: the network is told ``time_scale * sigma``.

    Attributes:
        shift_by_size: gives the shift in its place, once :meth:`of_size` is asked.
        grid_end: the grid's last noisy time before it is shifted; None: the grid is evenly spaced down to 0.
        times, logit_mean, logit_std, mode_scale: how :meth:`draw` spreads times, see :meth:`training`.
    """

    dtype, last, sampler = torch.float32, 1, "Euler"
    shift_by_size: ShiftBySize | None = None
    grid_end: float | None = None
    times: FlowTimes = "uniform"
    logit_mean, logit_std, mode_scale = 0.0, 1.0, 1.29

    def __init__(self, shift: float = 1.0, time_scale: float = 1000.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift {shift!r} must be greater than 0")
        self.shift, self.time_scale = shift, time_scale

    def training(
        self,
        times: FlowTimes = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        shift: float | None = None,
    ) -> Self:
        """A copy whose times for training are spread otherwise (Esser et al., arXiv 2403.03206, section 3.1).

        Args:
            times: ``uniform``; ``logit_normal``, sigma = sigmoid(n), n normal with ``logit_mean`` and ``logit_std``;
                or ``mode``, sigma = 1 - u - ``mode_scale`` (cos^2(pi u / 2) - 1 + u), u uniform. All are then shifted.
                A positive mean draws more noise, as in the paper.
            logit_mean, logit_std, mode_scale: see there.
            shift: of these times and the grid; None: as it is.
        """
        flow = copy(self)
        vars(flow).update(times=times, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale)
        if shift is not None:
            flow.shift, flow.shift_by_size = shift, None
        return flow

    def on_table(self) -> Self:
        """A copy whose grid ends at the smallest of the scheduler's times, as diffusers' does unless a pipeline gives
        it another. Where the shift is fixed, diffusers applies it to that end twice."""
        flow, smallest = copy(self), 1.0 / self.time_scale
        flow.grid_end = smallest if self.shift_by_size else self._shifted(smallest)
        return flow

    def of_size(self, tokens: int) -> Process:
        if self.shift_by_size is None:
            return self
        flow = copy(self)
        flow.shift, flow.shift_by_size = self.shift_by_size(tokens), None
        return flow

    def exact_marginal(self, t: Tensor) -> Tensor:
        sigma, one = t.double(), torch.ones_like(t, dtype=torch.float64)
        return torch.stack([1.0 - sigma, sigma, -one, one])

    def model_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def grid(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"number of sampling steps {num_steps} must be at least 1")
        if self.grid_end is not None:
            times = torch.linspace(1.0, self.grid_end, num_steps, dtype=torch.float64)
            return torch.cat([self._shifted(times), times.new_zeros(1)]).float()
        return self._shifted(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)).float()

    def draw(self, random: Random) -> Tensor:
        if self.times == "logit_normal":
            u = (self.logit_mean + self.logit_std * random.normals()).sigmoid()
        elif self.times == "mode":
            u = random.uniforms()
            u = 1.0 - u - self.mode_scale * ((pi / 2 * u).cos().square() - 1.0 + u)
        else:
            u = 1.0 - random.uniforms()
        return self._shifted(u.clamp(SMALLEST_SIGMA, 1.0))  # never the clean sample

    def draw_perceptual(self, random: Random, t: Tensor, policy: str = "uniform") -> Tensor:
        """In [0.02, 0.98]: ``uniform`` in sigma, ``lower`` likewise below t; others reflected at the ends."""
        low, high = FLOW_RANGE
        if policy == "uniform":
            return low + (high - low) * random.uniforms()
        if policy == "lower":
            return low + (t.clamp(low, high) - low) * random.uniforms()
        if policy == "same":
            drawn = RectifiedFlow.draw(self, random)  # sigma, of a reversed flow too
        else:
            drawn = t + _displacement(random, policy) / NUM_TRAIN_TIMESTEPS
        width = high - low
        folded = (drawn - low).remainder(2 * width)  # a normal may go past both ends
        return low + torch.minimum(folded, 2 * width - folded)

    def from_model_time(self, name: str, t: Tensor) -> Tensor:
        if t.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} are {t.dtype}, which is too coarse for sigma: give the scheduler's float32 ones")
        return (_within(name, t, self.time_scale).double() / self.time_scale).float()

    def reversed(self) -> Process:
        flow = ReversedFlow(self.shift, self.time_scale)
        vars(flow).update(vars(self))
        return flow

    def _shifted(self, u: Any) -> Any:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


class ReversedFlow(RectifiedFlow):
    """The same flow told from the other end: times are ``1 - sigma``, the network predicts ``x0 - eps`` (Lumina 2)."""

    def exact_marginal(self, t: Tensor) -> Tensor:
        a, s, p, q = super().exact_marginal(1.0 - t.double())
        return torch.stack([a, s, -p, -q])

    def reversed(self) -> Process:
        return self

    def grid(self, num_steps: int) -> Tensor:
        return 1.0 - super().grid(num_steps)

    def draw(self, random: Random) -> Tensor:
        return 1.0 - super().draw(random)

    def draw_perceptual(self, random: Random, t: Tensor, policy: str = "uniform") -> Tensor:
        return 1.0 - super().draw_perceptual(random, 1.0 - t, policy)


def _within(name: str, t: Tensor, last: float) -> Tensor:
    """``t``, whose values are from 0 to ``last``, as far as they are seen."""
    seen = t.tolist() if t.is_cpu and not torch.compiler.is_compiling() else []
    if wrong := [time for time in seen if not 0 <= time <= last]:
        raise ValueError(f"{name} must be from 0 to {last:g}, got {wrong[0]}")
    return t


def _displacement(random: Random, policy: str) -> Tensor:
    """How far t' lies from t, in thousandths of the process. (B,) float32."""
    if policy == "normal":
        return NORMAL_STD * random.normals()
    return OFFSET * (2.0 * random.integers(2) - 1.0)


ProcessSource = Callable[[Any, str | None], Process | None]
_sources: list[ProcessSource] = []


def register_process(source: ProcessSource) -> ProcessSource:
    """Let ``source(scheduler, prediction_type)`` build processes: it returns None for schedulers of another kind.

    Sources are asked in the order of registration, and before the variance preserving process.
    """
    _sources.append(source)
    return source


def process_of(scheduler: Any, prediction_type: str | None = None) -> Process:
    """The process that a scheduler stands for.

    Args:
        scheduler: a :class:`Process` (itself); anything that a registered source knows; a diffusers scheduler of a flow
            (``FlowMatch...``, or with ``flow_prediction``); or one with ``alphas_cumprod``, a :class:`NoiseSchedule` or
            a 1-D tensor of alpha_bar (variance preserving).
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``; None: the scheduler's, or else v.

    Raises:
        ValueError: an unknown scheduler or prediction type, or a pair that does not fit together.
    """
    if isinstance(scheduler, Process):
        return scheduler
    for source in _sources:
        if (process := source(scheduler, prediction_type)) is not None:
            return process
    config = getattr(scheduler, "config", {})
    config = config if isinstance(config, Mapping) else vars(config)
    own = config.get("prediction_type", "v_prediction")
    if type(scheduler).__name__.startswith("FlowMatch") or own == "flow_prediction":
        if prediction_type not in (None, "flow_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r} does not fit a flow: leave it out")
        dynamic = config.get("use_dynamic_shifting")
        shift = 1.0 if dynamic else config.get("shift", config.get("flow_shift", 1.0))
        flow = RectifiedFlow(shift or 1.0, float(config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)))
        if dynamic and "base_shift" in config:
            tokens = config["base_image_seq_len"], config["max_image_seq_len"]
            mu = config["base_shift"], config["max_shift"]
            flow.shift_by_size = ShiftBySize(tokens, mu, config.get("time_shift_type") != "linear")
        return flow
    if prediction_type is None:
        prediction_type = own
    return VariancePreserving(NoiseSchedule.of(scheduler), prediction_type)

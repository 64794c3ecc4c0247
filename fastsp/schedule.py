"""The noise schedule: the table of alpha_bar and what is derived from it.

Everything downstream reads the schedule through :class:`NoiseSchedule`: float64 angles for the rotation form of the
self-perceptual loss, float32 coefficients for diffusion, the trailing timestep grid for sampling. Timesteps index the
table ``0 .. T-1`` (the paper's ``1 .. T``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Stable Diffusion's betas, 1.x, 2.x and XL alike.
NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012

# Of the policies for t' (Table 4 of the paper): a normal of this spread around t, or this distance from it.
NORMAL_STD = 100.0
OFFSET = 40


def scaled_linear_alphas_cumprod(
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, beta_start: float = BETA_START, beta_end: float = BETA_END
) -> Tensor:
    """Stable Diffusion's "scaled linear" schedule: betas linear in their square roots. (T,) float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale ``sqrt(alpha_bar)`` so that the last step is pure noise and the first keeps its value.

    Source: Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed* (arXiv 2305.08891), Algorithm 1.
    """
    signal = alphas_cumprod.double().sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


class NoiseSchedule:
    """The table of alpha_bar_t and the tensors derived from it.

    Attributes (all of shape (T,), on the CPU until :meth:`to` moves them):
        alphas_cumprod: alpha_bar_t, float64.
        angles: ``phi_t = atan2(s_t, a_t)``, float64. Neighbouring timesteps cancel in float32.
        signal: ``a_t = sqrt(alpha_bar_t)``, float32.
        noise: ``s_t = sqrt(1 - alpha_bar_t)``, float32.

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
        self.angles = torch.atan2((1.0 - table).sqrt(), table.sqrt())
        self.signal = table.sqrt().float()
        self.noise = (1.0 - table).sqrt().float()

    @classmethod
    def stable_diffusion(cls, zero_terminal_snr: bool = True) -> NoiseSchedule:
        """Stable Diffusion's schedule of 1000 steps, by default rescaled to zero terminal SNR."""
        table = scaled_linear_alphas_cumprod()
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

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Move the tables to ``device``, in place; returns ``self``."""
        if self.angles.device != torch.device(device):
            for name in ("alphas_cumprod", "angles", "signal", "noise"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def require(self, prediction_type: str) -> None:
        """Refuse a prediction type whose conversion to v would divide by zero somewhere in the table.

        Raises:
            ValueError: ``epsilon`` where alpha_bar = 0 (zero terminal SNR), or ``sample`` where alpha_bar = 1.
        """
        if prediction_type == "epsilon" and bool((self.alphas_cumprod == 0).any()):
            raise ValueError(
                "prediction_type 'epsilon' cannot be used with zero terminal SNR: where alpha_bar = 0 the noise says "
                "nothing about the sample; use 'v_prediction', or a schedule without rescaling"
            )
        if prediction_type == "sample" and bool((self.alphas_cumprod == 1).any()):
            raise ValueError(
                "prediction_type 'sample' cannot be used where alpha_bar = 1: the sample says nothing about the noise"
            )

    def trailing_timesteps(self, num_steps: int) -> list[int]:
        """``num_steps`` timesteps from T-1 downward, evenly spaced, the last one included (trailing spacing).

        Source: Lin et al. (arXiv 2305.08891), Table 2; rounding as in diffusers.

        Raises:
            ValueError: ``num_steps`` is not in 1 .. T.
        """
        total = len(self)
        if not 1 <= num_steps <= total:
            raise ValueError(f"number of sampling steps {num_steps} must be between 1 and {total}")
        # Python rounds halves to even, as numpy does in diffusers.
        return [round(total - i * total / num_steps) - 1 for i in range(num_steps)]


def displace(timesteps: Tensor, displacement: Tensor, num_train_timesteps: int) -> Tensor:
    """``t + displacement``, rounded and clamped to the table. (B,) int64."""
    return (timesteps + displacement.round().long()).clamp(0, num_train_timesteps - 1)


def sample_perceptual_timesteps(
    timesteps: Tensor, num_train_timesteps: int, policy: str = "uniform", generator: torch.Generator | None = None
) -> Tensor:
    """Draw t' for every t from torch's generator (Table 4 of the paper).

    Args:
        timesteps: t, (B,) integers.
        num_train_timesteps: T.
        policy: ``uniform`` over the table; ``normal``: t + N(0, 100^2); ``offset``: t + 40 or t - 40.
        generator: None for torch's default one. The draws are made on its device.

    Returns:
        t', (B,) int64, on the device of ``timesteps``.
    """
    device = timesteps.device if generator is None else generator.device
    shape = timesteps.shape
    if policy == "uniform":
        return torch.randint(num_train_timesteps, shape, generator=generator, device=device).to(timesteps.device)
    if policy == "normal":
        displacement = NORMAL_STD * torch.randn(shape, generator=generator, device=device)
    else:
        displacement = OFFSET * (2.0 * torch.randint(2, shape, generator=generator, device=device) - 1.0)
    return displace(timesteps, displacement.to(timesteps.device), num_train_timesteps)

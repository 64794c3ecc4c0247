"""Noise schedulers in diffusers' class: as a folder says, and as fastsp trains."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler

from fastsp.diffusion.process import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from fastsp.errors import UserError

_BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
_MEANING = ("prediction_type", "rescale_betas_zero_snr")  # of the model's answers


def loaded_scheduler(config: Any, name: str) -> DDIMScheduler:
    """A folder's scheduler, of any class, as fastsp samples: its noise and prediction type; trailing DDIM.

    Args:
        config: of the scheduler.
        name: of the model, for people.

    Raises:
        UserError: it has no schedule of betas, or one that diffusers' DDIM does not know.
    """
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise UserError(f"{name}: the scheduler {config.get('_class_name')} has no beta_schedule: fastsp needs one")
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    try:
        return ddim_scheduler(**defaults | _taken(config, (*_BETAS, *_MEANING)))
    except NotImplementedError:
        raise UserError(f"{name}: the scheduler's beta_schedule {config['beta_schedule']!r} is unknown") from None


def trained_scheduler(config: Any) -> DDIMScheduler:
    """A folder's scheduler as fastsp trains it: the folder's betas, and the settings of :func:`ddim_scheduler`."""
    return ddim_scheduler(**_taken(config, _BETAS))


def ddim_scheduler(**overrides: Any) -> DDIMScheduler:
    """The scheduler that fastsp trains for: v-prediction, zero terminal SNR, trailing spacing, no clipping.

    The last step lands on alpha_bar = 1 (``set_alpha_to_one``).
    """
    settings = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_schedule": "scaled_linear",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # as Stable Diffusion has it; without meaning for trailing timesteps
    }
    return DDIMScheduler(**{**settings, **overrides})


def _taken(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys if config.get(key) is not None}

"""Noise schedulers in diffusers' class: as a folder has it, and as fastsp trains."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from fastsp.diffusion.process import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from fastsp.errors import UserError

_BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
_FLOW = (
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len", "time_shift_type"),
)
_OTHER_GRIDS = (
    *("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    "stochastic_sampling",
)
_MEANING = ("prediction_type", "rescale_betas_zero_snr")  # what the model predicts


def is_flow(config: Any) -> bool:
    """Whether a scheduler's configuration is that of a rectified flow."""
    return "beta_schedule" not in config and "shift" in config


def flow_scheduler(**overrides: Any) -> FlowMatchEulerDiscreteScheduler:
    """Euler's steps on a rectified flow; the grid is evenly spaced, and shifted if ``shift`` is given."""
    return FlowMatchEulerDiscreteScheduler(**overrides)


def loaded_flow_scheduler(config: Any, name: str) -> FlowMatchEulerDiscreteScheduler:
    """An Euler scheduler with the shift of a folder's.

    Raises:
        UserError: it is no flow's, or spaces its steps in a way that fastsp does not know.
    """
    if not is_flow(config):
        raise UserError(
            f"{name}: the scheduler {config.get('_class_name')} is none of a rectified flow, as it should be"
        )
    for key in _OTHER_GRIDS:
        if config.get(key):
            raise UserError(f"{name}: the scheduler's {key} is {config[key]!r}; fastsp samples without it")
    return flow_scheduler(**_taken(config, _FLOW))


def loaded_scheduler(config: Any, name: str) -> DDIMScheduler:
    """A trailing DDIM scheduler with the betas and the prediction type of a folder's, of any class.

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
    """The scheduler of ``model.prediction: v_zero_snr``: a folder's betas, the settings of :func:`ddim_scheduler`."""
    return ddim_scheduler(**_taken(config, _BETAS))


def meaning_of(config: Any) -> tuple[str, str]:
    """What a model predicts, and on which schedule, in words: ``("v", "with zero terminal SNR")``."""
    if is_flow(config):
        dynamic = config.get("use_dynamic_shifting")
        return "velocity", "of a rectified flow, shifted " + ("by size" if dynamic else f"by {config['shift']:g}")
    predicts = str(config["prediction_type"]).removesuffix("_prediction")
    return predicts, "with zero terminal SNR" if config.get("rescale_betas_zero_snr") else "on its own noise schedule"


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
        "steps_offset": 1,  # Stable Diffusion's; without effect on trailing timesteps
    }
    return DDIMScheduler(**{**settings, **overrides})


def _taken(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys if config.get(key) is not None}

"""One `.safetensors` file with the whole pipeline, as ComfyUI, A1111, Forge and InvokeAI open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsp.export.layout import Layout, State, layout_of, original_layout
from fastsp.families import family_of
from fastsp.utils.files import new_file, save_tensors

# Of https://github.com/Stability-AI/ModelSpec, 1.0.0. There is one identifier for Stable Diffusion 2 with v-prediction.
_ARCHITECTURE: dict[Layout, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_IMPLEMENTATION: dict[Layout, str] = {
    "sd1": "https://github.com/CompVis/stable-diffusion",
    "sd2": "https://github.com/Stability-AI/stablediffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}


def save_single_file(pipeline: Any, path: Path, dtype: torch.dtype, title: str) -> None:
    """Write the pipeline's weights in the original layout, with the markers of its noise schedule.

    Args:
        pipeline: a diffusers pipeline of Stable Diffusion 1.x, 2.x or XL.
        path: of the file; it appears whole or not at all.
        dtype: of the weights.
        title: for the programs' lists of models.

    Raises:
        UserError: the pipeline has no original layout.
    """
    state = {key: weight.to(dtype).contiguous() for key, weight in original_layout(pipeline).items()}
    state |= markers(pipeline.scheduler)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_tensors(state, unfinished, _metadata(pipeline, title))


def markers(scheduler: Any) -> State:
    """Empty tensors whose names tell how to sample: ``v_pred`` for v-prediction, ``ztsnr`` for zero terminal SNR.

    ComfyUI, A1111 and Forge look for them in files of Stable Diffusion XL, Forge for ``ztsnr`` in all.
    """
    wanted = {
        "v_pred": scheduler.config.prediction_type == "v_prediction",
        "ztsnr": bool(scheduler.config.rescale_betas_zero_snr),
    }
    return {name: torch.empty(0) for name, is_set in wanted.items() if is_set}


def _metadata(pipeline: Any, title: str) -> dict[str, str]:
    layout = layout_of(pipeline)
    side = family_of(pipeline.unet).side(pipeline.unet.config) * pipeline.vae_scale_factor
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURE[layout],
        "modelspec.implementation": _IMPLEMENTATION[layout],
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": prediction.get(pipeline.scheduler.config.prediction_type, ""),
    }

"""One `.safetensors` file with the whole pipeline, as ComfyUI, A1111, Forge and InvokeAI open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsp.export.layout import Layout, layout_of, original_layout
from fastsp.families import family_of
from fastsp.utils.files import new_file, save_tensors

# Architecture and implementation, by https://github.com/Stability-AI/ModelSpec, 1.0.0. Stable Diffusion 2 with
# v-prediction has one identifier.
_MODEL_SPEC: dict[Layout, tuple[str, str]] = {
    "sd1": ("stable-diffusion-v1", "CompVis/stable-diffusion"),
    "sd2": ("stable-diffusion-v2-768-v", "Stability-AI/stablediffusion"),
    "sdxl": ("stable-diffusion-xl-v1-base", "Stability-AI/generative-models"),
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
    # ComfyUI, A1111 and Forge look for these empty tensors in files of Stable Diffusion XL, Forge for `ztsnr` in all.
    state |= {"v_pred": torch.empty(0)} if pipeline.scheduler.config.prediction_type == "v_prediction" else {}
    state |= {"ztsnr": torch.empty(0)} if pipeline.scheduler.config.rescale_betas_zero_snr else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_tensors(state, unfinished, _metadata(pipeline, title))


def _metadata(pipeline: Any, title: str) -> dict[str, str]:
    architecture, repository = _MODEL_SPEC[layout_of(pipeline)]
    side = family_of(pipeline.unet).side(pipeline.unet.config) * pipeline.vae_scale_factor
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": f"https://github.com/{repository}",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": prediction.get(pipeline.scheduler.config.prediction_type, ""),
    }

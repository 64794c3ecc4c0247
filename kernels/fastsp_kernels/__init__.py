"""The ground floor of fastsp: counter-based random numbers and fused kernels, over torch, numpy and triton alone."""

from fastsp_kernels._triton import use_triton_on_cpu
from fastsp_kernels.adamw_ema import adamw_ema, global_norm
from fastsp_kernels.diffuse import diffuse
from fastsp_kernels.philox import (
    Stream,
    philox_4x32_10,
    random_integers,
    random_normals,
    random_uniforms,
    random_words,
)
from fastsp_kernels.reproject import reproject

__all__ = [
    "Stream",
    "adamw_ema",
    "diffuse",
    "global_norm",
    "philox_4x32_10",
    "random_integers",
    "random_normals",
    "random_uniforms",
    "random_words",
    "reproject",
    "use_triton_on_cpu",
]

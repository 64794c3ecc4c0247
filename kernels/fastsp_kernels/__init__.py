"""The ground floor of fastsp: counter-based random numbers and the fused kernels, over torch and triton alone."""

from fastsp_kernels.philox import (
    Stream,
    philox_4x32_10,
    random_integers,
    random_normals,
    random_uniforms,
    random_words,
)

__all__ = [
    "Stream",
    "philox_4x32_10",
    "random_integers",
    "random_normals",
    "random_uniforms",
    "random_words",
]

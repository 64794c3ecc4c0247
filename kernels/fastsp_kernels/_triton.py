"""How kernels are compiled, tuned and chosen: everything that depends on whether Triton and a GPU are there.

- Triton missing (macOS): kernels stay plain functions that nobody calls; every op takes its PyTorch reference.
- No GPU: kernels are built for Triton's interpreter, so that tests can run them on CPU tensors (`use_triton_on_cpu`).
- A GPU: kernels are compiled for it, and CUDA tensors take them.

The environment variable TRITON_INTERPRET, where it is set, decides between the last two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

_wanted = os.environ.get("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETED = _wanted.lower() in ("1", "true", "yes", "on", "y")  # what Triton itself takes for true

# Multiply and add round separately, as in eager PyTorch, so that a kernel of the latents and its reference agree to the
# last bit. These kernels wait for memory, not for arithmetic.
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

# What is tuned takes microseconds, up to a tenth of a millisecond: hundreds of repetitions.
TUNING_WARMUP_MS, TUNING_MS = 5, 20

# Four or eight elements a thread. One choice for all sizes of latents: a new size costs no tuning, and what is good for
# one is good for others.
LATENT_SHAPES = ((512, 4), (1024, 4), (1024, 8), (2048, 8))

_triton_on_cpu = False


@contextmanager
def use_triton_on_cpu() -> Iterator[None]:
    """Within it, ops on CPU tensors run the Triton kernel under Triton's interpreter. For tests: it is very slow.

    Raises:
        RuntimeError: Triton is missing, or the kernels were compiled for a GPU (set TRITON_INTERPRET=1 before import).
    """
    global _triton_on_cpu
    if triton is None or not INTERPRETED:
        raise RuntimeError(
            "the kernels are not interpreted: install triton and set TRITON_INTERPRET=1 before importing"
        )
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before


def uses_triton(tensor: Tensor) -> bool:
    """Whether an op on this tensor takes the Triton kernel; the PyTorch reference otherwise."""
    return _triton_on_cpu or (tensor.is_cuda and triton is not None and not INTERPRETED)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, for the interpreter where there is no GPU."""
    if triton is None:
        return function
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = INTERPRETED
        return triton.jit(function)


def autotune(shapes: tuple[tuple[int, int], ...] = LATENT_SHAPES, key: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """`triton.autotune` over pairs of BLOCK and num_warps, measured once for each `key` and dtypes of the arguments.

    Under the interpreter the first block size is taken. Tuning runs a kernel many times on its own output.
    """
    if triton is None:
        return lambda kernel: kernel
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in shapes]
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=list(key), do_bench=_time_outside_capture)


def _time_outside_capture(call: Callable[[], Any], quantiles: Any) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("block sizes are tuned at the first call: make one with these shapes before capturing")
    return triton.testing.do_bench(call, warmup=TUNING_WARMUP_MS, rep=TUNING_MS, quantiles=quantiles)


def launch_on_latents(
    kernel: Any, latents: Tensor, pointers: Sequence[Tensor | None], strided: Sequence[Tensor | None], **constants: int
) -> None:
    """A program for every BLOCK elements of each sample. After `pointers` a kernel takes the strides of `strided`
    (anything for None), then the batch, the elements of a sample, their height and width."""
    batch, channels, height, width = latents.shape
    elements = channels * height * width
    strides = [(latents if tensor is None else tensor).stride() for tensor in strided]
    with torch.cuda.device_of(latents):
        kernel[lambda meta: (batch * -(-elements // meta["BLOCK"]),)](
            *pointers, *strides, batch, elements, height, width, **constants, **LAUNCH_OPTIONS
        )


@jit
def offsets_device(strides, sample, element, height, width):
    """int64 offsets of a sample's elements, numbered in logical C, H, W order, in a tensor of these four strides."""
    column = (element % width).to(tl.int64)
    row = (element // width % height).to(tl.int64)
    channel = (element // (height * width)).to(tl.int64)
    return sample.to(tl.int64) * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3]


@jit
def load_device(pointer, strides, sample, element, height, width, mask):
    """Elements of a (B, C, H, W) tensor as float32; 0 where masked."""
    return tl.load(pointer + offsets_device(strides, sample, element, height, width), mask, other=0.0).to(tl.float32)


@jit
def store_device(pointer, strides, sample, element, height, width, mask, values):
    """The reverse: float32 values, rounded to the tensor's dtype."""
    offsets = offsets_device(strides, sample, element, height, width)
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask)

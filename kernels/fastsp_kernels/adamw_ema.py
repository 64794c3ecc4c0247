"""AdamW, the moving average of the weights and the low-precision copy, in one pass over all parameters.

AdamW is Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), as in `torch.optim.AdamW`:

    g = clip * grad          m = lerp(m, g, 1 - beta1)          v = beta2 v + (1 - beta2) g^2
    w = (1 - lr * weight_decay) w - lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + eps)
    ema = lerp(ema, w, 1 - ema_decay)                           copy = round(w)

with n the number of updates including this one. The arithmetic is float32 and elementwise, so the result does not
depend on block sizes or on the order of programs: it is deterministic. Everything that changes from step to step is a
device tensor and nothing is read back, so the step can be captured in a CUDA graph.

Not covered: sparse or complex parameters, AMSGrad, float16 gradients with loss scaling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsp_kernels._checks import check_tensor
from fastsp_kernels._tensor_lists import ALIGNMENT, CHUNK, AddressTables, are_aligned, check_lists, chunk_table
from fastsp_kernels._triton import INTERPRETED, LAUNCH_OPTIONS, autotune, jit, tl, uses_triton

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
SCALAR_DTYPES = {"step": (torch.float32, torch.int64), "skipped": (torch.int64,)}  # the others are float32
TUNING_ELEMENTS = 1 << 24  # well beyond the cache of any GPU

Lists = tuple[list[Tensor], ...]  # masters, gradients, exp_avgs, exp_avg_sqs, emas, copies


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm over all gradients together, 0-d float32, accumulated in float32; deterministic, without a host sync.

    Raises:
        ValueError: an empty list.
    """
    if not gradients:
        raise ValueError("gradients must not be empty")
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def adamw_ema(
    masters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    *,
    learning_rate: Tensor,
    ema_decay: Tensor,
    gradient_norm: Tensor,
    step: Tensor,
    skipped: Tensor,
    max_norm: float = math.inf,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One optimizer step, in place. Where the gradient's norm is not finite, only `skipped` changes (by one).

    Args:
        masters: the weights, float32. In every list, tensor i has the shape and the strides of master i, which are
            dense in some order of dimensions (contiguous or channels_last).
        gradients: float32 or bfloat16, one dtype for the list, as in every list. They are used up: what they hold
            afterwards is not defined.
        exp_avgs: first moments m, float32 or bfloat16.
        exp_avg_sqs: second moments v, float32 or bfloat16. In bfloat16 a change of less than 1/512 is rounded away, so
            with beta2 = 0.999 it stops decaying: use it only with beta2 <= 0.99.
        emas: moving averages of the weights, float32.
        copies: the weights in bfloat16 or float16, rounded to nearest; or an empty list.
        learning_rate, ema_decay: 0-d float32 tensors on the masters' device, as are the next three.
        gradient_norm: 0-d float32, the norm of all gradients of the model, such as `global_norm(gradients)`.
        step: 0-d float32 or int64, the number of updates done so far; grows by one with an update.
        skipped: 0-d int64, the number of steps skipped so far.
        max_norm: gradients are scaled by min(1, max_norm / (gradient_norm + 1e-6)).
        betas, eps, weight_decay: of AdamW.

    Raises:
        ValueError: empty lists, or lengths, shapes, strides, dtypes or devices that do not fit together; options out of
            range.
    """
    lists = (masters, gradients, exp_avgs, exp_avg_sqs, emas, copies)
    check_lists(lists)
    scalars = {"learning_rate": learning_rate, "ema_decay": ema_decay, "gradient_norm": gradient_norm}
    for name, scalar in {**scalars, "step": step, "skipped": skipped}.items():
        check_tensor(name, scalar, (), SCALAR_DTYPES.get(name, (torch.float32,)), masters[0])
    _check_options(max_norm, betas, eps, weight_decay)
    arguments = (*lists, learning_rate, ema_decay, gradient_norm, step, skipped, max_norm, *betas, eps, weight_decay)
    if _is_plain_on_cpu(masters[0]):
        with torch.no_grad():
            _update(*arguments)
    else:
        _adamw_ema(*arguments)


def _is_plain_on_cpu(tensor: Tensor) -> bool:
    """Nothing traces or records the update there, and handing a thousand tensors to an operator takes as long as it."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu


def _check_options(max_norm: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """What would make all weights NaN, or go uphill, without a gradient that is not finite."""
    if max_norm is None or not max_norm > 0:
        raise ValueError(f"max_norm must be greater than 0 (math.inf: none), got {max_norm}")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] must be from 0 to less than 1, got {beta}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or greater, got {value}")


def _update(
    masters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    learning_rate: Tensor,
    ema_decay: Tensor,
    gradient_norm: Tensor,
    step: Tensor,
    skipped: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    finite = torch.isfinite(gradient_norm)
    step += finite
    skipped += ~finite
    lists = (masters, gradients, exp_avgs, exp_avg_sqs, emas, copies)
    clip = (max_norm / (gradient_norm.double() + CLIP_EPSILON)).clamp(max=1.0)
    if uses_triton(masters[0]):
        rate, number, average = learning_rate.double(), step.double(), 1 - ema_decay.double()
        step_size, root_correction = rate / (1 - beta1**number), (1 - beta2**number).sqrt()
        factors = torch.stack((finite.double(), clip, 1 - rate * weight_decay, step_size, root_correction, average))
        _update_triton(lists, factors, (1 - beta1, beta2, 1 - beta2, eps))
    elif finite:  # read on the host, which on a CPU is nothing to wait for
        options = {"beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
        _update_reference(lists, step, clip, float(ema_decay), lr=float(learning_rate), **options)


_adamw_ema = torch.library.custom_op(
    "fastsp::adamw_ema",
    mutates_args=("masters", "gradients", "exp_avgs", "exp_avg_sqs", "emas", "copies", "step", "skipped"),
)(_update)


@_adamw_ema.register_fake
def _adamw_ema_fake(*arguments: object) -> None:
    """Everything is in place: there is no output."""


def _update_reference(lists: Lists, step: Tensor, clip: Tensor, ema_decay: float, **options: Any) -> None:
    """torch's fused AdamW with these options, then the average."""
    masters, gradients, exp_avgs, exp_avg_sqs, emas, copies = ([_flat(tensor) for tensor in group] for group in lists)
    gradients = [gradient.float() for gradient in gradients]  # themselves where float32, as the next two
    first, second = [m.float() for m in exp_avgs], [v.float() for v in exp_avg_sqs]
    torch._fused_adamw_(
        masters,
        gradients,
        first,
        second,
        [],
        [step.float()] * len(masters),
        **options,
        amsgrad=False,
        maximize=False,
        grad_scale=None if clip == 1 else (1 / clip).float(),  # gradients are divided by it, in the same pass
    )
    torch._foreach_lerp_(emas, masters, 1 - ema_decay)
    for stored, values in ((exp_avgs, first), (exp_avg_sqs, second), (copies, masters)):
        if stored and stored[0].dtype != torch.float32:
            torch._foreach_copy_(stored, values)


def _flat(tensor: Tensor) -> Tensor:
    """The same memory in its own order, since PyTorch's fused update copies what is not contiguous."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _update_triton(lists: Lists, factors: Tensor, constants: tuple[float, ...]) -> None:
    """`factors`: (6,) float64; the kernel takes both in the order of `_update_device`."""
    aligned = are_aligned(lists)
    kind = (*(tensors[0].dtype for tensors in lists if tensors), aligned, factors.device)
    if kind not in _tuned and not INTERPRETED:
        _launch(_scratch(lists), aligned, factors, constants)
        _tuned.add(kind)
    _launch(lists, aligned, factors, constants)


_address_tables = AddressTables()
_tuned: set[tuple[object, ...]] = set()


def _scratch(lists: Lists) -> Lists:
    """Lists of the same dtypes to tune on: tuning repeats the update, and an update in place must not be repeated."""
    elements = min(TUNING_ELEMENTS, sum(master.numel() for master in lists[0]))
    return tuple([tensors[0].new_ones(elements)] if tensors else [] for tensors in lists)


def _launch(lists: Lists, aligned: bool, factors: Tensor, constants: tuple[float, ...]) -> None:
    masters, gradients, exp_avgs, exp_avg_sqs, _, copies = lists
    chunks = chunk_table(tuple(master.numel() for master in masters), factors.device)
    with torch.cuda.device_of(factors):
        _adamw_ema_kernel[(len(chunks),)](
            _address_tables.find(lists),
            chunks,
            factors,
            len(masters),
            *constants,
            GRADIENT=_triton_dtype(gradients),
            FIRST=_triton_dtype(exp_avgs),
            SECOND=_triton_dtype(exp_avg_sqs),
            COPY=_triton_dtype(copies),
            ALIGNMENT=ALIGNMENT if aligned else 1,
            CHUNK=CHUNK,
            **LAUNCH_OPTIONS,
        )


def _triton_dtype(tensors: list[Tensor]) -> Any:
    """The element type of a list, None for an empty one."""
    return getattr(tl, str(tensors[0].dtype).removeprefix("torch.")) if tensors else None


# Four elements a thread: 16 bytes of float32, and less than 64 registers. With more, Triton lays bfloat16 gradients and
# copies out for 16 bytes too, eight elements, and takes everything through shared memory from one layout to the other.
# A second block in flight would not pay: the thousand threads of a multiprocessor wait for 70 KB already, where 25 KB
# would hide the latency.
@autotune(((512, 4), (1024, 8), (2048, 16)), key=("GRADIENT", "FIRST", "SECOND", "COPY", "ALIGNMENT"))
@jit
def _adamw_ema_kernel(
    addresses_ptr,
    chunks_ptr,
    factors_ptr,
    tensors,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one chunk of one tensor. A skipped step has no elements, and so moves no bytes."""
    chunk = chunks_ptr + tl.program_id(0) * 3
    finite = tl.load(factors_ptr).to(tl.int64)
    tensor, count = tl.load(chunk), tl.load(chunk + 2) * finite
    first = tl.multiple_of(tl.load(chunk + 1), CHUNK)
    column = addresses_ptr + tensor
    pointers = (
        _pointer_device(column, tl.float32, first, ALIGNMENT),
        _pointer_device(column + tensors, GRADIENT, first, ALIGNMENT),
        _pointer_device(column + 2 * tensors, FIRST, first, ALIGNMENT),
        _pointer_device(column + 3 * tensors, SECOND, first, ALIGNMENT),
        _pointer_device(column + 4 * tensors, tl.float32, first, ALIGNMENT),
    )
    copy_ptr = None if COPY is None else _pointer_device(column + 5 * tensors, COPY, first, ALIGNMENT)
    factors = (
        tl.load(factors_ptr + 1).to(tl.float32),
        tl.load(factors_ptr + 2).to(tl.float32),
        tl.load(factors_ptr + 3).to(tl.float32),
        tl.load(factors_ptr + 4).to(tl.float32),
        tl.load(factors_ptr + 5).to(tl.float32),
    )
    constants = (one_minus_beta1, beta2, one_minus_beta2, eps)
    for start in range(0, CHUNK, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:  # no mask, so that a thread moves 16 bytes at a time
            _update_device(pointers, copy_ptr, offset, None, factors, constants)
        elif start < count:
            _update_device(pointers, copy_ptr, offset, offset < count, factors, constants)


@jit
def _update_device(pointers, copy_ptr, offset, mask, factors, constants):
    master_ptr, gradient_ptr, first_ptr, second_ptr, ema_ptr = pointers
    clip, shrink, step_size, root_correction, ema_weight = factors
    one_minus_beta1, beta2, one_minus_beta2, eps = constants
    gradient = tl.load(gradient_ptr + offset, mask).to(tl.float32) * clip
    first_moment = tl.load(first_ptr + offset, mask).to(tl.float32)
    second_moment = tl.load(second_ptr + offset, mask).to(tl.float32)
    master = tl.load(master_ptr + offset, mask) * shrink
    ema = tl.load(ema_ptr + offset, mask)

    first_moment = _lerp_device(first_moment, gradient, one_minus_beta1)
    second_moment = second_moment * beta2 + one_minus_beta2 * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(second_moment), root_correction) + eps
    master = master - step_size * tl.div_rn(first_moment, denominator)

    tl.store(first_ptr + offset, first_moment.to(first_ptr.dtype.element_ty), mask)
    tl.store(second_ptr + offset, second_moment.to(second_ptr.dtype.element_ty), mask)
    tl.store(master_ptr + offset, master, mask)
    tl.store(ema_ptr + offset, _lerp_device(ema, master, ema_weight), mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offset, master.to(copy_ptr.dtype.element_ty), mask)


@jit
def _pointer_device(address_ptr, DTYPE: tl.constexpr, first, ALIGNMENT: tl.constexpr):
    """The address that is stored at `address_ptr`, moved on by `first` elements."""
    pointer = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGNMENT) + first


@jit
def _lerp_device(start, end, weight):
    """torch.lerp's two branches: exactly `end` at weight 1."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))

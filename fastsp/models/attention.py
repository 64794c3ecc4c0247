"""Which attention kernel a network uses: measured on its own shapes among what is installed, and set on its processors.

How a network of some class is given its kernel, its family says (:mod:`fastsp.families`).
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from fastsp.errors import UserError
from fastsp.families import Config, family_named, family_of
from fastsp.utils.cuda_graphs import record_cuda_graphs
from fastsp.utils.files import write_file

TORCH_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("sdpa", *TORCH_BACKENDS, "xformers")  # sdpa: what PyTorch takes by itself
SECONDS_PER_MEASUREMENT = 0.05
CALLS_PER_GRAPH = 10

Shape = tuple[int, ...]  # (B, heads, length, width)
Kernel = str | dict[int, str]  # a name, or names by the length of the queries
Calls = Counter[tuple[Shape, Shape]]  # of query and key: how often a forward asks for it


@dataclass(frozen=True)
class Choice:
    """The chosen kernel and the measurements behind the choice."""

    name: str
    milliseconds: dict[str, float]
    """Forward and backward of all attention in one forward of the network; empty where nothing was measured."""

    def __str__(self) -> str:
        times = sorted(self.milliseconds.items(), key=lambda item: item[1])
        measured = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times)
        return f"attention: {self.name}" + (f" ({measured} a forward and backward)" if measured else "")


class ChosenAttnProcessor(AttnProcessor2_0):
    """diffusers' own processor, with PyTorch restricted to one of its kernels."""

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(self.backend):
            return super().__call__(*args, **kwargs)


class AttnProcessorByLength:
    """A kernel for each length of the queries: for training on images of several shapes."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.processors = {length: _processor(name) for length, name in names.items()}
        self.other = next(iter(self.processors.values()))

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        length = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
        return self.processors.get(length, self.other)(attn, hidden_states, *args, **kwargs)


class JointAttnProcessor:
    """A transformer's own processor, with PyTorch restricted to one of its kernels.

    Args:
        processor: of diffusers; it attends to image and text together, or to one sequence.
        kernel: for sequences of any length, or for each length.
    """

    def __init__(self, processor: Any, kernel: Kernel) -> None:
        self.processor, self.kernel = processor, kernel

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        length = hidden_states.shape[1] + text
        name = self.kernel if isinstance(self.kernel, str) else self.kernel.get(length, "sdpa")
        with nullcontext() if name == "sdpa" else sdpa_kernel(TORCH_BACKENDS[name]):
            return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def available(device: torch.device) -> tuple[str, ...]:
    """The kernels that a device has, by name."""
    if device.type != "cuda":
        return ("sdpa", "math")
    return NAMES if importlib.util.find_spec("xformers") else NAMES[:-1]


def check_available(wanted: str, device: torch.device) -> None:
    """A UserError for an unknown name, or a kernel that this machine lacks."""
    if wanted not in (there := ("auto", *available(device))):
        fault = "not available here" if wanted in NAMES else "unknown"
        raise UserError(f"attention: {wanted!r} is {fault}; on this {device.type} there are {', '.join(there)}")


def kernels_of(kind: str, wanted: str, device: torch.device) -> tuple[str, ...]:
    """The kernels that a network of a class can have on a device; a UserError if ``wanted`` is neither one of them nor
    ``auto``."""
    names = tuple(name for name in available(device) if name not in family_named(kind).other_kernels)
    if wanted not in ("auto", *names):
        raise UserError(f"attention: {wanted!r} is not for a {kind}; it takes {', '.join(('auto', *names))}")
    return names


def choose_attention(
    wanted: str, network_config: Config, latents: Shape, text: Shape, dtype: torch.dtype, device: torch.device
) -> Choice:
    """The kernel that ``wanted`` stands for; ``auto``: the fastest on a GPU, PyTorch's own choice on a CPU.

    Args:
        wanted: ``auto`` or one of the names.
        network_config: the network's configuration, see :func:`fastsp.families.full_config`.
        latents, text: shapes of a microbatch, (B, C, H, W) and (B, L, D).
        dtype, device: that the network computes in and on.

    Raises:
        UserError: ``wanted`` is not available, not for such a network, or cannot compute these shapes in this dtype.
    """
    check_available(wanted, device)
    names = kernels_of(network_config["_class_name"], wanted, device)
    if wanted in ("sdpa", "math") or (wanted == "auto" and (device.type != "cuda" or names == ("sdpa",))):
        return Choice("sdpa" if wanted == "auto" else wanted, {})
    names = names if wanted == "auto" else (wanted, "sdpa")
    times = milliseconds(names, attention_calls(network_config, latents, text), dtype, device)
    if wanted == "auto":
        return Choice(min(times, key=times.__getitem__, default="sdpa"), times)
    if wanted not in times:
        raise UserError(
            f"attention: {wanted!r} cannot compute these shapes in {str(dtype).removeprefix('torch.')}; use auto"
        )
    return Choice(wanted, times)


def kept_choice(file: Path, question: dict[str, Any], make: Callable[[], Choice]) -> Choice:
    """The choice kept in ``file`` for the same question; else a new one, which is kept if it was measured."""
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["question"] == question:
            return Choice(kept["name"], kept["milliseconds"])
    choice = make()
    if choice.milliseconds:
        write_file(file, json.dumps({"question": question, **asdict(choice)}, indent=1) + "\n")
    return choice


def by_length(choices: Sequence[tuple[Choice, Callable[[], Calls]]]) -> Kernel:
    """The kernels for images of several shapes, by the choice for each and what counts its calls."""
    names = [choice.name for choice, _ in choices]
    if len(set(names)) == 1:
        return names[0]
    lengths: dict[int, str] = {}
    for choice, calls in choices:
        for query, _ in calls():
            lengths.setdefault(query[2], choice.name)  # two shapes seldom share a length; if so, that of the first
    return lengths


def use_attention(network: Any, kernel: Kernel) -> Any:
    """Set the kernel on a network's own processors, in place. Processors of other kinds stay as they are."""
    plain = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, ChosenAttnProcessor, AttnProcessorByLength)

    def exchange(old: Any) -> Any:
        if type(old) in plain:
            return _processor(kernel) if isinstance(kernel, str) else AttnProcessorByLength(kernel)
        own = old.processor if type(old) is JointAttnProcessor else old
        if type(own) in (JointAttnProcessor2_0, FluxAttnProcessor):
            return own if kernel == "sdpa" else JointAttnProcessor(own, kernel)
        return old

    family_of(network).exchange_attention(network, exchange)
    return network


def attention_calls(network_config: Config, latents: Shape, text: Shape) -> Calls:
    """The attention calls of one forward, counted on the meta device: nothing is computed or allocated."""
    family = family_named(network_config["_class_name"])
    with torch.device("meta"), _Recorder() as recorder, torch.no_grad():
        network = family.network_class().from_config(network_config)
        network(**family.example_inputs(network_config, latents, text))
    return recorder.calls


def milliseconds(names: tuple[str, ...], calls: Calls, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of forward and backward of all ``calls`` with each kernel; those that cannot compute them are left out."""
    times: dict[str, float] = {}
    for name in names:
        with suppress(Exception):  # of a shape or dtype that it lacks, of memory, of a package built for another torch
            times[name] = sum(
                count * _milliseconds(name, query, key, dtype, device) for (query, key), count in calls.items()
            )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the plain kernel's scores are large
        torch.cuda.reset_peak_memory_stats(device)  # a run's figures are the training's own
    return times


def _milliseconds(name: str, query: Shape, key: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Time of one call, in the memory layout of most processors' calls: heads are a view of the features.

    On a GPU it is measured in a CUDA graph, as training runs: small calls take longer to launch than to compute.
    """

    def tensor(shape: Shape) -> Tensor:
        batch, heads, length, width = shape
        values = torch.randn(batch, length, heads * width, dtype=dtype, device=device)
        return values.view(batch, length, heads, width).transpose(1, 2).requires_grad_()

    q, k, v = tensor(query), tensor(key), tensor(key)
    gradient = torch.ones_like(q)

    def call(times: int = 1) -> None:
        for _ in range(times):
            torch.autograd.grad(_attend(name, q, k, v), (q, k, v), gradient)

    call()
    calls = 1
    timed: Callable[[], None] = call
    if device.type == "cuda":
        calls = CALLS_PER_GRAPH
        (timed,) = record_cuda_graphs([partial(call, calls)])
    timer = Timer("timed()", globals={"timed": timed})
    return 1e3 * timer.blocked_autorange(min_run_time=SECONDS_PER_MEASUREMENT).median / calls


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        # with the copies that diffusers' processor makes, on the way in and out
        rows = memory_efficient_attention(*(x.flatten(0, 1).contiguous() for x in (q, k, v)))
        return rows.unflatten(0, q.shape[:2]).transpose(1, 2).contiguous().transpose(1, 2)
    with nullcontext() if name == "sdpa" else sdpa_kernel(TORCH_BACKENDS[name]):
        return F.scaled_dot_product_attention(q, k, v)


def _processor(name: str) -> Any:
    if name == "sdpa":
        return AttnProcessor2_0()
    return XFormersAttnProcessor() if name == "xformers" else ChosenAttnProcessor(TORCH_BACKENDS[name])


class _Recorder(TorchFunctionMode):
    """Counts attention calls by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            self.calls[tuple(query.shape), tuple(key.shape)] += 1
        return func(*args, **(kwargs or {}))

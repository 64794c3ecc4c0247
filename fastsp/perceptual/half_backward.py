"""One batched call of the perceptual network whose backward costs half of it.

The network sees ``[x^_t' ; x_t']``, 2B samples, but only the first B need a gradient. Plain autograd would push zeros
through the other half. Here the network is traced twice (AOTAutograd, on fake tensors): at 2B and at B. A call runs the
2B **forward**, which keeps of every saved activation a copy of its first B rows (batch is the outermost dimension, so
they are a prefix) as soon as it is computed; the gradient comes from the B **backward**. The two traces must line up
one to one, by name, shape and layout, which is checked when they are made.

A network whose blocks repeat is not traced as one. Its blocks are, each by itself, and those that are alike share their
graphs, to which the weights are given: so neither tracing nor compiling takes longer for more of them. What is outside
of the blocks is a network's smallest part and runs as it is, differentiated by autograd.

What is saved between forward and backward is decided by AOTAutograd: run as they are, the graphs save what plain
autograd would; compiled, they save less and compute cheap operations again, as ``torch.compile`` does.

Not covered: double backward, gradients to the conditioning, forward-mode differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from functorch.compile import (
    aot_function,
    default_partition,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastsp.perceptual.blocks import Block, BlockFunction, called_by, held, structure
from fastsp.perceptual.network import PerceptualNetwork

Run = Callable[..., Sequence[Any]]


class Misaligned(Exception):  # noqa: N818 - it is a reason to go another way, no failure
    """The traces at 2B and at B do not fit together."""


@dataclass(frozen=True)
class Kept:
    """A tensor that the B backward reads: how it comes out of its partner at 2B."""

    rows: int | None  # the first so many; None: it does not depend on the batch and is passed on as it is
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # that the trace saw


@dataclass(frozen=True)
class Program:
    """The network for one set of shapes. ``forward`` and ``backward`` take and give flat lists of tensors."""

    forward: Run  # the features of 2B samples, then what the backward of B samples reads
    backward: Run
    num_features: int
    tangents: tuple[Kept, ...]
    gradients: dict[int, int]  # by the place of an input, which of the backward's results is its gradient


class HalfBackward:
    """Calls a perceptual network on both halves; see the module."""

    def __init__(self, network: PerceptualNetwork) -> None:
        self.network = network
        self.compile_options: dict[str, Any] | None = None  # None: the graphs run as they are
        self._programs: dict[tuple[Any, ...], tuple[Program | str, nn.Module]] = {}  # or why there is none
        self._structures: dict[Block, bytes | int] = {}

    def compile(self, options: dict[str, Any]) -> None:
        """Hand both graphs to ``torch.compile``, with its keywords; those built already are built again."""
        self.compile_options = options
        self._programs.clear()

    def __call__(self, sample: Tensor, conditioning: dict[str, Any]) -> tuple[Tensor, ...]:
        """Features of all 2B samples, differentiable with respect to the first B.

        Args:
            sample: [x^_t' ; x_t'], (2B, C, H, W), in the network's dtype.
            conditioning: the network's other keywords, of B samples: both halves get them.

        Raises:
            Misaligned: the network cannot be called this way.
        """
        if (reason := self.network.family.trace_fault()) is not None:
            raise Misaligned(reason)
        given = {name: value for name, value in conditioning.items() if value is not None}
        inputs = {"sample": sample, **tree_map(lambda value: torch.cat([value, value]), given)}
        if self.network.blocks:
            with called_by(self._call_block, self.network.blocks):
                return self.network.forward(**inputs)
        program, _ = self._program(_Eager(self.network), inputs, frozenset([0]))
        return _Function.apply(program, list(held(self.network).values()), *_tensors(inputs))

    def _call_block(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block of the network answers, as its forward does, to tensors of 2B samples."""
        if block not in self._structures:
            self._structures[block] = structure(block.block, block.name)
        last = block is self.network.blocks[-1]
        inputs = {"args": args, "kwargs": kwargs}
        tensors = _tensors(inputs)
        differentiable = frozenset(place for place, tensor in enumerate(tensors) if tensor.requires_grad)
        function = BlockFunction(block.block, self.network.family if last else None)
        program, traced = self._program(function, inputs, differentiable, (self._structures[block], last))
        return traced.answer(_Function.apply(program, list(held(block.block).values()), *tensors))

    def _program(
        self, function: nn.Module, inputs: dict[str, Any], differentiable: frozenset[int], structure: Any = None
    ) -> tuple[Program, Any]:
        """The program of ``function``, or of an earlier one of the same structure, and the function that it is of."""
        leaves, arguments = tree_flatten(inputs)
        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)
        autocast = _autocast_dtype(_tensors(inputs)[0].device.type)
        key = (structure, arguments, layouts, differentiable, autocast)
        if key not in self._programs:
            try:
                self._programs[key] = build(function, inputs, self.compile_options, differentiable), function
            except Misaligned as reason:  # the next batch of this shape need not find out again
                self._programs[key] = str(reason), function
        program, traced = self._programs[key]
        if isinstance(program, str):
            raise Misaligned(program)
        return program, traced


class _Function(torch.autograd.Function):
    """The 2B forward and the B backward as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, program: Program, parameters: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(inputs[0].device.type):
            outputs = program.forward(*parameters, *inputs)
        features, saved = outputs[: program.num_features], outputs[program.num_features :]
        ctx.program = program
        ctx.save_for_backward(*saved)
        return tuple(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        program: Program = ctx.program
        tangents = [
            _dense_copy(gradient[: kept.rows], kept.shape, kept.strides)
            for kept, gradient in zip(program.tangents, gradients, strict=True)
        ]
        with without_autocast(gradients[0].device.type):
            results = program.backward(*ctx.saved_tensors, *tangents)
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, index in program.gradients.items():
            predicted = results[index]
            gradient = predicted.new_zeros(2 * len(predicted), *predicted.shape[1:])  # the real half gets none
            gradient[: len(predicted)] = predicted
            found[2 + place] = gradient
        return tuple(found)


def build(
    network: nn.Module,
    inputs: dict[str, Any],
    options: dict[str, Any] | None,
    differentiable: frozenset[int] = frozenset([0]),
) -> Program:
    """Trace a network, or a block, at the batch of ``inputs`` (2B) and at half of it, and fit the two together.

    Args:
        network: answers with a tuple of tensors.
        inputs: its keywords. Tensors with 2B rows are those of the samples.
        options: of ``torch.compile``; None: the graphs run as they are.
        differentiable: the places among the tensors of ``inputs`` of those that get a gradient.

    Raises:
        Misaligned: an odd batch, quantized weights, or traces that save different tensors.
    """
    whole = len(_tensors(inputs)[min(differentiable)])
    if whole % 2:
        raise Misaligned(f"a batch of {whole} has no halves")
    if quantized := {type(value).__name__ for value in held(network).values() if is_traceable_wrapper_subclass(value)}:
        raise Misaligned(f"its weights are {', '.join(sorted(quantized))}s, of which the graphs would take the parts")
    partition = default_partition if options is None else min_cut_rematerialization_partition
    try:
        both, half = (trace(network, inputs, size, partition, differentiable) for size in (whole, whole // 2))
    except Exception as error:  # of the network's own code, which need not be traceable
        raise Misaligned(f"it cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    count = len(both.features)
    if list(both.saved) != list(half.saved) or count != len(half.features):
        raise Misaligned(f"the forward saves {len(both.saved)} tensors at {whole}, {len(half.saved)} at {whole // 2}")
    kept = [_fit(both.saved[name], half.saved[name]) for name in half.saved]
    tangents = tuple(_fit(*pair) for pair in zip(both.features, half.features, strict=True))
    _keep_prefixes(both.forward, count, kept)
    forward: Run = both.forward
    backward: Run = half.backward
    if options is not None:
        forward, backward = (torch.compile(graph, dynamic=False, **options) for graph in (forward, backward))
    return Program(forward, backward, count, tangents, half.gradients)


@dataclass(frozen=True)
class Trace:
    """A network's forward and backward graphs at one batch size, and what they exchange (fake tensors)."""

    forward: GraphModule
    backward: GraphModule
    features: list[Tensor]  # with the strides in which the backward wants their gradients
    saved: dict[str, Tensor]  # by the names of the graph's nodes
    gradients: dict[int, int]  # see Program


def trace(
    network: nn.Module,
    inputs: dict[str, Any],
    size: int,
    partition: Any = default_partition,
    differentiable: frozenset[int] = frozenset([0]),
) -> Trace:
    """AOTAutograd's graphs of ``network`` at batch ``size``; nothing is computed, no memory is taken."""
    graphs: dict[str, GraphModule] = {}

    def keep(name: str, graph: GraphModule, _inputs: Any) -> Any:
        graphs[name] = graph
        return make_boxed_func(graph.forward)

    names, parameters = zip(*held(network).items(), strict=True)
    leaves, structure = tree_flatten(inputs)
    whole = len(_tensors(inputs)[min(differentiable)])

    def function(parameters: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        arguments = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
        return functional_call(network, dict(zip(names, parameters, strict=True)), (), arguments)

    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that the network holds and does not call buffers
    fake_parameters = [mode.from_tensor(p.detach()) for p in parameters]
    given = [mode.from_tensor(tensor.detach()) for tensor in _tensors(inputs)]
    fakes = [torch.empty_like(fake[:size] if fake.shape[:1] == (whole,) else fake) for fake in given]
    with mode, torch.enable_grad():
        asked = [fakes[place].requires_grad_() for place in sorted(differentiable)]
        traced = aot_function(function, partial(keep, "forward"), partial(keep, "backward"), partition_fn=partition)
        features = traced(fake_parameters, fakes)
        torch.autograd.grad([feature.sum() for feature in features], asked)
    _fill_constants(graphs)
    count = len(features)
    _read_only_what_counts(graphs["backward"])
    _save_only_what_is_used(graphs["forward"], graphs["backward"], count)
    features = [_value(node) for node in _placeholders(graphs["backward"])[-count:]]
    saved = {str(node): _value(node) for node in _results(graphs["forward"])[count:]}
    found = [index for index, node in enumerate(_results(graphs["backward"])) if node is not None]
    gradients = dict(zip(sorted(differentiable), found, strict=True))
    return Trace(graphs["forward"], graphs["backward"], features, saved, gradients)


def _read_only_what_counts(backward: GraphModule) -> None:
    """Give the backward's operators empty tensors of their own where they look at a shape alone."""
    for node in list(backward.graph.nodes):
        for index in _unread(node):
            value = _value(node.args[index])
            layout = list(value.shape), list(value.stride())
            kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            with backward.graph.inserting_before(node):
                empty = backward.graph.call_function(torch.ops.aten.empty_strided.default, layout, kind)
            empty.meta["val"] = value
            node.update_arg(index, empty)


def _unread(node: Node) -> list[int]:
    """Which arguments of a node have no say in its result.

    - A convolution's input, where the gradient of its weight is not asked for.
    - The seeds of attention's dropout, where there is none. PyTorch's memory-efficient kernel gives them on the CPU,
      but on the GPU while a CUDA graph is recorded: kept, they would have the backward compiled anew in its midst.
    """
    if node.target is torch.ops.aten.convolution_backward.default:
        return [] if node.args[-1][1] else [1]  # type: ignore[index]
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "philox_seed" not in names or node.args[names.index("dropout_p")] != 0.0:
        return []
    return [names.index("philox_seed"), names.index("philox_offset")]


def _save_only_what_is_used(forward: GraphModule, backward: GraphModule, num_features: int) -> None:
    """Leave out of both graphs what the backward does not use, and what was computed for that alone."""
    _eliminate_dead_code(backward)
    results = _results(forward)
    features, saved = results[:num_features], results[num_features:]
    placeholders = _placeholders(backward)[: len(saved)]
    used = [value for value, node in zip(saved, placeholders, strict=True) if node.users]
    forward.graph.output_node().args = ((*features, *used),)
    for node in placeholders:
        if not node.users:
            backward.graph.erase_node(node)
    _eliminate_dead_code(forward)
    for graph in (forward, backward):
        graph.graph.lint()
        graph.recompile()


def _eliminate_dead_code(graph: GraphModule) -> None:
    """Fused attention too, which passes for random: AOTAutograd leaves its forward, unused, in the backward."""
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _keep_prefixes(forward: GraphModule, num_features: int, kept: Sequence[Kept]) -> None:
    """Let the 2B forward answer with copies of the prefixes, each made where its tensor is: that one's memory is free
    once its other readers are done."""
    graph = forward.graph
    results = _results(forward)
    for index, keep in enumerate(kept, start=num_features):
        node = results[index]
        if keep.rows is None:
            continue
        last_input = _placeholders(forward)[-1]
        with graph.inserting_after(last_input if node.op == "placeholder" else node):
            prefix = graph.call_function(torch.ops.aten.slice.Tensor, (node, 0, 0, keep.rows))
        with graph.inserting_after(prefix):
            results[index] = graph.call_function(_dense_copy, (prefix, keep.shape, keep.strides))
    graph.output_node().args = (tuple(results),)
    graph.lint()
    forward.recompile()


def _dense_copy(value: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """``value`` copied into the layout that the trace saw; an expanded tensor (stride 0) takes no memory to keep."""
    if 0 in strides:
        return value
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def _fit(both: Tensor, half: Tensor) -> Kept:
    """How a tensor of the B trace comes out of its partner at 2B."""
    shape, strides = tuple(half.shape), tuple(half.stride())
    if both.dtype != half.dtype:
        raise Misaligned(f"{tuple(both.shape)} is {both.dtype} at 2B and {half.dtype} at B")
    if both.shape == half.shape:
        return Kept(None, shape, strides)
    if both.shape[1:] != half.shape[1:] or both.shape[0] != 2 * half.shape[0]:
        raise Misaligned(f"{tuple(both.shape)} at 2B does not begin with {shape} at B")
    return Kept(shape[0], shape, strides)


class _Eager(nn.Module):
    """The network past what ``network.compile()`` puts in the way of a call."""

    def __init__(self, network: PerceptualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, **arguments: Any) -> tuple[Tensor, ...]:
        return self.network.forward(**arguments)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this kind of device; None where it is off."""
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if available else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """The graphs hold its casts already. The meta device knows no autocast."""
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _results(graph: GraphModule) -> list[Any]:
    return list(graph.graph.output_node().args[0])  # type: ignore[arg-type]


def _placeholders(graph: GraphModule) -> list[Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def _value(node: Any) -> Tensor:
    value = node.meta.get("val") if isinstance(node, Node) else node
    if not isinstance(value, Tensor):
        raise Misaligned(f"the forward saves {node}, which is no tensor")
    return value


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _fill_constants(graphs: dict[str, GraphModule]) -> None:
    """A tensor made while tracing is a fake one: it cannot be part of a graph that runs, but its value may be known."""
    for graph in graphs.values():
        for name, value in [*graph.named_buffers(), *vars(graph).items()]:
            if isinstance(value, FakeTensor) and value.constant is not None:
                setattr(graph, name, value.constant.to(value.device))
            elif isinstance(value, FakeTensor):
                raise Misaligned(f"the network makes a constant tensor ({name}) on the way")

"""The batched teacher: same numbers as two calls, at the FLOPs and the memory of two calls."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import default_partition, min_cut_rematerialization_partition
from tiny import batch, scheduler, tiny_unet
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastsp.loss import SelfPerceptualLoss
from fastsp.models.attention import TORCH_BACKENDS, use_attention
from fastsp.perceptual import PerceptualNetwork, half_backward

LAYERS = ("mid", "encoder", "decoder", "encoder+mid")


def value_and_gradient(criterion, data, pred):
    pred = pred.clone().requires_grad_()
    loss = criterion(pred, **data)
    (gradient,) = torch.autograd.grad(loss, pred)
    return loss, gradient


def pair(layers="mid", kind="sd", **options):
    unet, sched = tiny_unet(kind), scheduler()
    return [SelfPerceptualLoss(unet, sched, layers=layers, teacher=mode, **options) for mode in ("batched", "split")]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("layers", LAYERS)
def test_equals_two_calls(kind, layers):
    batched, split = pair(layers, kind)
    for size, seed in ((3, 0), (2, 1), (3, 2)):
        data = batch(kind, size, seed)
        pred = torch.randn_like(data["latents"])
        (ours, our_gradient), (theirs, their_gradient) = (value_and_gradient(c, data, pred) for c in (batched, split))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    assert batched.teacher == "batched" and len(batched.metric._half_backward._programs) == 2


def test_channels_last_and_bfloat16():
    unet = tiny_unet().to(memory_format=torch.channels_last)
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    losses = [
        value_and_gradient(SelfPerceptualLoss(unet, scheduler(), teacher=mode, dtype=dtype), data, pred)
        for dtype in (torch.float32, torch.bfloat16)
        for mode in ("batched", "split")
    ]
    for (ours, our_gradient), (theirs, their_gradient), tolerance in ((*losses[:2], 1e-5), (*losses[2:], 2e-2)):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
        assert (our_gradient - their_gradient).norm() < tolerance * their_gradient.norm()


ATTENTION = [
    ("cpu", "math"),
    *[pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("sdpa", *TORCH_BACKENDS)],
]


@pytest.mark.parametrize(("device", "attention"), ATTENTION)
def test_with_every_attention_kernel(device, attention):
    """Each saves other tensors for its backward."""
    unet = use_attention(tiny_unet(), attention).to(device, memory_format=torch.channels_last)
    criteria = [
        SelfPerceptualLoss(unet, scheduler(), teacher=mode, dtype=torch.bfloat16) for mode in ("batched", "split")
    ]
    data = {name: value.to(device) for name, value in batch().items() if value is not None}
    pred = torch.randn(3, 4, 8, 8, device=device)
    (ours, our_gradient), (theirs, their_gradient) = (value_and_gradient(c, data, pred) for c in criteria)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)
    assert (our_gradient - their_gradient).norm() < 2e-2 * their_gradient.norm()
    assert criteria[0].teacher == "batched", "it did not go on as split"


def test_under_autocast():
    batched, split = pair()
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    exact, _ = value_and_gradient(split, data, pred)
    with torch.autocast("cpu", torch.bfloat16):
        (ours, our_gradient), (theirs, their_gradient) = (value_and_gradient(c, data, pred) for c in (batched, split))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    assert (our_gradient - their_gradient).norm() < 2e-2 * their_gradient.norm()
    assert ours != exact, "autocast took part"


@pytest.mark.parametrize("layers", ["mid", "encoder"])
def test_backward_costs_the_predicted_half_alone(layers):
    data, flops = batch(size=2), {}
    batched, split = pair(layers)
    naive = split.perceptual_network
    both = {name: torch.cat([data[name]] * 2) for name in ("timesteps", "encoder_hidden_states")}
    for name, criterion in (("batched", batched), ("split", split)):
        value_and_gradient(criterion, data, torch.randn(2, 4, 8, 8))  # traces
        with FlopCounterMode(display=False) as counter:
            criterion(torch.randn(2, 4, 8, 8, requires_grad=True), **data).backward()
        flops[name] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        sample = torch.randn(4, 4, 8, 8, requires_grad=True)
        sum(feature.sum() for feature in naive(sample, **both)).backward()
    assert flops["batched"] == flops["split"]
    assert flops["split"] < 0.8 * counter.get_total_flops(), "the comparison can tell one half from two"


def test_only_the_predicted_half_outlives_the_forward():
    data, kept = batch(size=4), {}
    for criterion in pair():
        frozen = {p.data_ptr() for p in criterion.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor, frozen=frozen, storages=storages):
            if not isinstance(tensor, FakeTensor) and tensor.data_ptr() not in frozen:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        pred = torch.randn(4, 4, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = criterion(pred, **data)
        kept[criterion.teacher] = sum(storages.values())
        loss.backward()
    assert kept["batched"] < 1.1 * kept["split"]


CUDA_ATTENTION = {
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0],
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0],
}


class CudaAttention(TorchFunctionMode):
    """A GPU's kernels in place of PyTorch's choice; on the meta device, which knows their outputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kernel = CUDA_ATTENTION[name]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self.kernel(*args[:3])
        return func(*args, **(kwargs or {}))


def meta_inputs(batch_size=4):
    sample = torch.empty(batch_size, 4, 8, 8, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    states = torch.empty(batch_size, 5, 16, device="meta", dtype=torch.bfloat16)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device="meta")
    return {"sample": sample, "timesteps": timesteps, "encoder_hidden_states": states}


@pytest.mark.parametrize("options", [None, {}], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CUDA_ATTENTION)
def test_with_a_gpu_s_attention_the_traces_line_up_and_save_no_seed(name, options, monkeypatch):
    """A seed lies on the CPU, and on the GPU while a CUDA graph is recorded."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    network = PerceptualNetwork(tiny_unet().bfloat16().to("meta"))
    partition = default_partition if options is None else min_cut_rematerialization_partition
    with CudaAttention(name):
        half_backward.build(network, meta_inputs(), options)  # Misaligned, if they do not
        traced = half_backward.trace(network, meta_inputs(), 2, partition)
        monkeypatch.setattr(half_backward, "_unread", lambda node: [])
        before = half_backward.trace(network, meta_inputs(), 2, partition)
    assert [value for value in traced.saved.values() if not value.is_floating_point()] == []
    seeds = [value for value in before.saved.values() if not value.is_floating_point()]
    assert seeds and len(traced.saved) < len(before.saved) - len(seeds), (
        "nor what only convolutions' weights would need"
    )


@pytest.fixture
def nan_where_nothing_was_written():
    """Memory that is taken and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_what_is_not_saved_has_no_say(nan_where_nothing_was_written):
    (_, ours), (_, theirs) = (value_and_gradient(c, batch(), torch.randn(3, 4, 8, 8).fill_(0.5)) for c in pair())
    assert ours.isfinite().all() and (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_what_does_not_fit_goes_on_as_split(monkeypatch, caplog):
    batched, split = pair()

    def refuse(*_):
        raise half_backward.Misaligned("planted")

    monkeypatch.setattr(half_backward, "build", refuse)
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    with caplog.at_level(logging.WARNING, "fastsp"):
        ours = [value_and_gradient(batched, data, pred)[1] for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "teacher='batched' is not possible here, 'split' is used: planted"
    ]
    assert torch.equal(ours[0], value_and_gradient(split, data, pred)[1])


def test_traces_that_do_not_line_up_are_refused():
    with pytest.raises(half_backward.Misaligned, match="does not begin with"):
        half_backward._fit(torch.empty(6, 4), torch.empty(2, 4))
    with pytest.raises(half_backward.Misaligned, match="does not begin with"):
        half_backward._fit(torch.empty(4, 6), torch.empty(2, 3))
    with pytest.raises(half_backward.Misaligned, match="at 2B and"):
        half_backward._fit(torch.empty(4, 6), torch.empty(2, 6, dtype=torch.int64))
    assert half_backward._fit(torch.empty(4, 6), torch.empty(2, 6)).rows == 2
    assert half_backward._fit(torch.empty(4, 6), torch.empty(4, 6)).rows is None


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_compiling_after_a_first_call_compiles(mode, monkeypatch):
    """Also what is called without a gradient, whichever the mode."""
    compiled = []

    def compile_(function, **options):
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("torch.nn.Module.compile", lambda module, **options: compiled.append((module, options)))
    criterion = pair()[mode == "split"]
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    before = value_and_gradient(criterion, data, pred)
    assert not compiled
    criterion.compile_teacher(mode="default")
    after = value_and_gradient(criterion, data, pred)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(compiled) == (3 if mode == "batched" else 1), "the network, and of `batched` both graphs anew"
    assert all(options.get("mode") == "default" for _, options in compiled)
    value_and_gradient(criterion, data, pred)
    assert len(compiled) == (3 if mode == "batched" else 1), "once"


@pytest.mark.slow
def test_compiled_teacher_gives_the_same_numbers():
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    for criterion in pair():
        expected, expected_gradient = value_and_gradient(criterion, data, pred)
        compiled = pair()[0 if criterion.teacher == "batched" else 1]
        compiled.compile_teacher()
        loss, gradient = value_and_gradient(compiled, data, pred)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.slow
def test_the_whole_loss_compiles_without_a_graph_break():
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    _, split = pair()
    expected, expected_gradient = value_and_gradient(split, data, pred)
    loss, gradient = value_and_gradient(torch.compile(split, fullgraph=True), data, pred)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_more_shapes_than_are_compiled_are_refused():
    """torch would go on uncompiled, with only a warning."""
    criterion = pair()[1]
    criterion.compile_teacher(backend="eager", dynamic=False)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        for size in (1, 2, 3, 4):
            value_and_gradient(criterion, batch(size=size), torch.randn(size, 4, 8, 8))

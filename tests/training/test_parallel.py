"""DDP around the step, in a group of one process: the numbers of the step without it, captured or not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from training.test_capture import assert_same, make, run

from fastsp.errors import RunFailed
from fastsp.training.capture import CapturedStep
from fastsp.training.compilation import compiler_settings
from fastsp.training.parallel import ReplicatedGradients
from fastsp.training.step import TrainingStep

STEPS = ReplicatedGradients.warm_up_steps + 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.use_deterministic_algorithms(request.param == "cuda", warn_only=True)  # cuDNN's backward is not else
    yield request.param
    torch.use_deterministic_algorithms(False)
    dist.destroy_process_group()


def replicated(step: TrainingStep) -> TrainingStep:
    step.gradients = ReplicatedGradients(step.network, step.optimizer)
    step.network = step.gradients.network
    return step


@pytest.mark.parametrize(("microbatch", "precision"), [(None, "fp32"), (1, "bf16")])
def test_replicated_steps_captured_or_not(device, microbatch, precision):
    """Bit for bit, since one process has nothing to add; four microbatches in bfloat16 are summed in float32."""
    expected, ours, theirs = (make(device, "mse", microbatch=microbatch, precision=precision) for _ in range(3))
    take_step = CapturedStep(replicated(theirs), record=list if device == "cpu" else None)
    rows = run(expected, expected, STEPS)
    assert run(replicated(ours), ours, STEPS) == rows
    assert take_step.recording is None
    assert run(theirs, take_step, STEPS) == rows
    assert take_step.recording is not None
    for step in (ours, theirs):
        assert_same(step, expected)


def test_gradients_of_bfloat16_weights_are_float32(device):
    step = replicated(make(device, "mse", microbatch=1, precision="bf16"))
    taken = []
    update = step.optimizer.update
    step.optimizer.update = lambda: taken.extend(step.optimizer.gradients) or update()
    run(step, step, 1)
    masters = zip(taken, step.optimizer.masters, strict=True)
    assert all(g.dtype == torch.float32 and g.stride() == master.stride() for g, master in masters)
    assert any(not torch.equal(g, g.bfloat16().float()) for g in taken), "sums that bfloat16 could not hold"


def test_a_finished_stage_is_freed(device):
    """DDP's C++ must not hold what holds DDP: the next stage needs the memory of weights, moments and graph."""
    step = replicated(make(device, "mse"))
    run(step, step, 2)
    held = weakref.ref(step.optimizer), weakref.ref(step.optimizer.masters[0])
    del step
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_compiled_network_stays_one_graph(device, monkeypatch):
    """DDP's buckets are made small here, as 25 MB are for a real network."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)

    def graphs() -> int:
        torch._dynamo.reset()
        compiled = []
        step = make(device, "mse")
        step.network.compile(backend=lambda graph, _: compiled.append(graph) or graph)
        replicated(step).network.bucket_bytes_cap = 1000
        run(step, step, 1)
        return len(compiled)

    assert graphs() > 1, "as torch does it by default"
    with compiler_settings():
        assert graphs() == 1


def test_steps_that_would_run_uncompiled_are_refused():
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with pytest.raises(RunFailed, match="the rest would run uncompiled; set compile: false"), compiler_settings():
        for size in range(2, 100):
            function(torch.zeros(size))
    with compiler_settings():
        assert len(function(torch.zeros(2))) == 2


def test_every_shape_of_the_data_may_have_as_many_versions():
    """PyTorch's own limit over all objects of one code, 256, is raised with it."""
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with compiler_settings(shapes=7):
        for size in range(2, 300):
            function(torch.zeros(size))
    torch._dynamo.reset()

"""The drop-in loss in other people's loops: autocast, accelerate, compiled, checkpointed and distributed UNets."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import batch, scheduler, tiny_unet
from torch import Tensor, nn
from two_processes import BATCH_SIZE, PROCESSES, gradients, one_step, run, share

from fastsp.loss import SelfPerceptualLoss

TEACHERS = ("batched", "split")


@cache
def expected(teacher: str = "batched", batch_size: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the plain loop."""
    unet = tiny_unet(seed=1)
    loss = one_step(unet, SelfPerceptualLoss(unet, scheduler(), teacher=teacher), batch(size=batch_size))
    return loss, gradients(unet)


def assert_same(unet: nn.Module, loss: Tensor, teacher: str = "batched", rtol: float = 1e-4) -> None:
    plain_loss, plain = expected(teacher)
    torch.testing.assert_close(loss, plain_loss, rtol=rtol, atol=0)
    found = gradients(unet)
    norm = torch.stack([grad.norm() for grad in plain.values()]).norm()
    for name, grad in plain.items():
        assert (found[name.removeprefix("_orig_mod.")] - grad).norm() < rtol * norm, name


@pytest.mark.parametrize("teacher", TEACHERS)
def test_autocast(teacher):
    """Everything within autocast to bfloat16, as many loops have it: the loss stays float32."""
    unet = tiny_unet(seed=1)
    criterion = SelfPerceptualLoss(unet, scheduler(), teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one_step(unet, criterion, batch())
    assert loss.dtype == torch.float32
    assert criterion.teacher == teacher
    assert_same(unet, loss, teacher, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_gpu(dtype, teacher):
    """The criterion follows the prediction to its device."""
    unet = tiny_unet(seed=1)
    criterion = SelfPerceptualLoss(unet, scheduler(), teacher=teacher)
    data = {name: value if value is None else value.cuda() for name, value in batch().items()}
    with torch.autocast("cuda", dtype):
        loss = one_step(unet.cuda(), criterion, data)
    torch.testing.assert_close(loss.cpu(), expected(teacher)[0], rtol=0.05, atol=0)
    assert all(torch.isfinite(grad).all() for grad in gradients(unet).values())


@pytest.mark.parametrize(("mixed_precision", "when"), [("no", "before"), ("bf16", "after")])
def test_accelerate(mixed_precision, when):
    """Built before `prepare`, or after: accelerate's wrapper of the UNet's forward is not part of the metric."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    unet = tiny_unet(seed=1)
    criterion = SelfPerceptualLoss(unet, scheduler())
    prepared = accelerator.prepare(unet)
    if when == "after":
        criterion = SelfPerceptualLoss(prepared, scheduler())
    loss = one_step(prepared, criterion, batch())
    assert_same(unet, loss, rtol=1e-4 if mixed_precision == "no" else 0.05)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_checkpointed_unet(teacher):
    unet = tiny_unet(seed=1)
    unet.enable_gradient_checkpointing()
    unet.train()
    criterion = SelfPerceptualLoss(unet, scheduler(), teacher=teacher)
    assert_same(unet, one_step(unet, criterion, batch()), teacher)


@pytest.mark.slow
def test_compiled_unet():
    """The caller's UNet is compiled, the loss is not; built from the compiled one, it holds the plain one."""
    unet = tiny_unet(seed=1)
    compiled = torch.compile(unet, backend="aot_eager")
    assert_same(unet, one_step(compiled, SelfPerceptualLoss(compiled, scheduler()), batch()))


def test_compiled_together_with_the_loss():
    """A compiled function that holds the loss too: the teacher is called in two calls then."""
    unet, data = tiny_unet(seed=1), batch()
    criterion = SelfPerceptualLoss(unet, scheduler())
    compiled = torch.compile(lambda pred: criterion(pred, **data), backend="aot_eager")
    assert_same(unet, one_step(unet, lambda pred, **_: compiled(pred), data))


def test_a_module_that_holds_the_loss_brings_the_metric_back_from_its_checkpoint():
    """As in Lightning: on resume the criterion is built from whatever UNet is there, then the state is loaded."""

    def module(seed: int) -> nn.ModuleDict:
        unet = tiny_unet(seed=seed)
        return nn.ModuleDict({"unet": unet, "criterion": SelfPerceptualLoss(unet, scheduler())})

    saved, resumed, data = module(1), module(2), batch()
    pred = torch.randn(3, 4, 8, 8, requires_grad=True)
    expected = saved["criterion"](pred, **data)
    assert not torch.equal(resumed["criterion"](pred, **data), expected)  # traced with the wrong weights, too
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(resumed["criterion"](pred, **data), expected)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(run, (folder,), nprocs=PROCESSES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(two_processes, kind):
    """The one process takes the two shares in turn, so that only the sum over processes is compared: in float32 a
    sample's gradient depends on the size of its batch in the last bits."""
    unet = tiny_unet(seed=1)
    criterion = SelfPerceptualLoss(unet, scheduler())
    for rank in range(PROCESSES):
        one_step(unet, criterion, share(batch(size=BATCH_SIZE), rank, PROCESSES))
    plain = {name: grad / PROCESSES for name, grad in gradients(unet).items()}
    found = load_file(two_processes / f"{kind}.safetensors")
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * float(grad.norm()))


def test_the_gradient_of_a_batch_is_the_mean_over_its_parts():
    unet = tiny_unet(seed=1)
    criterion = SelfPerceptualLoss(unet, scheduler())
    losses = [one_step(unet, criterion, share(batch(size=BATCH_SIZE), part, PROCESSES)) for part in range(PROCESSES)]
    for parameter in unet.parameters():
        parameter.grad /= PROCESSES
    loss, plain = expected(batch_size=BATCH_SIZE)
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-5, atol=0)
    for name, grad in gradients(unet).items():
        assert (grad - plain[name]).norm() < 1e-5 * plain[name].norm(), name

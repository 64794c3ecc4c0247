"""The update of a whole UNet: against torch's AdamW, with float32 masters, and what it skips."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_unet

from fastsp.config import EMAConfig, OptimizerConfig
from fastsp.training.optimizer import AdamWEMA, learning_rate


def test_learning_rate():
    config = OptimizerConfig(warmup_steps=4)
    assert [learning_rate(config, 1.0, step, 10) for step in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(), 0.3, 1, 10) == 0.3
    linear, cosine = (OptimizerConfig(warmup_steps=2, schedule=name) for name in ("linear", "cosine"))
    assert [learning_rate(linear, 1.0, step, 10) for step in (2, 6, 10)] == [1.0, 0.5, 0.0]
    assert [learning_rate(cosine, 1.0, step, 10) for step in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])


def gradients(model, seed: int):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 0.01


def make(dtype: torch.dtype):
    ema_unet = copy.deepcopy(tiny_unet()).requires_grad_(False)
    unet = torch.nn.Module.to(tiny_unet(), dtype)
    config = OptimizerConfig(weight_decay=0.01, grad_clip=0.5)
    optimizer = AdamWEMA(unet, ema_unet, config, EMAConfig(decay=0.9))
    optimizer.learning_rate.fill_(1e-3)
    return unet, ema_unet, optimizer


def test_agrees_with_torch_over_microbatches():
    unet, ema_unet, optimizer = make(torch.float32)
    theirs = tiny_unet()
    average = [p.detach().clone() for p in theirs.parameters()]
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(3):
        for part in range(2):
            gradients(unet, 10 * step + part)
            optimizer.accumulate()
        norm = optimizer.update()
        parts = []
        for part in range(2):
            gradients(theirs, 10 * step + part)
            parts.append([p.grad for p in theirs.parameters()])
        for p, one, two in zip(theirs.parameters(), *parts, strict=True):
            p.grad = one + two
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        adamw.step()
        average = [a.lerp(p.detach(), 0.1) for a, p in zip(average, theirs.parameters(), strict=True)]
    for ours, expected in zip(unet.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(ema_unet.parameters(), average, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_follow_float32_masters():
    unet, _, optimizer = make(torch.bfloat16)
    optimizer.learning_rate.fill_(1e-5)  # far below a bfloat16 step of most weights
    before = [master.clone() for master in optimizer.masters]
    for step in range(3):
        gradients(unet, step)
        optimizer.accumulate()
        optimizer.update()
    for p, master, old in zip(unet.parameters(), optimizer.masters, before, strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16()) and not torch.equal(master, old)


def test_microbatches_add_up_in_float32():
    unet, _, optimizer = make(torch.bfloat16)
    exact = [torch.zeros_like(p, dtype=torch.float32) for p in unet.parameters()]
    for part in range(3):
        gradients(unet, part)
        torch._foreach_add_(exact, [p.grad for p in unet.parameters()])
        optimizer.accumulate()
        assert all(p.grad is None for p in unet.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(optimizer.gradients, exact, strict=True))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    unet, _, optimizer = make(torch.float32)
    before = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    counters = []
    for seed, broken in enumerate((float("nan"), float("inf"), None, float("nan"))):
        gradients(unet, seed)
        if broken:
            next(unet.parameters()).grad[0] = broken
        optimizer.accumulate()
        assert torch.isfinite(optimizer.update()) == (broken is None)
        counters.append((int(optimizer.skipped), int(optimizer.skipped_in_a_row), int(optimizer.step_count)))
        if seed < 2:
            changed = [name for name, tensor in optimizer.state.items() if not torch.equal(tensor, before[name])]
            assert changed == ["skipped", "skipped_in_a_row"]
    assert counters == [(1, 1, 0), (2, 2, 0), (2, 0, 1), (3, 1, 1)]

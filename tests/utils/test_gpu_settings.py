"""Settings of PyTorch for the time of a command."""

from __future__ import annotations

import os

import pytest
import torch

from fastsp.utils.gpu_settings import gpu_settings


def state() -> tuple:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def test_they_hold_for_a_while():
    before = state()
    with pytest.raises(ValueError, match="planted"), gpu_settings():
        assert state() == ("high", True, False)
        raise ValueError("planted")
    assert state() == before == ("highest", False, False)
    with gpu_settings(tf32=False):
        assert state() == ("highest", True, False)


def test_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with gpu_settings(deterministic=True):
        assert state() == ("high", False, True) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.is_deterministic_algorithms_warn_only_enabled(), "what has no other way is warned of"
    assert state() == before

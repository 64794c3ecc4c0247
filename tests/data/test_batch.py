"""The batch that every source delivers."""

import pytest
import torch

from fastsp.data.batch import Batch


@pytest.fixture
def pinned(monkeypatch):
    """Tensors that were page-locked; without a GPU that would fail."""
    tensors = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: tensors.append(self) or self.clone())
    return tensors


def test_everything_in_the_memory_of_the_cpu_is_pinned(pinned):
    batch = Batch(
        torch.arange(3),
        torch.ones(3),
        ("a", "b", "c"),
        input_ids=torch.zeros(3, 7, dtype=torch.int64),
        pixel_values=torch.empty(3, 1, 2, 2, device="meta"),  # stands for a GPU
        original_sizes=torch.ones(3, 2, dtype=torch.int64),
    )
    result = batch.pinned()
    assert {id(tensor) for tensor in pinned} == {
        id(tensor) for tensor in (batch.positions, batch.weights, batch.input_ids, batch.original_sizes)
    }
    assert result.captions == batch.captions and result.pixel_values is batch.pixel_values
    assert torch.equal(result.positions, batch.positions) and result.positions is not batch.positions

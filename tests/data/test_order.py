"""The permutation of an epoch: a bijection, even, and the function that its docstring defines."""

import math

import pytest
import torch
from fastsp_kernels.philox import philox_4x32_10

from fastsp.data.order import BLOCK, SampleOrder, permute


def permutation(size, seed, epoch):
    return permute(torch.arange(size), size, seed, torch.full((size,), epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 97, 100, 101, 1347, 65_537])
@pytest.mark.parametrize("epoch", [0, 1, 70_000])
def test_bijection(size, epoch):
    permuted = permutation(size, seed=3, epoch=epoch)
    assert torch.equal(permuted.sort().values, torch.arange(size))


def test_definition():
    """The docstring, transcribed for single integers over the block function."""
    size, seed, epoch = 1000, (7 << 32) + 5, 2
    a = math.ceil(math.sqrt(size))
    b = math.ceil(size / a)

    def scaled(r, half, bound):
        position = (epoch << 32) + half
        counter = (torch.tensor(r // 4), 4, position & 0xFFFFFFFF, position >> 32)
        return int(philox_4x32_10(seed & 0xFFFFFFFF, seed >> 32, *counter)[r % 4]) * bound >> 32

    def image(index):
        left, right = divmod(index, b)
        for r in range(24):
            if r % 2 == 0:
                left = (left + scaled(r, right, a)) % a
            else:
                right = (right + scaled(r, left, b)) % b
        index = left * b + right
        return index if index < size else image(index)

    indices = torch.tensor([0, 1, 31, 500, 999])
    assert permute(indices, size, seed, torch.full((5,), epoch)).tolist() == [
        image(index) for index in indices.tolist()
    ]


def test_huge_source_in_constant_memory():
    size = 600_000_000
    indices = torch.cat([torch.arange(1000), torch.arange(size - 1000, size)])
    permuted = permute(indices, size, seed=0, epochs=torch.full((2000,), 3))
    assert permuted.unique().numel() == 2000
    assert permuted.min() >= 0 and permuted.max() < size
    assert abs(permuted.double().mean() / size - 0.5) < 0.03  # five standard errors


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_every_permutation_of_a_small_source_is_as_likely(size):
    """Chi squared over all permutations, over many epochs. With eight rounds this fails from size 5 on."""
    epochs = 100 * math.factorial(size)
    permuted = permute(
        torch.arange(size).repeat(epochs), size, seed=0, epochs=torch.arange(epochs).repeat_interleave(size)
    )
    keys = (permuted.view(epochs, size) * size ** torch.arange(size)).sum(1)
    counts = keys.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(size)
    chi_squared = float(((counts - 100) ** 2 / 100).sum())
    freedom = math.factorial(size) - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)


def test_each_sample_is_as_likely_at_each_place():
    size, epochs = 30, 3000
    permuted = permute(torch.arange(size).repeat(epochs), size, 1, torch.arange(epochs).repeat_interleave(size))
    places = permuted.view(epochs, size)
    counts = torch.stack([torch.bincount(places[:, index], minlength=size) for index in range(size)]).double()
    expected = epochs / size
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    size = 10_000
    permuted = permutation(size, seed=0, epoch=0)
    close = ((permuted[1:] - permuted[:-1]).abs() <= 10).double().mean()
    assert close < 3 * 20 / size


@pytest.mark.parametrize("size", [7, 1000, BLOCK, 3 * BLOCK + 1])
def test_positions_run_through_epoch_after_epoch(size):
    order = SampleOrder(size, seed=5)
    positions = torch.arange(2 * size)
    samples = torch.cat([order(part) for part in positions.split(64)])
    assert torch.equal(samples[:size], permutation(size, 5, 0))
    assert torch.equal(samples[size:], permutation(size, 5, 1))
    if size > 7:
        assert not torch.equal(samples[:size], samples[size:])


def test_order_does_not_depend_on_what_was_asked_before():
    positions = torch.tensor([2 * BLOCK + 3, 5, BLOCK - 1, BLOCK, 10**12])
    order = SampleOrder(999, seed=1)
    order(torch.arange(100))
    assert torch.equal(order(positions), torch.cat([SampleOrder(999, seed=1)(p[None]) for p in positions]))
    assert not torch.equal(order(positions), SampleOrder(999, seed=2)(positions))

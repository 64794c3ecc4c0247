"""Buckets: the shapes, which of them a picture gets, and the order of groups of one shape."""

import math

import pytest
import torch

from fastsp.data.buckets import (
    CYCLE,
    BucketOrder,
    Buckets,
    bucket_seed,
    choose_shapes,
    kept,
    ladder,
    nearest,
)
from fastsp.data.order import BLOCK, permute

N = 100_000


def photographs(count: int = N, seed: int = 0) -> torch.Tensor:
    """(N, 2) heights and widths with the ratios that photographs have, a third of them upright."""
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.tensor([1.0, 1.25, 4 / 3, 1.5, 16 / 9, 2.0, 2.5, 4.0])
    common = torch.tensor([0.15, 0.05, 0.3, 0.3, 0.15, 0.03, 0.01, 0.01])
    ratio = ratios[torch.multinomial(common, count, replacement=True, generator=generator)]
    short = torch.randint(300, 4000, (count,), generator=generator)
    long = (short * ratio * (1 + 0.02 * torch.randn(count, generator=generator)).clamp(min=1 / ratio)).round().long()
    upright = torch.rand(count, generator=generator) < 1 / 3
    return torch.stack([torch.where(upright, long, short), torch.where(upright, short, long)], dim=1)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (768, 64), (1024, 64), (256, 32), (600, 8), (16, 2)])
def test_the_shapes_have_about_one_area(resolution, multiple):
    shapes = ladder(resolution)
    assert shapes[0] == (resolution, resolution) and len(set(shapes)) == len(shapes) >= 7
    for height, width in shapes:
        assert height % multiple == 0 == width % multiple or height == width == resolution
        assert (width, height) in shapes and height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)
        assert height * width > resolution**2 - multiple * min(height, width), "one more would be too large"


def test_shapes_that_people_know():
    assert {(832, 1216), (1216, 832), (896, 1152), (768, 1344)} <= set(ladder(1024))
    assert ladder(512) == [
        (512, 512), (448, 576), (576, 448), (384, 640), (640, 384), (320, 768), (768, 320), (256, 1024), (1024, 256),
    ]  # fmt: skip
    assert ladder(1) == [(1, 1)] and ladder(17)[0] == (17, 17)


def test_a_picture_gets_the_nearest_ratio_in_log_and_keeps_most_there():
    sizes, shapes = photographs(2000), ladder(512)
    logs = [math.log(width / height) for height, width in shapes]
    for (height, width), number, row in zip(
        sizes.tolist(), nearest(sizes, shapes).tolist(), kept(sizes, shapes).tolist(), strict=True
    ):
        far = [abs(math.log(width / height) - log) for log in logs]
        assert far[number] == pytest.approx(min(far), abs=3e-6) and row[number] == max(row)
        assert [share / 2**20 for share in row] == pytest.approx([math.exp(-each) for each in far], abs=2e-6)
    assert nearest(torch.tensor([[0, 0]]), shapes).tolist() == [0], "a square where it is not known"


def test_more_shapes_keep_more_of_the_pictures():
    sizes = photographs()
    lost = {}
    for most in (1, 3, 5, 7, 99):
        shapes = choose_shapes(sizes, 512, most, group=4)
        assert len(shapes) == min(most, 9) and set(shapes) <= set(ladder(512))
        lost[most] = 1 - float(kept(sizes, shapes).amax(1).double().mean()) / 2**20
    assert 0.2 < lost[1] < 0.4 and lost[3] < 0.13 and lost[7] < 0.07, lost
    assert lost[1] > lost[3] > lost[5] > lost[7] >= lost[99]
    assert choose_shapes(sizes.flip(0), 512, 5, 4) == choose_shapes(sizes, 512, 5, 4), "in whatever order"


def test_no_more_shapes_than_the_pictures_need():
    upright = torch.tensor([[600, 400]] * 50 + [[800, 800]] * 3 + [[0, 0]])
    assert choose_shapes(upright, 512, 9, group=3) == [(640, 384), (512, 512)]
    assert choose_shapes(upright, 512, 9, group=4) == [(640, 384)], "three are no group"
    assert choose_shapes(upright[:2], 512, 9, group=64) == [(640, 384)]
    assert choose_shapes(upright[-1:], 512, 9, group=1) == [(512, 512)]


@pytest.fixture(scope="module")
def order() -> BucketOrder:
    sizes = photographs()
    shapes = choose_shapes(sizes, 512, 9, 8)
    assert len(shapes) == 9
    return BucketOrder(Buckets(shapes, nearest(sizes, shapes)), 8, seed=(5 << 32) + 1)


@pytest.fixture(scope="module")
def cycles(order) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two."""
    cycle = int(order.ends[-1]) * order.group
    return order(torch.arange(cycle)), order(torch.arange(cycle, 2 * cycle))


def test_every_group_has_one_shape_and_every_sample_comes_equally_often(order, cycles):
    samples, _ = cycles
    numbers = order.buckets.numbers[samples].view(-1, order.group)
    assert (numbers == numbers[:, :1]).all()
    assert torch.bincount(numbers[:, 0].long()).tolist() == order.per_cycle
    times = torch.bincount(samples, minlength=N)
    for number, (count, groups) in enumerate(zip(order.buckets.counts, order.per_cycle, strict=True)):
        ours = times[order.buckets.numbers == number]
        exact = groups * order.group / count
        assert math.floor(exact) <= ours.min() and ours.max() <= math.ceil(exact), "it is a stream of permutations"
        assert abs(exact - CYCLE) <= order.group / 2 / count, "the rounding of a group"
    assert abs(len(samples) / N - CYCLE) < 0.001


def test_a_later_cycle_goes_on_with_the_permutations_and_has_another_order(order, cycles):
    shapes = [order.buckets.numbers[part].view(-1, order.group)[:, 0] for part in cycles]
    assert not torch.equal(*shapes) and torch.equal(*(part.sort().values for part in shapes))
    times = torch.bincount(torch.cat(cycles), minlength=N)
    for number, (count, per_cycle) in enumerate(zip(order.buckets.counts, order.per_cycle, strict=True)):
        ours, exact = times[order.buckets.numbers == number], 2 * per_cycle * order.group / count
        assert math.floor(exact) <= ours.min() and ours.max() <= math.ceil(exact)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("resumed", [0, 7, 1234])
def test_the_same_at_any_number_of_processes_and_after_a_resume(order, world_size, resumed):
    batch_size, steps = 64, 5
    fresh = BucketOrder(order.buckets, order.group, order.seed)
    for step in range(resumed, resumed + steps):
        parts = [
            fresh(torch.arange(step * batch_size + first, step * batch_size + first + batch_size // world_size))
            for first in range(0, batch_size, batch_size // world_size)
        ]
        assert torch.equal(torch.cat(parts), order.at(torch.arange(step * batch_size, (step + 1) * batch_size)))


def test_the_order_is_what_its_docstring_says():
    """For single positions, in plain integers."""
    counts, group, seed = [5, 1, 40, 0, 13], 4, 7
    numbers = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)])
    numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    order = BucketOrder(Buckets([(8, 8)] * 5, numbers), group, seed)
    per_cycle = [10, 2, 80, 0, 26]
    total = sum(per_cycle)

    def single(index, size, key, epoch):
        return int(permute(torch.tensor([index]), size, key, torch.tensor([epoch])))

    for position in [*range(12), total * group - 1, total * group, 3 * total * group + 17, 2 * BLOCK - 1, 10**12 + 3]:
        cycle, r = divmod(position // group, total)
        u = single(r, total, seed, cycle)
        k = next(k for k in range(5) if sum(per_cycle[:k]) <= u < sum(per_cycle[: k + 1]))
        slot = (cycle * per_cycle[k] + u - sum(per_cycle[:k])) * group + position % group
        member = single(slot % counts[k], counts[k], bucket_seed(seed, k), slot // counts[k])
        expected = int((numbers == k).nonzero()[member])
        assert int(order(torch.tensor([position]))) == expected


def test_seeds_of_buckets_differ():
    seeds = {bucket_seed(seed, number) for seed in (0, 1, 1 << 40) for number in range(20)}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_source_smaller_than_a_group():
    order = BucketOrder(Buckets([(8, 8)], torch.zeros(3, dtype=torch.int64)), 8, seed=0)
    for start in (0, 24, 24_000):
        assert torch.bincount(order(torch.arange(start, start + 24))).tolist() == [8, 8, 8]

"""Aspect-ratio buckets: pictures of about the same ratio are cropped to one shape instead of to a square.

A picture's shape is a function of its size alone: of a few shapes of near-equal area the one with the nearest ratio, in
log, which is the one that keeps most of it. Samples are trained on in groups of one shape, and the order of these is a
pure function of seed and position: no leftovers, no padding, no state, and the same at any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from fastsp_kernels.philox import MASK, Stream, philox_4x32_10
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.inventory import Part
from fastsp.data.order import SampleOrder, permute
from fastsp.data.repeats import Places, shares_of
from fastsp.data.samples import SampleReader
from fastsp.errors import UserError

Shape = tuple[int, int]  # height and width, pixels
MULTIPLE = 64  # pixels of both sides, where the resolution allows it
CYCLE = 8  # how often each sample comes in a cycle of groups, about
_AT_ONCE = 1 << 20  # sizes looked at together
_WHOLE = 1 << 20  # the share that a crop keeps is counted in these parts: sums of integers do not depend on their order


def ladder(resolution: int) -> list[Shape]:
    """The shapes that there may be, the square first, then by ratio.

    Each is the widest (or highest) of its height whose area is no larger than the square's, with ratios of up to 4. The
    sides are multiples of 64 pixels, or of the largest smaller power of two that divides the resolution and is no more
    than an eighth of it.
    """
    multiple = MULTIPLE
    while multiple > 1 and (resolution % multiple or 8 * multiple > resolution):
        multiple //= 2
    shapes = {(resolution, resolution)}
    for short in range(-(-resolution // 2 // multiple) * multiple, resolution, multiple):
        if short > 0:
            long = resolution * resolution // short // multiple * multiple
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=lambda shape: (max(shape) / min(shape), shape))


def kept(sizes: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """What remains of pictures when they are cut to shapes, in 2^20 parts of each: (N, 2) int64 heights and widths, and
    K shapes -> (N, K) int64. Of a size that is not known (0) it is that of a square's."""
    height, width = sizes.clamp(min=1).double().T[..., None]
    down, across = torch.tensor(shapes, dtype=torch.float64).T
    one, other = height * across, width * down
    return (torch.minimum(one, other) / torch.maximum(one, other) * _WHOLE).round().long()


def choose_shapes(sizes: Tensor, resolution: int, most: int, group: int) -> list[Shape]:
    """The shapes for these pictures: greedily of the ladder those that keep most of all, up to ``most``.

    A shape that fewer pictures than a group would have is left out: these take the next one.

    Args:
        sizes: (N, 2) int64, heights and widths of the upright pictures; 0 where they are not known.
        resolution: side of the square, pixels.
        most: how many shapes, at least 1.
        group: samples in a group.
    """
    height, width = sizes[sizes.amin(1) > 0].T
    codes, counts = (height << 32 | width).unique(return_counts=True)
    known = torch.stack([codes >> 32, codes & 0xFFFFFFFF], dim=1)
    left = ladder(resolution)
    if not len(known):
        return left[:1]
    shares = kept(known, left)
    best, total = torch.zeros(len(known), dtype=torch.int64), 0
    chosen: list[Shape] = []
    while len(chosen) < min(most, len(left)):
        totals = (torch.maximum(best[:, None], shares) * counts[:, None]).sum(0).tolist()
        number = totals.index(max(totals))
        if totals[number] == total:
            break
        total, best = totals[number], torch.maximum(best, shares[:, number])
        chosen.append(left[number])
    chosen.sort(key=lambda shape: (shape[1] / shape[0], shape))
    while len(chosen) > 1:
        members = torch.bincount(nearest(known, chosen), counts, len(chosen)).tolist()
        if min(members) >= group:
            break
        del chosen[members.index(min(members))]
    return chosen


def nearest(sizes: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """The number of each picture's shape: (N, 2) int64 -> (N,) int64. Of several that are as near it is the first."""
    parts = (kept(part, shapes) for part in sizes.split(_AT_ONCE))
    return torch.cat([(shares == shares.amax(1, keepdim=True)).long().argmax(1) for shares in parts])


def cropped(sizes: Tensor, shapes: Sequence[Shape]) -> float:
    """Which share of the pictures' pixels is cut away, of each the same weight."""
    known = sizes[sizes.amin(1) > 0]
    total = sum(int(kept(part, shapes).amax(1).sum()) for part in known.split(_AT_ONCE))
    return 1.0 - total / _WHOLE / len(known) if len(known) else 0.0


class Buckets:
    """Which shape every sample has.

    Args:
        shapes: their heights and widths, pixels.
        numbers: (N,) integers, the number of each sample's shape.
        lost: which share of the pixels is cut away, and which one squares would cut; None: it is not known.
    """

    def __init__(self, shapes: Sequence[Shape], numbers: Tensor, lost: tuple[float, float] | None = None) -> None:
        self.shapes, self.numbers = list(shapes), numbers.to(torch.uint8)
        self.counts: list[int] = torch.bincount(numbers, minlength=len(shapes)).tolist()
        self.starts = [sum(self.counts[:number]) for number in range(len(shapes))]  # in `members`
        self.lost = lost
        self.members = self.numbers.argsort(stable=True)
        """(N,) int64: the samples of the first shape in their order, then those of the second, and so on."""

    def part(self) -> Part:
        """What an inventory says of them: other shapes, or other pictures in them, are another order."""
        content = repr(self.shapes).encode() + self.numbers.numpy().tobytes()
        return Part("the pictures' shapes (data.buckets)", 0, hashlib.sha256(content).hexdigest())

    def of(self, samples: Tensor) -> Buckets:
        """The same for other samples: these, (P,) int64."""
        return Buckets(self.shapes, self.numbers[samples].long())


def open_buckets(
    reader: SampleReader, config: DataConfig, progress: bool, shapes: Sequence[Shape] | None = None
) -> Buckets:
    """The buckets of a data set.

    Args:
        reader: has `sizes(workers, progress)`: (N, 2) int64, heights and widths of the upright pictures; 0 where they
            are not known. Of latents it has the shapes too.
        config: with `data.buckets`.
        progress: show it on a terminal where reading the sizes takes long.
        shapes: those of other pictures; None: chosen for these, which weigh as much as they repeat.

    Raises:
        UserError: the reader knows no sizes.
    """
    if (find := getattr(reader, "sizes", None)) is None:
        unable = f"data.source {config.source!r} does not tell the sizes of its pictures"
        raise UserError(f"data.buckets is {config.buckets}; {unable}: use off")
    sizes = find(config.workers, progress)
    of_latents = getattr(getattr(reader, "header", None), "shapes", None)
    shapes = of_latents or shapes
    if not shapes:
        of_an_epoch = sizes
        if config.repeats is not None and (shares := shares_of(reader)):
            places = Places(shares)
            of_an_epoch = sizes[places(torch.arange(len(places)))]
        assert config.buckets != "off"
        shapes = choose_shapes(of_an_epoch, config.resolution, config.buckets, config.group)
    lost = None if of_latents else (cropped(sizes, shapes), cropped(sizes, [(1, 1)]))  # these are cut already
    return Buckets(shapes, nearest(sizes, shapes), lost)


def bucket_lines(buckets: Buckets) -> Iterator[str]:
    """The shapes, and how many samples have each; then what is cut away."""
    for (height, width), count in zip(buckets.shapes, buckets.counts, strict=True):
        yield f"{width} x {height}: {count}"
    if buckets.lost is not None:
        ours, squares = buckets.lost
        yield f"{ours:.1%} of the pixels are cropped away, by squares it would be {squares:.1%}"


class BucketOrder(SampleOrder):
    """Which sample stands at which position of the run, where samples have several shapes.

    Positions are taken in groups of g, each of one shape. Bucket k of n_k samples has m_k = max(1, round(8 n_k / g))
    groups of every cycle of M = sum m_k groups. With `permute` of :mod:`fastsp.data.order`, position p holds

        q = p // g;   cycle, r = divmod(q, M);   u = permute(r, M, seed, cycle)
        k = the bucket in whose range of the cumulated m_k u lies, from start_k on
        slot = (cycle * m_k + u - start_k) * g + p % g
        sample = the permute(slot % n_k, n_k, seed_k, slot // n_k)-th of bucket k

    So each bucket has an endless stream of its own permutations, of which a cycle takes the next m_k groups, in any
    order. Samples of several buckets come equally often but for the rounding of m_k, half a group in a cycle. seed_k is
    words 0 and 1 of stream 4 at position 2^63 + k, which no epoch reaches; of word 1 the low 31 bits.
    """

    def __init__(self, buckets: Buckets, group: int, seed: int) -> None:
        super().__init__(len(buckets.numbers), seed)
        self.buckets, self.group = buckets, group
        full = [number for number, count in enumerate(buckets.counts) if count]
        self.full = full  # an empty bucket has no groups
        self.per_cycle = [max(1, round(CYCLE * buckets.counts[number] / group)) for number in full]
        self.ends = torch.tensor(self.per_cycle).cumsum(0)
        self.seeds = [bucket_seed(seed, number) for number in full]

    def at(self, positions: Tensor) -> Tensor:
        groups = positions // self.group
        cycles = groups // int(self.ends[-1])
        places = permute(groups % self.ends[-1], int(self.ends[-1]), self.seed, cycles)
        which = torch.bucketize(places, self.ends, right=True)
        samples = torch.empty_like(positions)
        for index in which.unique().tolist():
            rows, number, per_cycle = which == index, self.full[index], self.per_cycle[index]
            place = cycles[rows] * per_cycle + places[rows] - (self.ends[index] - per_cycle)
            slots, size = place * self.group + positions[rows] % self.group, self.buckets.counts[number]
            members = permute(slots % size, size, self.seeds[index], slots // size)
            samples[rows] = self.buckets.members[self.buckets.starts[number] + members]
        return samples


def bucket_seed(seed: int, number: int) -> int:
    """seed_k of :class:`BucketOrder`."""
    zero, place = torch.tensor(0), (number, 1 << 31)
    low, high, *_ = philox_4x32_10(seed & MASK, seed >> 32 & MASK, zero, Stream.SHUFFLE, *place)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32

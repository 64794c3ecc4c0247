"""The order of the samples: a seeded permutation of the source for every epoch, in constant memory.

It is a Feistel network keyed by Philox: every round adds to one half of the index a pseudo-random function of the other
half, which can always be undone, hence the whole is a bijection whatever the function is.
"""

from __future__ import annotations

import math

import torch
from fastsp_kernels.philox import MASK, Stream, philox_4x32_10
from torch import Tensor

ROUNDS = 24  # with eight, sources of half a dozen samples see some orders a third too often; with 24, none measurably
BLOCK = 4096  # positions permuted at once: one vectorised call serves many batches


def permute(indices: Tensor, size: int, seed: int, epochs: Tensor) -> Tensor:
    """Each epoch's permutation of 0 .. size - 1, a pure function of (seed, epoch, size).

    This docstring is the definition. With `a = ceil(sqrt(size))` and `b = ceil(size / a)`, an index is written as
    `(left, right) = (index // b, index % b)`, left in 0 .. a - 1 and right in 0 .. b - 1. Round r = 0 .. 23 is

        r even:  left  = (left  + scale(F_r(right), a)) mod a
        r odd:   right = (right + scale(F_r(left),  b)) mod b

    where `F_r(half)` is word r of stream 4 at position `epoch * 2^32 + half`, and `scale(word, n) = word * n >> 32`.
    The image is `left * b + right`. One that is not below `size` (there are fewer than `a` such) goes through the
    rounds again until it is, which keeps the map a bijection of 0 .. size - 1.

    Of `indices`, (B,) int64, for a size from 1 to 2^60, a seed of 64 bits and `epochs`, (B,) int64, each from 0 to
    2^31 - 1, it gives (B,) int64.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    result = _rounds(indices, a, b, seed, epochs)
    while len(outside := (result >= size).nonzero()[:, 0]):
        result[outside] = _rounds(result[outside], a, b, seed, epochs[outside])
    return result


def _rounds(indices: Tensor, a: int, b: int, seed: int, epochs: Tensor) -> Tensor:
    left, right = indices // b, indices % b
    for r in range(ROUNDS):
        if r % 2 == 0:
            left = (left + (_round_function(right, r, seed, epochs) * a >> 32)) % a
        else:
            right = (right + (_round_function(left, r, seed, epochs) * b >> 32)) % b
    return left * b + right


def _round_function(half: Tensor, r: int, seed: int, epochs: Tensor) -> Tensor:
    """Word r at position `epoch * 2^32 + half`; `random_words` would make all the words before it too."""
    block = torch.tensor(r // 4)
    return philox_4x32_10(seed & MASK, seed >> 32 & MASK, block, Stream.SHUFFLE, half, epochs)[r % 4]


class SampleOrder:
    """Which sample stands at which position of the run: position p of epoch `p // size` is sample
    `permute(p % size)` of the source, so each sample comes exactly once an epoch. The seed is that of the run."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._latest: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))  # first position, samples

    def __call__(self, positions: Tensor) -> Tensor:
        """Indices of the samples at `positions`: (B,) int64 in, (B,) int64 out. Fastest where positions ascend."""
        starts = positions // BLOCK * BLOCK
        samples = torch.empty_like(positions)
        for start in starts.unique().tolist():
            inside = starts == start
            samples[inside] = self._samples_from(start)[positions[inside] - start]
        return samples

    def _samples_from(self, start: int) -> Tensor:
        """The samples at positions `start` .. `start + BLOCK - 1`, of which the latest block is kept."""
        latest, samples = self._latest  # read and replaced as one: several threads may ask
        if latest != start:
            samples = self.at(torch.arange(start, start + BLOCK))
            self._latest = (start, samples)
        return samples

    def at(self, positions: Tensor) -> Tensor:
        """The samples at positions, computed anew."""
        return permute(positions % self.size, self.size, self.seed, positions // self.size)

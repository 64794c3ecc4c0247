"""The figures of one row: FID, Inception Score, and what those two cannot say about a few hundred samples.

Everything is float64. Smaller is better for `fid` and `kid`, larger for all others but `nearest_train` and
`memorised`, which should be near those of real images that were held out. Read `recall` together with `precision`:
stray samples have wide balls, so noise can raise it (Naeem et al. 2020); `coverage` asks the same in a way that strays
cannot answer.

FID is biased upwards at small N (Chong & Forsyth 2020, arXiv 1911.07023), so its rows are comparable at equal
`num_samples` and equal reference only. `kid` has no such bias: fewer images make it less certain, not larger. Figures
of another feature model are never comparable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONFIDENT = 0.9  # probability above which the classifier counts as having read the image
NEIGHBOURS = 3  # k of the manifold estimate, the value of its paper
TEN_SPLITS = 5_000  # samples from which on the Inception Score of ten splits, as most papers give it, says something
_ROWS = 1024  # of a matrix of distances or kernels held at once


def frechet_distance(mean: Tensor, covariance: Tensor, generated: Tensor) -> float:
    """FID of generated images against real ones, in squared feature units.

    Heusel et al. 2017, arXiv 1706.08500: ||mu1 - mu2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). All float64: mean (D,) and
    covariance (D, D), with N - 1 below, of the real images' features; generated features (M, D), M at least 2.
    """
    theirs = torch.cov(generated.T)
    root_trace = torch.linalg.eigvals(covariance @ theirs).sqrt().real.sum()
    distance = ((mean - generated.mean(0)) ** 2).sum() + covariance.trace() + theirs.trace() - 2 * root_trace
    return distance.item()


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """KID of generated images against real ones: the squared MMD of the kernel (x y / D + 1)^3, unbiased.

    Binkowski et al. 2018, arXiv 1801.01401, section 4, of all images at once instead of the mean over subsets. It may
    be negative. Features are float64 (N, D) and (M, D), two or more of each.
    """

    def kernel_sum(a: Tensor, b: Tensor) -> Tensor:
        return sum(((part @ b.T / b.shape[1] + 1) ** 3).sum() for part in a.split(_ROWS))

    def mean_of_pairs(x: Tensor) -> Tensor:
        with_itself = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))

    across = kernel_sum(real, generated) / (len(real) * len(generated))
    return (mean_of_pairs(real) + mean_of_pairs(generated) - 2 * across).item()


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """exp of the mean KL(p(class | image) || p(class)) of logits, float64 (N, K); 1 at worst, K at best.

    Salimans et al. 2016, arXiv 1606.03498, with ten splits of 50,000 samples: too few remain in each of a few hundred.
    Splits are of a seeded permutation, and their scores are averaged.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    log_p = logits[order].log_softmax(1)
    parts = [(part.exp(), part) for part in log_p.chunk(splits)]
    split_scores = [(p * (log - p.mean(0).log())).sum(1).mean().exp() for p, log in parts]
    return torch.stack(split_scores).mean().item()


def validity(logits: Tensor) -> float:
    """Share, 0 to 1, of the images that the classifier reads with a probability above 0.9; logits (N, K)."""
    return (logits.softmax(1).amax(1) > CONFIDENT).double().mean().item()


def caption_agreement(logits: Tensor, captions: Sequence[str], class_names: Sequence[str]) -> float:
    """Share, 0 to 1, of the images whose most probable class is their caption; logits (N, K), N captions."""
    read = logits.argmax(1).tolist()
    return sum(class_names[k] == caption for k, caption in zip(read, captions, strict=True)) / len(read)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated images inside the real manifold, and of real ones inside the generated; each 0 to 1.

    Kynkäänniemi et al. 2019, arXiv 1904.06991. The manifold of a set is the union of balls around its members, each
    reaching to the member's k-th nearest neighbour. Features are float (N, D) and (M, D), more than k of each.
    """

    def share_inside(points: Tensor, centres: Tensor) -> float:
        radii = _radii(centres, neighbours)
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(_ROWS)]
        return torch.cat(inside).double().mean().item()

    return share_inside(generated, real), share_inside(real, generated)


def coverage(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share, 0 to 1, of the real images that have a generated one within reach of their k-th real neighbour.

    Naeem et al. 2020, arXiv 2002.09797. Arguments as of `precision_recall`; it grows with the number of samples.
    """
    return (nearest_distance(real, generated) <= _radii(real, neighbours)).double().mean().item()


def _radii(centres: Tensor, neighbours: int) -> Tensor:
    """Distance of each centre to its k-th nearest fellow; the nearest of all is itself, hence one more."""
    parts = (torch.cdist(part, centres) for part in centres.split(_ROWS))
    return torch.cat([distances.kthvalue(neighbours + 1, dim=1).values for distances in parts])


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance in feature space, float64 (N,), of N images, (N, D), to the nearest of others, (M, D)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.split(_ROWS)])

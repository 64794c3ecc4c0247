"""The figures of one row: FID, Inception Score, and what those two cannot say about a few hundred samples.

Everything is float64. Larger is better for `inception_score`, `validity`, `caption_agreement`, `precision`, `recall`
and `coverage`; smaller is better for `fid`. `nearest_train` and `memorised` have no best end: they are to be near those
of real pictures that were held out, nearer to the training set means copies of it.

`recall` is read together with `precision` only: stray samples have wide balls, so noise can raise it (Naeem et al.
2020). `coverage` asks the same question in a way that strays cannot answer.

Not covered: FID is biased upwards at small N (Chong & Forsyth 2020, arXiv 1911.07023), so rows are comparable at equal
`num_samples` and equal reference only, and never with figures from another feature model.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.picture_set import Pictures

CONFIDENT = 0.9  # probability above which the classifier counts as having read the picture
NEIGHBOURS = 3  # k of the manifold estimate, the value of its paper


class _AlreadyExtracted(nn.Module):
    """Stands in for torchmetrics' feature network, since one extraction serves all metrics here."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def of_few_pictures(count: int, width: int) -> str | None:
    """What to know of an FID of so many pictures in so many features; None: nothing."""
    if count >= width:
        return None
    return (
        f"{count} pictures are fewer than the {width} features: FID comes out too high, the more so the fewer, so "
        "compare it only between rows of equally many"
    )


class FrechetDistance:
    """FID against a fixed set of real pictures, whose statistics are computed once.

    Heusel et al. 2017, arXiv 1706.08500: ||mu1 - mu2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared feature units.

    Args:
        real: features of the real pictures, float64 (N, D), N at least 2; or their mean (D,), covariance (D, D) and
            number N, all float64 but the last.
    """

    def __init__(self, real: Tensor | tuple[Tensor, Tensor, int]) -> None:
        width = real.shape[1] if isinstance(real, Tensor) else len(real[0])
        self._metric = FrechetInceptionDistance(_AlreadyExtracted(width), reset_real_features=False)
        self._metric.set_dtype(torch.float64)
        if isinstance(real, Tensor):
            self._metric.update(real.double(), real=True)
            return
        mean, covariance, count = real
        self._metric.real_features_sum = mean.double() * count
        self._metric.real_features_cov_sum = (
            covariance.double() * (count - 1) + count * torch.outer(mean, mean).double()
        )
        self._metric.real_features_num_samples = torch.tensor(count)

    def __call__(self, generated: Tensor) -> float:
        """FID of `generated`, features float64 (M, D), M at least 2."""
        self._metric.reset()
        self._metric.update(generated.double(), real=False)
        return float(self._metric.compute())


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """exp of the mean KL(p(class | picture) || p(class)); 1 at worst, the number of classes at best.

    Salimans et al. 2016, arXiv 1606.03498. In one split by default: ten, their number for 50,000 samples, would leave
    too few samples in each of a few hundred. `logits` is float64 (N, K).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns that it keeps the logits, and of the spread over one split
        metric = InceptionScore(_AlreadyExtracted(logits.shape[1]), splits=splits)
        with torch.random.fork_rng(devices=[]):  # it shuffles with the global generator
            torch.manual_seed(0)
            metric.update(logits.double())
            return float(metric.compute()[0])


def validity(logits: Tensor) -> float:
    """Share, 0 to 1, of the pictures that the classifier reads with a probability above 0.9; logits (N, K)."""
    return (logits.softmax(1).amax(1) > CONFIDENT).double().mean().item()


def caption_agreement(logits: Tensor, captions: Sequence[str], class_names: Sequence[str]) -> float:
    """Share, 0 to 1, of the pictures whose most probable class is their caption; logits (N, K), N captions."""
    read = logits.argmax(1).tolist()
    return sum(class_names[k] == caption for k, caption in zip(read, captions, strict=True)) / len(read)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated pictures inside the real manifold, and of real ones inside the generated; each 0 to 1.

    Kynkäänniemi et al. 2019, arXiv 1904.06991. The manifold of a set is the union of balls around its members, each
    reaching to the member's k-th nearest neighbour.

    Args:
        real: float (N, D), more than `neighbours` of them.
        generated: float (M, D), more than `neighbours` of them.
        neighbours: k.
    """
    precision = (torch.cdist(generated, real) <= _radii(real, neighbours)).any(1)
    recall = (torch.cdist(real, generated) <= _radii(generated, neighbours)).any(1)
    return precision.double().mean().item(), recall.double().mean().item()


def coverage(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share, 0 to 1, of the real pictures that have a generated one within reach of their k-th real neighbour.

    Naeem et al. 2020, arXiv 2002.09797. Arguments as of `precision_recall`; it grows with the number of samples.
    """
    reached = torch.cdist(real, generated).amin(1) <= _radii(real, neighbours)
    return reached.double().mean().item()


def _radii(centres: Tensor, neighbours: int) -> Tensor:
    """Distance of each centre to its k-th nearest fellow; the nearest of all is itself, hence one more."""
    return torch.cdist(centres, centres).kthvalue(neighbours + 1, dim=1).values


def nearest_distance(images: Tensor, train: Tensor, batch_size: int = 256) -> Tensor:
    """Distance of each picture to the nearest training picture, float64 (N,).

    The distance is the root mean square difference over all pixels and channels, pictures being in [-1, 1]: 0 for a
    copy, 2 between black and white.

    Args:
        images: float (N, C, H, W).
        train: float (M, C, H, W), M at least 1.
        batch_size: pictures compared at once; bounds the memory, not the result.
    """
    points, flat = images.double().flatten(1), train.double().flatten(1)
    nearest = [torch.cdist(batch, flat).amin(1) for batch in points.split(batch_size)]
    return torch.cat(nearest) / flat.shape[1] ** 0.5


class Scorer:
    """Scores sets of pictures against held-out real ones and the training set.

    Args:
        model: what looks at the pictures.
        heldout: real pictures that no network was trained on: the reference of `fid`, `precision` and `recall`.
        train: the training pictures, of the same shape.
    """

    def __init__(self, model: FeatureModel, heldout: Pictures, train: Pictures) -> None:
        if len(heldout) <= NEIGHBOURS:
            raise UserError(f"evaluation: {len(heldout)} held-out pictures; allowed: at least {NEIGHBOURS + 1}")
        self.model, self.train = model, train
        self.real = model.extract(heldout.images)
        self.fid = FrechetDistance(self.real.features)
        # A sample is called a copy if it is nearer to the training set than 99 % of the held-out pictures are.
        self.copy_distance = nearest_distance(heldout.images, train.images).quantile(0.01).item()

    def score(self, pictures: Pictures) -> dict[str, float]:
        """All figures for `pictures`: `caption_agreement` only if they have captions and the model's classes are some.

        Raises:
            UserError: fewer than four pictures.
        """
        if len(pictures) <= NEIGHBOURS:
            raise UserError(f"evaluation.num_samples={len(pictures)}; allowed: at least {NEIGHBOURS + 1}")
        seen = self.model.extract(pictures.images)
        nearest = nearest_distance(pictures.images, self.train.images)
        row = self._of_features(seen)
        row["nearest_train"] = nearest.mean().item()
        row["memorised"] = (nearest < self.copy_distance).double().mean().item()
        if pictures.captions and self.model.class_names:
            row["caption_agreement"] = caption_agreement(seen.logits, pictures.captions, self.model.class_names)
        return row

    def _of_features(self, seen: Features) -> dict[str, float]:
        precision, recall = precision_recall(self.real.features, seen.features)
        return {
            "fid": self.fid(seen.features),
            "inception_score": inception_score(seen.logits),
            "validity": validity(seen.logits),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(self.real.features, seen.features),
        }

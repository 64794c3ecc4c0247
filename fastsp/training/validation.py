"""The validation loss: held-out samples with fixed noise and timesteps, seen by the moving average.

Everything but the weights is fixed: sample i has the noise and the draws of position 2^62 + i of a seed of its own, so
no training sample shares them, and curves of different runs on the same data can be compared. t and t' are stratified
(McKay et al. 1979, *A Comparison of Three Methods ...*): of N samples each has another N-th of the draws. Batches are
the same at any number of processes, and the samples' losses are summed in one order.
"""

from __future__ import annotations

import math
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from fastsp_kernels import Stream
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastsp.config import Config
from fastsp.data.batch import Batch
from fastsp.data.order import permute
from fastsp.data.source import Source
from fastsp.diffusion.draws import Seeded
from fastsp.errors import UserError
from fastsp.loss import SelfPerceptualLoss, squared_error
from fastsp.training.distributed import Ranks
from fastsp.training.step import TrainingStep

SEED = 0
FIRST_POSITION = 1 << 62


@dataclass(frozen=True)
class Stratified:
    """Random numbers (``fastsp.diffusion.process.Random``) of the samples ``indices`` of ``count``, (B,) int64, each in
    a share of its own of the distribution."""

    stream: Stream
    indices: Tensor
    count: int

    def uniforms(self) -> Tensor:
        where = self.indices.cpu()
        share = permute(where, self.count, int(self.stream), torch.zeros_like(where)).to(self.indices.device)
        within = Seeded(SEED, self.stream, FIRST_POSITION + self.indices).uniforms().double()
        return ((share + within) / self.count).float().clamp(max=1.0 - 2.0**-24)

    def integers(self, bound: int) -> Tensor:
        return (self.uniforms().double() * bound).long()

    def normals(self) -> Tensor:
        return torch.special.ndtri(self.uniforms().clamp(min=2.0**-24))


class Validation:
    """The validation of a run.

    Args:
        config: has the section.
        source: of the held-out samples, not shuffled, cropped at the center and not mirrored.
        ranks: the processes, which share the batches.
    """

    def __init__(self, config: Config, source: Source, ranks: Ranks) -> None:
        settings, self.ranks = config.validation, ranks
        self.count, self.batch_size = min(settings.samples, len(source)), settings.batch_size
        self.source = source
        spread = torch.arange(self.count) * len(source) // self.count  # evenly over the data set
        shapes = torch.zeros_like(spread) if source.buckets is None else source.buckets.numbers[spread].long()
        self.samples = shapes.argsort(stable=True)
        """(N,) int64, the sample at each of the source's positions: those of one shape side by side."""
        self.bounds: list[tuple[int, int]] = []  # of the batches' positions; each has one shape
        first = 0
        for last in torch.bincount(shapes).cumsum(0).tolist():
            starts = range(first, last, self.batch_size)
            self.bounds += [(start, min(start + self.batch_size, last)) for start in starts]
            first = last
        source.order = lambda positions: spread[self.samples[positions]]
        data = config.data.model_copy(update={"caption_dropout": 0.0})
        self.config = config.model_copy(update={"data": data})
        self._batches: dict[int, Batch] = {}  # this rank's, on the CPU, with their features

    @torch.no_grad()
    def losses(self, step: TrainingStep, average: Any) -> dict[str, float]:
        """Mean squared error of the prediction, and the self-perceptual loss where the stage has its metric.

        All ranks call it, and get the same figures.

        Args:
            step: of the stage.
            average: the network of its moving average.
        """
        still = copy(step)
        still.config, still.seed = self.config, torch.tensor(SEED, device=step.seed.device)
        still.network, still.dtype = average, average.dtype
        total, world_size = len(self.bounds), self.ranks.world_size
        own: dict[str, Tensor] = {}
        with torch.compiler.set_stance("force_eager"):  # a shape that comes rarely is not worth compiling for
            # As many batches on every rank, for all gather a sharded network: at the end some come twice.
            for start in range(0, total, world_size):
                number = min(start + self.ranks.rank, total - 1)
                rows = self.samples[slice(*self.bounds[number])]
                for name, values in self._batch_losses(still, number).items():
                    own.setdefault(name, torch.zeros(self.count, dtype=torch.float64))[rows] = values.cpu().double()
        for module in average.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        bits = torch.stack(list(own.values())).view(torch.int64)
        parts = self.ranks.exchange(bits.flatten().tolist()).view(torch.float64).view(world_size, *bits.shape)
        batches = torch.repeat_interleave(torch.tensor([last - first for first, last in self.bounds]))
        owners = torch.empty_like(self.samples)
        owners[self.samples] = batches % world_size
        weights, *losses = parts[owners, :, torch.arange(self.count)].T
        if not (whole := weights > 0).any():
            raise UserError(f"validation: none of the {self.count} held-out samples can be read")
        means = (math.fsum(values[whole].tolist()) / int(whole.sum()) for values in losses)
        return dict(zip(list(own)[1:], means, strict=True))

    def _batch_losses(self, still: TrainingStep, number: int) -> dict[str, Tensor]:
        """Of a batch the samples' weights, 0 for those that could not be read, and losses; each (B,)."""
        device, objective = still.seed.device, still.objective
        if number not in self._batches:
            self._batches[number] = still.encoded(self._read(number).to(device)).copy_to("cpu")
        batch = self._batches[number].to(device)
        indices = self.samples[batch.positions].to(device)
        positions = FIRST_POSITION + indices
        latents, conditioning = still.latents(batch, positions), still.conditioning(batch, positions)
        process = still.model.of_size(still.process, latents)
        t = process.draw(Stratified(Stream.TIMESTEP, indices, self.count))
        model_pred, target, keywords = still.predict(latents, conditioning, t, positions)
        weights = still.weights_of_places(batch, latents)
        found = {"weight": batch.weights, "validation_mse": squared_error(model_pred, target, weights)}
        if objective.self_perceptual is not None:
            random = Stratified(Stream.PERCEPTUAL_TIMESTEP, indices, self.count)
            t_prime = process.draw_perceptual(random, t, objective.timestep_sampling)
            found["validation_self_perceptual"] = SelfPerceptualLoss.per_sample(  # without a critic's share
                objective.self_perceptual,
                model_pred,
                latents,
                t,
                t_prime,
                keywords,
                seed=still.seed,
                positions=positions,
                weights=weights,
            )
        return found

    def _read(self, number: int) -> Batch:
        first, last = self.bounds[number]
        with closing(self.source.batches(first_position=first, last_position=last, batch_size=last - first)) as batches:
            return next(iter(batches))

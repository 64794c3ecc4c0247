"""fastsp's own step, built by the trainer's own function."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsp.bench.workload import Workload
from fastsp.data.batch import Batch
from fastsp.diffusion.conditioning import Conditioning
from fastsp.training.build_step import build_step
from fastsp.training.capture import CapturedStep, captured
from fastsp.training.step import TrainingStep


class FastspStep:
    """A :class:`fastsp.training.step.TrainingStep` on one batch, whose positions move on with every step.

    The text features are precomputed, as for the other providers; captions are dropped as the configuration says. The
    objective is ``self_perceptual`` or ``mse``; ``changes`` are other keys of the stage.
    """

    def __init__(self, workload: Workload, objective: str = "self_perceptual", **changes: Any) -> None:
        self.training_step = build_training_step(workload, objective, **changes)
        self.take_step: TrainingStep | CapturedStep = captured(self.training_step)
        self.numbers = itertools.count(1)
        batch_size, conditioning = workload.batch_size, workload.conditioning()
        sizes = workload.sizes() if conditioning.time_ids is not None else None
        self.batch = Batch(
            positions=torch.arange(batch_size),
            weights=torch.ones(batch_size, device=workload.device),
            captions=("",) * batch_size,
            pixel_values=workload.latents(),  # without a VAE, the step takes latents as pixels
            text_features=conditioning.encoder_hidden_states,
            pooled_text_features=conditioning.text_embeds,
            original_sizes=sizes,
            crop_offsets=None if sizes is None else torch.zeros_like(sizes),
        )
        if self.training_step.calibration:
            self.training_step.calibrate(self.batch, batch_size)

    @property
    def how(self) -> dict[str, Any]:
        """Whether a CUDA graph is replayed and how the teacher is called, as it turned out."""
        criterion = self.training_step.objective.self_perceptual
        replayed = isinstance(self.take_step, CapturedStep) and self.take_step.recording is not None
        return {"cuda_graph": replayed, "teacher": None if criterion is None else criterion.teacher}

    def step(self) -> None:
        """One optimizer step."""
        number = next(self.numbers)
        self.take_step(replace(self.batch, positions=self.batch.positions + number * len(self.batch)), number)

    def loss(self) -> Tensor:
        """The loss at the first positions of the run, with that of a critic's heads. 0-d float32."""
        return self.training_step.losses(self.batch)[1]


def build_training_step(workload: Workload, objective: str, **changes: Any) -> TrainingStep:
    """What :class:`fastsp.training.trainer.Trainer` builds for a stage with other keys, by the same function."""
    initial, stage, config = workload.network(), workload.stage(objective), workload.config
    as_pixels = config.data.model_copy(update={"resolution": workload.latent_shape[1]})
    empty = workload.conditioning()
    step, _ = build_step(
        config.model_copy(update={"data": as_pixels}),
        stage.model_copy(update=changes),
        workload.model(initial),  # nothing to encode
        Conditioning(
            torch.zeros_like(empty.encoder_hidden_states[:1], dtype=torch.float32),
            None if empty.text_embeds is None else torch.zeros_like(empty.text_embeds[:1], dtype=torch.float32),
        ),
        initial=initial,
        frozen_network=initial if objective == "self_perceptual" else None,
        attention="sdpa" if config.attention == "auto" else config.attention,
    )
    return step

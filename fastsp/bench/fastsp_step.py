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
from fastsp.models import TextToImageModel, ddim_scheduler
from fastsp.training.capture import CapturedStep, captured
from fastsp.training.step import TrainingStep, build_step


class FastspStep:
    """A :class:`fastsp.training.step.TrainingStep` on one batch, whose positions move on with every step.

    The text features are precomputed, as for the other providers; captions are dropped as the configuration says. The
    objective is ``self_perceptual`` or ``mse``; ``changes`` are other keys of the stage.
    """

    def __init__(self, workload: Workload, objective: str = "self_perceptual", **changes: Any) -> None:
        self.training_step = build_training_step(workload, objective, **changes)
        self.take_step: TrainingStep | CapturedStep = captured(self.training_step)
        self.numbers = itertools.count(1)
        batch_size = workload.batch_size
        self.batch = Batch(
            positions=torch.arange(batch_size),
            weights=torch.ones(batch_size, device=workload.device),
            captions=("",) * batch_size,
            pixel_values=workload.latents(),  # without a VAE, the step takes latents as pixels
            text_features=workload.text_features(),
        )

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
    initial, stage = workload.unet(), workload.stage(objective)
    step, _ = build_step(
        workload.config,
        stage.model_copy(update=changes),
        # Nothing to encode; v-prediction at zero terminal SNR, as in the paper
        TextToImageModel(initial, text_encoder=None, tokenizer=None, scheduler=ddim_scheduler()),
        Conditioning(torch.zeros(1, *workload.text_shape, device=workload.device)),
        initial=initial,
        frozen_network=initial if objective == "self_perceptual" else None,
        attention="sdpa" if workload.config.attention == "auto" else workload.config.attention,
    )
    return step

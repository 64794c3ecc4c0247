"""fastsp's own step, built from the trainer's parts in the trainer's order."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsp.bench.workload import Workload
from fastsp.data.batch import Batch
from fastsp.models import TextToImageModel
from fastsp.perceptual import cast
from fastsp.training.optimizer import AdamWEMA
from fastsp.training.step import Objective, TrainingStep


class FastspStep:
    """A :class:`fastsp.training.step.TrainingStep` on a batch that never changes but for its positions.

    The text features are at hand, as for the other providers; captions are dropped as the configuration says.

    Args:
        workload: what to train.
        objective: ``self_perceptual`` or ``mse``.
    """

    def __init__(self, workload: Workload, objective: str = "self_perceptual") -> None:
        self.training_step = build_training_step(workload, objective)
        self.numbers = itertools.count(1)
        batch_size = workload.batch_size
        self.batch = Batch(
            positions=torch.arange(batch_size),
            input_ids=None,
            weights=torch.ones(batch_size, device=workload.device),
            captions=("",) * batch_size,
            pixel_values=workload.latents(),  # without a VAE, what the step is given are the latents
            text_features=workload.text_features(),
        )

    def step(self) -> None:
        """One optimizer step."""
        number = next(self.numbers)
        positions = self.batch.positions + number * len(self.batch)
        self.training_step(replace(self.batch, positions=positions), number)

    def draws(self) -> tuple[()]:
        """None to hand over: they follow from the seed and the positions."""
        return ()

    def loss(self) -> Tensor:
        """The loss at the first positions of the run. 0-d float32."""
        return self.training_step.microbatch_loss(self.batch)


def build_training_step(workload: Workload, objective: str) -> TrainingStep:
    """What :class:`fastsp.training.trainer.Trainer` builds for a stage."""
    config, stage, schedule, device = workload.config, workload.stage(objective), workload.schedule(), workload.device

    def placed(module: Any, dtype: torch.dtype) -> Any:
        return cast(module, dtype).to(device).to(memory_format=torch.channels_last)

    initial = workload.unet()
    ema_unet = placed(copy.deepcopy(initial), torch.float32).eval().requires_grad_(False)
    teacher = initial if objective == "self_perceptual" else None  # of which Objective keeps a truncated copy
    loss = placed(Objective(stage, schedule, "v_prediction", teacher), workload.dtype)
    unet = placed(initial, workload.dtype).train()
    if workload.compiles:
        unet.compile()
        if loss.self_perceptual is not None:
            loss.self_perceptual.compile_teacher()
    optimizer = AdamWEMA(unet, ema_unet, config.optimizer, config.ema)
    nothing_to_encode = TextToImageModel(unet, text_encoder=None, tokenizer=None, scheduler=None)
    empty = torch.zeros(1, *workload.text_shape, device=device)
    return TrainingStep(config, stage, unet, loss, optimizer, schedule, nothing_to_encode, empty)

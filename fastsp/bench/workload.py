"""What every provider trains: one model, one batch shape, one precision, one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastsp.config import Config, config_of, load_config
from fastsp.errors import UserError
from fastsp.generation.checkpoints import initial_model
from fastsp.models import digits_model
from fastsp.models.attention import Choice, choose_attention
from fastsp.objectives import StageConfig, stage_config
from fastsp.training.step import COMPUTE_DTYPES

# Stable Diffusion 2.1-base's `unet/config.json`: 865.9 M parameters
SD21_BASE_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_TEXT_SHAPE = (77, 1024)
SD21_STATE_BYTES = 24 * 866_000_000  # weights, master weights, gradients, two moments, average
SD21_BYTES_PER_SAMPLE = 3 << 30  # what a step keeps between forward and backward, rounded up
SD21_VAE_SCALE_FACTOR = 8
DIGITS_RESOLUTION, DIGITS_BATCH_SIZE = 8, 32  # those of configs/quickstart.yaml
_MANY_STEPS = 1_000_000


@dataclass(frozen=True)
class Workload:
    """Shapes and settings. Weights and data are random, seeded, and the same at every call."""

    name: str  # shown in tables
    config: Config  # gives batch size, precision, compilation, optimizer and EMA
    unet_config: dict[str, Any]  # of a ``UNet2DConditionModel``
    latent_shape: tuple[int, ...]  # (C, H, W)
    text_shape: tuple[int, int]  # (L, D) of the text features
    device: torch.device  # ``meta`` to count operations

    @property
    def batch_size(self) -> int:
        return self.config.data.batch_size

    @property
    def dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.config.precision]

    @property
    def compiles(self) -> bool:
        """Whether fastsp's own step is compiled: the trainer's rule."""
        return self.config.compiles_on(self.device)

    def choose_attention(self) -> Choice:
        """The trainer's choice for this model, batch and device."""
        sizes = (self.batch_size, *self.latent_shape), (self.batch_size, *self.text_shape)
        return choose_attention(self.config.attention, self.unet_config, *sizes, self.dtype, self.device)

    def unet(self) -> Any:
        """The UNet with its initial weights, float32, contiguous, on the device, in training mode."""
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(self.config.seed)
            return UNet2DConditionModel.from_config(self.unet_config).train()

    def latents(self) -> Tensor:
        """x_0, (B, C, H, W) float32."""
        return self._normal(1, self.latent_shape)

    def text_features(self) -> Tensor:
        """c, (B, L, D) in the compute dtype."""
        return self._normal(2, self.text_shape).to(self.dtype)

    def stage(self, objective: str) -> StageConfig:
        """The first configured stage of that objective; if there is none, one with the paper's choices."""
        plain = stage_config(objective, name=objective, steps=_MANY_STEPS, learning_rate=3e-5)
        configured = next((stage for stage in self.config.stages if stage.objective == objective), plain)
        return configured.model_copy(update={"name": objective, "steps": _MANY_STEPS})

    def for_counting(self) -> Workload:
        """The same on the ``meta`` device, eager and without recomputation."""
        eager = self.with_settings(compile=False, cuda_graph=False, gradient_checkpointing=False)
        return replace(eager, device=torch.device("meta"))

    def with_settings(self, **settings: Any) -> Workload:
        """The same with other top-level keys of the configuration."""
        return replace(self, config=self.config.model_copy(update=settings))

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch_size, *shape, generator=generator).to(self.device)


def default_workload(device: torch.device, overrides: Sequence[str] = ()) -> Workload:
    """SD2.1-base's configuration in bf16 on a GPU, the quickstart's model in float32 on a CPU; `UserError` for an
    override of the model, or one that the configuration refuses.
    """
    for override in overrides:
        if override.partition("=")[0].split(".")[0] == "model":
            raise UserError(f"{override}: without --config fastsp bench uses its own model; give a run's file")
    on_gpu = device.type == "cuda"
    tree: dict[str, Any] = {  # a run as the paper describes it
        "run_dir": "runs/bench",
        "precision": "bf16" if on_gpu else "fp32",
        "model": {"pretrained": "stabilityai/stable-diffusion-2-1-base"} if on_gpu else {"preset": "digits"},
        "data": {"source": "digits", "resolution": DIGITS_RESOLUTION, "batch_size": DIGITS_BATCH_SIZE},
        "stages": [
            {"name": "mse", "objective": "mse", "steps": 1, "learning_rate": 3e-5},
            {"name": "sp", "objective": "self_perceptual", "steps": 1, "learning_rate": 3e-5},
        ],
    }
    if on_gpu:
        tree["data"] |= {"resolution": 512, "batch_size": _sd21_batch_size(device)}
    config = _one_microbatch(config_of(tree, overrides, "fastsp bench"))
    resolution = config.data.resolution
    if not on_gpu:
        return _workload("the quickstart's digits model", config, digits_model(resolution, seed=0), device)
    side, left_over = divmod(resolution, SD21_VAE_SCALE_FACTOR)
    if left_over:
        raise UserError(f"data.resolution {resolution} must be a multiple of {SD21_VAE_SCALE_FACTOR}")
    return Workload("SD2.1-base, random weights", config, SD21_BASE_UNET, (4, side, side), SD21_TEXT_SHAPE, device)


def workload_of(file: Path, device: torch.device, overrides: Sequence[str] = ()) -> Workload:
    """The model and the settings of a configuration file, at the size of a microbatch, with random weights: speed does
    not depend on them. `UserError` for adapters, Stable Diffusion XL, and what cannot be loaded.
    """
    config = _one_microbatch(load_config(file, overrides))
    if config.model.lora is not None:
        raise UserError(f"{file}: fastsp bench measures the training of whole UNets: remove model.lora")
    model = initial_model(config)
    if model.text_encoder_2 is not None or model.kind.is_flow:
        raise UserError(f"{file}: fastsp bench measures Stable Diffusion 1.x, 2.x and the digits' UNet, not others yet")
    return _workload(str(file), config, model, device)


def _workload(name: str, config: Config, model: Any, device: torch.device) -> Workload:
    text_shape = (model.tokenizer.model_max_length, model.network.config.cross_attention_dim)
    latent_shape = model.latent_shape(config.data.resolution)
    return Workload(name, config, dict(model.network.config), latent_shape, text_shape, device)


def _one_microbatch(config: Config) -> Config:
    """The other providers take the whole batch at once, so ours does too."""
    data = config.data
    update = {"batch_size": data.microbatch or data.batch_size, "microbatch": None}
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _sd21_batch_size(device: torch.device) -> int:
    """The largest power of two, up to 32, that fits beside the state of two providers."""
    room = torch.cuda.get_device_properties(device).total_memory - 2 * SD21_STATE_BYTES
    return next((size for size in (32, 16, 8, 4, 2) if size * SD21_BYTES_PER_SAMPLE <= room), 1)

"""What every provider trains: one model, one batch shape, one precision, one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsp.bench.networks import NETWORKS, SMALL_SIDE, Network, parts_of
from fastsp.config import Config, config_of, load_config
from fastsp.diffusion.conditioning import Conditioning, time_ids
from fastsp.errors import UserError
from fastsp.families import NetworkFamily, family_named, family_of, full_config
from fastsp.generation.checkpoints import initial_model
from fastsp.models import TextToImageModel, digits_model
from fastsp.models.attention import Choice, choose_attention
from fastsp.models.lora import add_adapters
from fastsp.models.skeleton import META
from fastsp.objectives import StageConfig, stage_config
from fastsp.training.memory import GIB, placeholder_ids
from fastsp.training.step import COMPUTE_DTYPES

BYTES_PER_WEIGHT = 24  # that is trained: weight, master weight, gradient, two moments, average
DIGITS_RESOLUTION, DIGITS_BATCH_SIZE = 8, 32  # those of configs/quickstart.yaml
SMALL_BATCH_SIZE = 2
_MANY_STEPS = 1_000_000


@dataclass(frozen=True)
class Workload:
    """Shapes and settings. Weights and data are random, seeded, and the same at every call."""

    name: str  # shown in tables
    config: Config  # gives batch size, precision, adapters, compilation, optimizer and EMA
    network_config: dict[str, Any]  # with its ``_class_name``
    scheduler: Any  # diffusers': of what the network predicts
    pipeline_class: str
    latent_shape: tuple[int, int, int]  # (C, H, W)
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

    @property
    def family(self) -> NetworkFamily:
        return family_named(self.network_config["_class_name"])

    @property
    def prediction_type(self) -> str:
        """``v_prediction``, ``epsilon``, ``sample`` or ``flow_prediction``."""
        return self.model().prediction_type

    def choose_attention(self) -> Choice:
        """The trainer's choice for this model, batch and device."""
        sizes = (self.batch_size, *self.latent_shape), (self.batch_size, *self.text_shape)
        return choose_attention(self.config.attention, self.network_config, *sizes, self.dtype, self.device)

    def network(self) -> Any:
        """With its initial weights and adapters; float32, contiguous, on the device, in training mode."""
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(self.config.seed)
            network: Any = self.family.network_class().from_config(self.network_config).train()
            if self.config.model.lora is not None:
                add_adapters(network, **self.config.model.lora.model_dump(), seed=self.config.seed)
        return nn.Module.to(network, self.device)

    def model(self, network: Any = None) -> TextToImageModel:
        """The parts of a pipeline that a step needs where latents and text features are at hand."""
        flow = self.config.model.flow
        return TextToImageModel(
            network,
            text_encoder=None,
            tokenizer=None,
            scheduler=self.scheduler,
            pipeline_class=self.pipeline_class,
            flow=None if flow is None else flow.model_dump(),
        )

    def latents(self) -> Tensor:
        """x_0, (B, C, H, W) float32."""
        return self._normal(1, self.latent_shape)

    def conditioning(self) -> Conditioning:
        """c: text features (B, L, D), pooled ones where the network takes them, in the compute dtype; XL's sizes."""
        states = self._normal(2, self.text_shape).to(self.dtype)
        pooled_width = self.family.text_widths(self.network_config)[1]
        pooled = None if pooled_width is None else self._normal(3, (pooled_width,)).to(self.dtype)
        if not self.family.takes_sizes(self.network_config):
            return Conditioning(states, pooled)
        sizes = self.sizes()
        return Conditioning(states, pooled, time_ids(sizes, torch.zeros_like(sizes), sizes))

    def sizes(self) -> Tensor:
        """(B, 2) int64: of images that were never resized, whose pixels are the latents."""
        return torch.tensor(self.latent_shape[1:]).expand(self.batch_size, 2).to(self.device)

    def stage(self, objective: str) -> StageConfig:
        """The first configured stage of that objective; if there is none, one with the paper's choices."""
        plain = stage_config(objective, name=objective, steps=_MANY_STEPS, learning_rate=3e-5)
        configured = next((stage for stage in self.config.stages if stage.objective == objective), plain)
        return configured.model_copy(update={"name": objective, "steps": _MANY_STEPS})

    def for_counting(self) -> Workload:
        """The same on the ``meta`` device, eager and without recomputation."""
        eager = self.with_settings(compile=False, cuda_graph=False, gradient_checkpointing=False)
        return replace(eager, device=META)

    def with_settings(self, **settings: Any) -> Workload:
        """The same with other top-level keys of the configuration."""
        return replace(self, config=self.config.model_copy(update=settings))

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch_size, *shape, generator=generator).to(self.device)


def default_workload(device: torch.device, overrides: Sequence[str] = ()) -> Workload:
    """SD2.1-base's sizes in bf16 on a GPU, the quickstart's model in float32 on a CPU.

    Raises:
        UserError: see :func:`named_workload`.
    """
    if device.type == "cuda":
        return named_workload("sd21", device, overrides)
    sizes = {"resolution": DIGITS_RESOLUTION, "batch_size": DIGITS_BATCH_SIZE}
    config = _configured({"precision": "fp32", "model": {"preset": "digits"}, "data": sizes}, overrides)
    model = digits_model(config.data.resolution, seed=0)
    return _workload("the quickstart's digits model", config, model, model.encode_no_prompt(), device)


def named_workload(name: str, device: torch.device, overrides: Sequence[str] = ()) -> Workload:
    """A published network with random weights in bf16 on a GPU; on a CPU a small one of its structure in float32.

    Raises:
        UserError: an unknown name; an override of the model other than its adapters, or one that the configuration
            refuses; a network that does not fit on the device.
    """
    if name not in NETWORKS:
        raise UserError(f"--network {name!r} is unknown: use one of {', '.join(NETWORKS)}")
    network, small = NETWORKS[name], device.type != "cuda"
    model = parts_of(network, small)
    side = SMALL_SIDE if small else model.default_resolution
    tree = {
        "precision": "fp32" if small else "bf16",
        **network.settings,
        "model": {"pretrained": network.hub_id, **network.settings.get("model", {})},
        "data": {"resolution": side, "batch_size": SMALL_BATCH_SIZE},
    }
    config = _configured(tree, overrides)
    if not small and not any(override.startswith(("data.batch_size=", "data.microbatch=")) for override in overrides):
        data = {"batch_size": batch_size(network, config, model, torch.cuda.get_device_properties(device).total_memory)}
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    lora = f", LoRA of rank {config.model.lora.rank}" if config.model.lora else ""
    title = f"{network.title}{', small' if small else ''}, random weights{lora}"
    model = model.for_training(config.model.prediction or "keep")
    return _workload(title, config, model, model.encode_ids(*placeholder_ids(1, model)), device)


def workload_of(file: Path, device: torch.device, overrides: Sequence[str] = ()) -> Workload:
    """The model and the settings of a configuration file, at the size of a microbatch, with random weights: speed does
    not depend on them. `UserError` for what cannot be loaded.
    """
    config = _one_microbatch(load_config(file, overrides))
    model = initial_model(config)
    return _workload(str(file), config, model, model.encode_no_prompt(), device)


def batch_size(network: Network, config: Config, model: TextToImageModel, total_memory: int) -> int:
    """The largest power of two, up to 32, that fits beside the state of two providers.

    Raises:
        UserError: none does.
    """
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    # The base of adapters is held once by fastsp's step, twice by Algorithm 1, in bfloat16
    state = weights * (2 * BYTES_PER_WEIGHT if config.model.lora is None else 3 * 2)
    scale = (config.data.resolution / model.default_resolution) ** 2
    room = total_memory - state
    for size in (32, 16, 8, 4, 2, 1):
        if size * scale * network.sample_gib * GIB <= room:
            return size
    raise UserError(
        f"{network.title} does not fit: two steps to compare hold {state / GIB:.0f} GiB beside their activations, "
        f"and this GPU has {total_memory / GIB:.0f}; use adapters, a smaller data.resolution or a data.batch_size"
    )


def _configured(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    """A run as the paper describes it."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.split(".")[0] == "model" and not key.startswith(("model.lora", "model.flow")):
            raise UserError(f"{override}: without --config fastsp bench uses its own model; give a run's file")
    run = {
        "run_dir": "runs/bench",
        "stages": [
            {"name": "mse", "objective": "mse", "steps": 1, "learning_rate": 3e-5},
            {"name": "sp", "objective": "self_perceptual", "steps": 1, "learning_rate": 3e-5},
        ],
    }
    data = {"source": "digits", **tree["data"]}
    return _one_microbatch(config_of({**run, **tree, "data": data}, overrides, "fastsp bench"))


def _workload(
    name: str, config: Config, model: TextToImageModel, empty: Conditioning, device: torch.device
) -> Workload:
    """Of a model, whose weights may go, and the features of one prompt, of which the length counts."""
    latent_shape = model.latent_shape(config.data.resolution)
    length, width = empty.encoder_hidden_states.shape[1], family_of(model.network).text_widths(model.network.config)[0]
    pipeline = model.scheduler, model.kind.name
    return Workload(name, config, full_config(model.network), *pipeline, latent_shape, (length, width), device)


def _one_microbatch(config: Config) -> Config:
    """The other providers take the whole batch at once, so ours does too."""
    data = config.data
    update = {"batch_size": data.microbatch or data.batch_size, "microbatch": None}
    return config.model_copy(update={"data": data.model_copy(update=update)})

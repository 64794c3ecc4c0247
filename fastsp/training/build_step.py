"""The step of a stage, built from its networks: cast, placed, sharded, compiled, with optimizer and moving average."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsp.config import Config
from fastsp.diffusion.conditioning import Conditioning
from fastsp.families import compile_network, family_of
from fastsp.models import TextToImageModel
from fastsp.models.attention import Kernel, use_attention
from fastsp.objectives import StageConfig
from fastsp.perceptual import cast, shared_copy
from fastsp.training.compilation import compile_options
from fastsp.training.distributed import ALONE, Ranks
from fastsp.training.optimizer import Optimizer
from fastsp.training.parallel import gather_gradients, shard
from fastsp.training.placement import on_host
from fastsp.training.step import COMPUTE_DTYPES, TrainingStep
from fastsp.training.update import update_of


def build_step(
    config: Config,
    stage: StageConfig,
    model: TextToImageModel,
    empty: Conditioning,
    *,
    initial: Any,
    frozen_network: Any,
    ranks: Ranks = ALONE,
    attention: Kernel = "sdpa",
) -> tuple[TrainingStep, Any]:
    """The step of a stage and the float32 network of its moving average, on the device of ``empty``.

    Args:
        config, stage, model, empty: see :class:`TrainingStep`.
        initial: the network that the stage starts from; it becomes the online network.
        frozen_network: the one that the objective's perceptual network is copied from, may be ``initial``; None where
            it needs none. Every rank holds the whole perceptual network.
        ranks: the processes of the run.
        attention: the kernel of both, see :mod:`fastsp.models.attention`.
    """
    device, dtype = empty.encoder_hidden_states.device, COMPUTE_DTYPES[config.precision]
    sharded = ranks.world_size > 1 and config.distributed == "fsdp"

    def placed(module: Any, dtype: torch.dtype) -> Any:
        return cast(module, dtype).to(device).to(memory_format=torch.channels_last)

    ema_network = _moving_average(initial)
    for used in (initial, frozen_network):  # not the average: samples are drawn with it in float32
        if used is not None:
            use_attention(used, attention)
    process = model.training_process
    objective = resolve_name(stage.loss)(stage, process, frozen_network)  # copies before `initial` is cast
    objective = placed(objective, dtype)
    if config.gradient_checkpointing:
        checkpoint_activations(initial)
    options = compile_options(config, device, channels_last=True) if config.compiles_on(device) else None
    if sharded:
        network = shard(
            cast(initial.train(), torch.float32), device, dtype, options and compile_options(config, device)
        )
        ema_network = shard(ema_network, device, torch.float32)
    else:
        network = placed(initial, dtype).train()
        ema_network = _placed_average(ema_network, network, device, config.ema.place)
        if options is not None:
            compile_network(network, **options)
    if options is not None and objective.self_perceptual is not None:
        objective.self_perceptual.compile_teacher(**options)
    if options is not None and device.type != "cpu":  # on a CPU PyTorch's own operators do
        family = family_of(initial)
        for module in (objective,) if sharded else (objective, network):
            family.keep_channels_last(module)
    place, averaged = config.ema.place, None if config.ema.place == "none" else ema_network
    optimizer = Optimizer(network, averaged, config.optimizer, update_of(config), ema_on_host=place == "host")
    if averaged is None:
        optimizer.lend_masters(ema_network)
    gradients = gather_gradients(network, optimizer, ranks)
    return TrainingStep(config, stage, gradients, objective, model, empty), ema_network


def checkpoint_activations(network: Any) -> None:
    """Keep only what goes into each block and compute its inside again in the backward (Chen et al., arXiv 1604.06174).

    The state of torch's generators is saved only where there is dropout: a CUDA graph cannot be recorded through it.
    """
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())

    def checkpointed(module: Any, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=random)

    network.enable_gradient_checkpointing(checkpointed)


def _moving_average(initial: Any) -> Any:
    """The network of the moving average: what is trained in float32, what is frozen shared with ``initial``."""
    average = shared_copy(initial).eval()
    for parameter in average.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return average.requires_grad_(False)


def _placed_average(average: Any, network: Any, device: torch.device, place: str) -> Any:
    """On the device, its trained weights in the host's memory or, where masters will stand for them, nowhere."""
    average.to(memory_format=torch.channels_last)
    if place == "device":
        return average.to(device)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    held = {p: p.data for name, p in average.named_parameters() if name in trained}
    for parameter, data in held.items():
        parameter.data = data.new_empty(0)
    average.to(device)
    if place == "host":
        for parameter, data in held.items():
            parameter.data = on_host(data, device)
    return average

"""What a run needs of memory and disk, counted: its own step on PyTorch's meta device, which has shapes and no values.

Nothing is downloaded, computed or allocated. Every storage that an operator makes is counted until it is freed, in
blocks of 512 bytes as PyTorch's allocator for GPUs hands them out. Attention is counted as a fused kernel, which a GPU
has. Not counted: the GPU's own context and libraries, fragmentation, a CUDA graph's pool, and what compiling saves.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5EncoderModel

from fastsp.config import Config
from fastsp.data.batch import Batch
from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.models import TextToImageModel
from fastsp.models.skeleton import META, preset_skeleton, skeleton
from fastsp.objectives import StageConfig
from fastsp.perceptual import shared_copy
from fastsp.training.build_step import build_step
from fastsp.training.step import TrainingStep

BLOCK_BYTES = 512
CLIP_LENGTH = 77  # tokens of one chunk of a caption
GIB = 1 << 30
STATE, AVERAGE = "optimizer's state", "moving average"
ENCODING, ACTIVATIONS, UPDATE = "text and VAE", "forward and backward", "update"


@dataclass(frozen=True)
class Needs:
    """Bytes that a run of one process needs on its device in one stage, and for a checkpoint."""

    parameters: int
    trained: int  # of them
    held: dict[str, int]
    """What lies there all the time, by what it is."""
    on_host: dict[str, int]
    """What lies in the host's memory instead."""
    gradients: int
    phases: dict[str, int]
    """The most that each part of a step has beside that, gradients and activations together."""
    checkpoint: int

    @property
    def most(self) -> int:
        """What is there at once at most."""
        return sum(self.held.values()) + max(self.phases.values())


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of storages that operators make: those ``now``, and the ``most`` since a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._live: set[int] = set()

    def mark(self) -> None:
        """Begin to look for the most anew."""
        self.most = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:  # no view, nor in place
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._live.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as GPUs' fused kernels have it, whose matrix of weights is never there; meta tensors take the other.

    By exchanging PyTorch's function, for modes are not active where checkpointed blocks are computed again.
    """
    own, operators = F.scaled_dot_product_attention, torch.ops.aten

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
        if attn_mask is None:
            return operators._scaled_dot_product_flash_attention(query, key, value)[0]
        mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return operators._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def needs(config: Config, stage: StageConfig, model: TextToImageModel) -> Needs:
    """What a run of one process needs in a stage, counted over a step.

    Args:
        config, stage: of the run.
        model: of :func:`fastsp.models.skeleton.skeleton`.
    """
    config = config.model_copy(update={"compile": False, "cuda_graph": False, "distributed": "ddp"})
    batch = _batch(config, model)
    with fused_attention():
        step = _step(config, stage, model)
        held = _held(step, model)
        settings = {STATE: config.optimizer.offload, AVERAGE: config.ema.place == "host"}
        on_host = {name: held.pop(name, 0) for name, is_there in settings.items() if is_there}
        if stage.frozen_network is not None:
            step(batch, 1)  # its first call traces the perceptual network
        with Allocations() as allocations:
            phases, gradients = _phases(step, batch, allocations)
    parameters = list(model.network.parameters())
    return Needs(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        held=held,
        on_host=on_host,
        gradients=gradients,
        phases=phases,
        checkpoint=_bytes(step.state.values(), set()),
    )


def skeleton_of(config: Config) -> TextToImageModel:
    """A run's model on the meta device; see :mod:`fastsp.models.skeleton`."""
    start = config.model
    if start.pretrained is None:
        assert start.preset is not None
        model = preset_skeleton(start.preset, config.data.resolution, **start.preset_sizes)
    else:
        model = skeleton(start.pretrained, start.lora.model_dump() if start.lora else None)
    flow = start.flow.model_dump() if start.flow else None
    return model.for_training(start.prediction or "v_zero_snr", flow).reading(start.token_chunks, start.clip_skip)


def report(config: Config, where: str, done: Mapping[str, int]) -> Iterator[str]:
    """The lines of `fastsp train --dry-run`; ``where`` names the configuration, and of each stage so many steps are
    ``done``. A stage without any left is not counted.

    Raises:
        UserError: the model's configuration is not on this machine, or its step cannot be taken without values.
    """
    model = skeleton_of(config)
    yield f"{where}: counted on the meta device; nothing was downloaded, and nothing was run"
    counted: dict[str, Needs] = {}
    for stage in config.stages:
        left = stage.steps - done.get(stage.name, 0)
        steps = f"{stage.steps:,} steps" if left == stage.steps else f"{left:,} of {stage.steps:,} steps left,"
        samples = left * config.data.batch_size
        yield f"stage {stage.name}: {steps} of {config.data.batch_size} samples, {samples:,} in all"
        if not left:
            continue
        try:
            counted[stage.name] = needs(config, stage, model)
        except RuntimeError as error:  # an operator that needs values, or that the meta device lacks
            reason = str(error).partition("\n")[0]
            raise UserError(f"{where}: stage {stage.name} cannot be counted on the meta device: {reason}") from error
    if not counted:
        yield "nothing is left to train"
        return
    first = next(iter(counted.values()))
    kind = type(model.network).__name__
    yield f"{kind}: {first.parameters / 1e6:,.1f} M parameters, of which {first.trained / 1e6:,.1f} M are trained"
    yield from _table(counted, config)
    if config.data.buckets != "off":
        yield "data.buckets: squares are counted; no other shape has more pixels"
    yield from _disk(config, max(one.checkpoint for one in counted.values()), first)
    yield "not counted: the GPU's context and libraries (some 1 GiB), fragmentation, a CUDA graph's pool, samples"
    if config.distributed == "fsdp":
        yield "distributed: fsdp shares most of this among the processes; these are the figures of one process alone"


def _table(counted: dict[str, Needs], config: Config) -> Iterator[str]:
    """One column for each stage, GiB."""
    rows = config.data.microbatch or config.data.batch_size

    def row(name: str, values: Iterable[int]) -> str:
        return f"  {name:34}" + "".join(f"{value / GIB:>14.2f}" for value in values)

    yield f"  {'memory, GiB':34}" + "".join(f"{name[:13]:>14}" for name in counted)
    for name in dict.fromkeys(name for one in counted.values() for name in one.held):
        yield row(name, (one.held.get(name, 0) for one in counted.values()))
    for name in next(iter(counted.values())).phases:
        told = f"+ {name}, {rows} samples" if name == ACTIVATIONS else f"+ {name}"
        yield row(told, (one.phases[name] for one in counted.values()))
    yield row("at once at most", (one.most for one in counted.values()))
    for name in next(iter(counted.values())).on_host:
        yield row(f"in the host's memory: {name}", (one.on_host[name] for one in counted.values()))


def _disk(config: Config, checkpoint: int, needs: Needs) -> Iterator[str]:
    """What is written in the run's folder."""
    settings, network = config.checkpoint, 4 * (needs.trained if config.model.lora else needs.parameters)
    kept = settings.keep + 1  # while one is written, none has gone yet
    if settings.keep_every is not None:
        kept += sum(stage.steps // settings.keep_every for stage in config.stages)
    stages = 2 * network * len(config.stages)  # averaged and raw
    final = network if config.model.lora else network + needs.held.get("text encoders", 0) + needs.held.get("VAE", 0)
    total = kept * checkpoint + stages + final
    place = next(
        folder
        for folder in (Path(config.run_dir).absolute(), *Path(config.run_dir).absolute().parents)
        if folder.is_dir()
    )
    yield (
        f"disk, GiB: {checkpoint / GIB:.2f} a checkpoint, up to {kept} of them; {stages / GIB:.2f} of stages/; "
        f"{total / GIB:.2f} in all, where {shutil.disk_usage(place).free / GIB:.2f} are free"
    )


def _step(config: Config, stage: StageConfig, model: TextToImageModel) -> TrainingStep:
    empty = model.encode_ids(*placeholder_ids(1, model))
    frozen = shared_copy(model.network) if stage.frozen_network else None
    step, _ = build_step(config, stage, model, empty, initial=shared_copy(model.network), frozen_network=frozen)
    return step


def _held(step: TrainingStep, model: TextToImageModel) -> dict[str, int]:
    """Every storage counts once, where it is found first."""
    seen: set[int] = set()
    optimizer, objective = step.optimizer, step.objective
    state = step.optimizer.state
    parts: dict[str, Iterable[Tensor]] = {
        "weights": _tensors(step.network),
        "master weights": [tensor for name, tensor in state.items() if name.startswith("master.")],
        STATE: optimizer.rule.held,
        AVERAGE: [tensor for name, tensor in state.items() if name.startswith("ema.")],
        "perceptual network": _tensors(objective),
        "critic": [] if step.critic is None else step.critic.state.values(),
        "text encoders": [tensor for part in model.text_encoders for tensor in _tensors(part)],
        "VAE": [] if model.vae is None else _tensors(model.vae),
    }
    return {name: size for name, tensors in parts.items() if (size := _bytes(tensors, seen))}


def _phases(step: TrainingStep, batch: Batch, allocations: Allocations) -> tuple[dict[str, int], int]:
    """Take a step; the most of each part of it, and the gradients at its end."""
    most = dict.fromkeys((ENCODING, ACTIVATIONS, UPDATE), 0)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        allocations.mark()
        yield
        most[name] = max(most[name], allocations.most)

    step.set_rates(2)
    loss = torch.zeros((), device=META)
    *others, last = batch.microbatches(step.config.data.microbatch)
    for microbatch in (*others[:1], last):  # all but the last are alike
        with phase(ENCODING):
            encoded = step.encoded(microbatch)
        with phase(ACTIVATIONS):
            loss += step.backward(encoded, last=microbatch is last)
        del encoded
    assert step.optimizer.gradients is not None
    gradients = _bytes(step.optimizer.gradients, set())
    with phase(UPDATE):
        step.update(loss)
    return most, gradients


def _batch(config: Config, model: TextToImageModel) -> Batch:
    """Empty samples of a process's share, with what the data source would give."""
    data, rows = config.data, config.data.batch_size
    channels, height, width = model.latent_shape(data.resolution)
    names = ("input_ids", "input_ids_2", "input_ids_3")
    fields: dict[str, Any] = dict(zip(names, placeholder_ids(rows, model), strict=False))
    if data.source == "latents":
        fields["moments"] = torch.empty(rows, 2 * channels, height, width, device=META)
    else:
        side = data.resolution
        fields["pixel_values"] = torch.empty(rows, model.channels, side, side, device=META)
    if family_of(model.network).takes_sizes(model.network.config):
        fields |= {
            name: torch.zeros(rows, 2, dtype=torch.int64, device=META) for name in ("original_sizes", "crop_offsets")
        }
    if data.masks:
        places = (height, width) if data.source == "latents" else (data.resolution, data.resolution)
        fields["masks"] = torch.empty(rows, *places, device=META)
    return Batch(
        positions=torch.arange(rows),
        weights=torch.ones(rows, device=META),
        captions=("",) * rows,
        **fields,
    )


def placeholder_ids(rows: int, model: TextToImageModel) -> list[Tensor]:
    """Token ids of so many captions, for each encoder of a skeleton, which has no tokenizers."""
    lengths = (
        model.kind.t5_tokens
        if isinstance(encoder, T5EncoderModel)
        else getattr(encoder.config, "max_position_embeddings", CLIP_LENGTH) * model.text.token_chunks
        for encoder in model.text_encoders
    )
    return [torch.zeros(rows, length, dtype=torch.int64, device=META) for length in lengths]


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of those storages that are not ``seen`` yet, and are then."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total

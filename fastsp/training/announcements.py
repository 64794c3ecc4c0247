"""The lines by which a run says what it trains, before its first step and before each stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastsp.config import EMAConfig
from fastsp.data.buckets import bucket_lines
from fastsp.data.repeats import repeats_lines, shares_of
from fastsp.data.source import Source
from fastsp.families import family_of
from fastsp.models import TextToImageModel
from fastsp.models.int8 import Int8Linear
from fastsp.models.schedulers import meaning_of
from fastsp.objectives import StageConfig
from fastsp.training.optimizer import trained_share

_MOSTLY = 0.9  # of an average: below it there is a word of advice
_NOTES = 3  # shown of what is damaged or may surprise in the data


def kind(network: Any) -> str:
    """What people call such a network."""
    part = family_of(network).part
    return "UNet" if part == "unet" else part


def size(network: Any) -> str:
    """The parameters of a network, and how many of them are trained."""
    total = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    share = f", {trained:,} of them adapters, which alone are trained" if trained < total else ""
    return f"{total / 1e6:.1f} M parameters{share}"


def about(model: TextToImageModel, source: Source, batch_size: int) -> Iterator[str]:
    """What a person may want to know of a run's model and data before it begins."""
    layers = [module for module in model.network.modules() if isinstance(module, Int8Linear)]
    if layers:
        weights = sum(layer.codes.numel() for layer in layers)
        yield f"base: {len(layers)} linear layers in its blocks, {weights / 1e6:.1f} M weights, are held in int8"
    yield _prediction(model)
    if not model.text.usual:
        yield _captions(model)
    if (times := batch_size / len(source)) > 1:
        yield f"data.batch_size {batch_size}: every sample occurs {times:.1f} times per step"
    if shares := shares_of(source.reader):
        yield f"repeats: an epoch has {len(source)} samples: {', '.join(repeats_lines(shares))}"
    if source.buckets is not None:
        lines = [*bucket_lines(source.buckets)]
        shapes, lost = lines[: len(source.buckets.shapes)], lines[len(source.buckets.shapes) :]
        yield "; ".join([f"buckets: {', '.join(shapes)} pictures (width x height)", *lost])
    told = [*source.reader.damaged, *source.reader.notes]
    yield from (f"note: {name}: {what}" for name, what in told[:_NOTES])
    if (more := len(told) - _NOTES) > 0:
        yield f"note: {more} more about the data; `fastsp data check` has them all"


def _prediction(model: TextToImageModel) -> str:
    """What is trained, and what that means for those who sample the result."""
    predicts, schedule = meaning_of(model.scheduler.config)
    line = f"the model is trained to predict {predicts} {schedule}"
    if model.loaded_prediction_type in (None, model.prediction_type):
        return line
    return f"{line}, and not {model.loaded_prediction_type} any more (model.prediction: keep would leave it)"


def _captions(model: TextToImageModel) -> str:
    """How captions become features, where it is not as usual."""
    tokens = model.text.token_chunks * (model.tokenizer.model_max_length - 2)
    layer = f", from layer {-model.text.clip_skip} of the text encoder" if model.text.clip_skip else ""
    return f"captions of up to {tokens} tokens{layer}; programs that sample the model have to do the same"


def headline(stage: StageConfig, done: int) -> str:
    """What a stage trains, from what, after how many updates."""
    steps = f"{stage.steps} step{'s' * (stage.steps != 1)}"
    start = f"from {stage.init}" if stage.init else "from the model's own weights"
    return f"stage {stage.name}: {stage.title}, {steps} {start}" + (f", {done} done" if done else "")


def average(ema: EMAConfig, steps: int) -> str:
    """What the moving average of a stage will consist of."""
    if ema.place == "none":
        return "no moving average: pictures, stages/ and final/ have the weights themselves"
    share = trained_share(ema, steps)
    text = f"moving average (EMA {ema.decay}): {share:.1%} of it will be weights of this stage's steps"
    if share > _MOSTLY:
        return text
    advice = "ema.warmup: true or a smaller ema.decay" if not ema.warmup else "a smaller ema.decay"
    return f"{text}, the rest the weights that it starts from; {advice} leaves less of those"

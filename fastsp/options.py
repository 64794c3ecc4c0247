"""The names that options of the losses take. Imports nothing, so that a configuration is read without torch."""

from typing import Any, Literal, get_args

Layers = Literal["mid", "encoder", "decoder", "encoder+mid"]
PredictionType = Literal["v_prediction", "epsilon", "sample"]  # diffusers' names
Keep = Literal["keep", "v_zero_snr"]  # what training makes of a model's own prediction type and noise schedule
Distance = Literal["mse", "mae"]
TimestepSampling = Literal["uniform", "normal", "offset", "same", "lower"]  # policies for t' (Table 4 of the paper)
FlowTimes = Literal["uniform", "logit_normal", "mode"]  # how the times of a flow are spread in training
Teacher = Literal["batched", "split"]
Normalize = Literal["none", "sample", "channel"]
Anchor = Literal["self_perceptual", "mse"]  # what a critic's share is added to
Displacement = Literal["none", "normalized"]
Reduction = Literal["mean", "none"]
OPTIMIZERS: dict[str, Any] = {  # of `optimizer.kind`: a class, or the name of one that is imported late
    "adamw": "fastsp.training.update:AdamW",
    "adafactor": "fastsp.training.adafactor:Adafactor",
    "adamw8bit": "fastsp.training.adamw8bit:AdamW8bit",
    "muon": "fastsp.training.muon:Muon",
    "prodigy": "fastsp.training.prodigy:Prodigy",
}


def one_of(name: str, value: Any, allowed: Any) -> Any:
    """``value``, if the Literal type ``allowed`` has it.

    Raises:
        ValueError: it has not; the message names all three.
    """
    if value not in get_args(allowed):
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(get_args(allowed))}")
    return value

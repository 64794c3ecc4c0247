"""The names that options of the losses take. Imports nothing, so that a configuration is read without torch."""

from typing import Literal, get_args

Layers = Literal["mid", "encoder", "decoder", "encoder+mid"]
LAYERS: tuple[str, ...] = get_args(Layers)
Distance = Literal["mse", "mae"]
TimestepSampling = Literal["uniform", "normal", "offset"]  # policies for t' (Table 4 of the paper)
Teacher = Literal["batched", "split"]
Reduction = Literal["mean", "none"]

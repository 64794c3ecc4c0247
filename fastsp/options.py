"""The names that options of the losses take. Imports nothing, so that a configuration is read without torch."""

from typing import Literal, get_args

Layers = Literal["mid", "encoder", "decoder", "encoder+mid"]
LAYERS: tuple[str, ...] = get_args(Layers)
PredictionType = Literal["v_prediction", "epsilon", "sample"]  # diffusers' names
Distance = Literal["mse", "mae"]
TimestepSampling = Literal["uniform", "normal", "offset"]  # policies for t' (Table 4 of the paper)
Teacher = Literal["batched", "split"]
Normalize = Literal["none", "sample", "channel"]
Displacement = Literal["none", "normalized"]
Reduction = Literal["mean", "none"]
OPTIMIZERS = {"adamw", "muon"}  # of `optimizer.kind`; fastsp.training.update registers more

"""The typed configuration of a run: what `fastsp train --config FILE key=value ...` reads.

Every section forbids unknown keys and converts nothing silently: a mistake is one clear line, not a run with the
wrong setting. Units and defaults stand beside the keys; `docs/config.md` has them for users. Nothing here imports
torch: a mistake is answered in a second.
"""

# ruff: noqa: RUF012 - pydantic copies defaults

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from fastsp.config_epochs import in_steps
from fastsp.config_mistakes import as_one_line, mistakes
from fastsp.config_text import apply_override, dump_yaml, parse_yaml
from fastsp.data.config import DataConfig as DataConfig
from fastsp.errors import UserError
from fastsp.objectives import SelfPerceptualStage, Stage, StageConfig
from fastsp.options import OPTIMIZERS, FlowTimes, Keep
from fastsp.utils.files import read_text
from fastsp.utils.section import (
    AboveZero,
    Decay,
    Fraction,
    NonNegative,
    PathText,
    PictureSize,
    Positive,
    Section,
    is_reading,
)

if TYPE_CHECKING:
    import torch

Auto = Literal["auto", True, False]
Width = Annotated[int, Field(ge=16, multiple_of=16)]  # whole attention heads


class LoRAConfig(Section):
    """Low-rank adapters: they alone are trained and saved, the base stays as it is. See :mod:`fastsp.models.lora`."""

    rank: Positive = 16
    alpha: AboveZero | None = None  # the adapters' scale is alpha / rank; None: the rank
    target_modules: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0"]  # ends of names
    base_precision: Literal["int8"] | None = None  # of the base's linear layers in blocks; None: as `precision`

    @model_validator(mode="after")
    def _scale_of_one(self) -> Self:
        if self.alpha is None:
            self.alpha = float(self.rank)
        return self


class UNetConfig(Section):
    """The size of a preset's UNet."""

    block_out_channels: Annotated[list[Width], Field(min_length=1)] = [32, 64]  # of each block, from the image down
    layers_per_block: Positive = 1


class DiTConfig(Section):
    """The size of a preset's transformer."""

    width: Width = 64  # of a token
    depth: Positive = 4  # blocks
    patch_size: Positive = 2  # side of a token's patch, pixels


class FlowConfig(Section):
    """How training spreads the times of a flow; see :meth:`fastsp.diffusion.process.RectifiedFlow.training`."""

    times: FlowTimes = "logit_normal"
    logit_mean: float = 0.0  # of logit_normal; positive: more noise
    logit_std: AboveZero = 1.0
    mode_scale: float = 1.29  # of mode
    shift: AboveZero | None = None  # None: as the pipeline samples images of the same size


class ModelConfig(Section):
    """Where the model comes from: exactly one of the first two."""

    preset: Literal["digits", "photographs"] | None = None
    pretrained: PathText | None = None  # a diffusers folder, a hub id, or a single file
    config: PathText | None = None  # of such a file: a folder or hub id with what it lacks; None: diffusers' choice
    network: Literal["unet", "dit"] | None = None  # of a preset; None: unet
    unet: UNetConfig | None = None  # of a preset; None: its own size
    dit: DiTConfig | None = None  # the same with network: dit
    flow: FlowConfig | None = None  # of models that are trained on a flow; None: its defaults
    lora: LoRAConfig | None = None  # None: all weights of the network are trained
    # None: keep with lora, else v_zero_snr; `config.yaml` has the outcome, and None of a flow, which stays what it is
    prediction: Keep | None = None
    token_chunks: Positive | None = None  # of 75 tokens, that a caption may have; None: the model's own, else one
    clip_skip: Positive | None = None  # the text encoders' layer, from the last one; None: the model's own, else usual

    @model_validator(mode="after")
    def _exactly_one(self, info: ValidationInfo) -> Self:
        if is_reading(info):  # runs from before there was this key converted adapters too
            self.prediction = self.prediction if "prediction" in self.model_fields_set else "v_zero_snr"
        elif self.prediction is None:
            self.prediction = "keep" if self.lora is not None else "v_zero_snr"
        if (self.preset is None) == (self.pretrained is None):
            raise ValueError("give either preset or pretrained")
        for key in ("network", "unet", "dit"):
            if getattr(self, key) is not None and self.preset is None:
                raise ValueError(f"{key} goes with preset")
        if self.preset is not None and getattr(self, "unet" if self.network == "dit" else "dit") is not None:
            raise ValueError(f"{'unet goes' if self.network == 'dit' else 'dit goes'} with another network")
        if self.flow is not None and self.preset is not None and self.network != "dit":
            raise ValueError("flow goes with network: dit")
        if self.preset is not None and (self.token_chunks or self.clip_skip):
            raise ValueError("token_chunks and clip_skip go with pretrained")
        if self.config is not None and self.pretrained is None:
            raise ValueError("config goes with pretrained")
        if self.lora is not None and self.pretrained is None:
            raise ValueError("lora adapts a pretrained model; a preset starts from random weights")
        return self

    @property
    def preset_sizes(self) -> dict[str, Any]:
        """The keywords of :func:`fastsp.models.preset_model`: the network and what is said of its size."""
        sized = self.dit if self.network == "dit" else self.unet
        return {"network": self.network or "unet", **(sized.model_dump() if sized else {})}


class ProdigyConfig(Section):
    """How Prodigy estimates the distance d to the solution, by which it multiplies the learning rate."""

    d0: AboveZero = 1e-6  # the first estimate
    d_coef: AboveZero = 1.0  # factor of the estimate
    growth_rate: Annotated[float, Field(gt=1.0)] | None = None  # largest growth of d in a step; None: any
    bias_correction: bool = False  # as Adam's
    safeguard_warmup: bool = False  # leave the learning rate out of the estimate: with a warm-up


class AdafactorConfig(Section):
    """Adafactor's own settings, by the names of `transformers`. By default the learning rate is the stage's."""

    scale_parameter: bool = False  # multiply the rate by the root mean square of each weight
    relative_step: bool = False  # multiply it by min(0.01, 1 / sqrt(step)): the stage's rate is then a factor
    warmup_init: bool = False  # with relative_step: by 1e-6 step in place of 0.01
    clip_threshold: AboveZero = 1.0  # largest root mean square of a weight's step before the rate
    decay_rate: Annotated[float, Field(lt=0.0)] = -0.8  # the second moments keep 1 - step ** decay_rate of themselves
    beta1: Decay | None = None  # of a first moment, 4 bytes per weight; None: there is none
    eps: Annotated[list[AboveZero], Field(min_length=2, max_length=2)] = [1e-30, 1e-3]  # of squares; least scale

    @model_validator(mode="after")
    def _warmup_of_relative_steps(self) -> Self:
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init goes with relative_step: true")
        return self


class OptimizerConfig(Section):
    """The optimizer; its state and the warm-up of the learning rate start anew in every stage."""

    kind: str = "adamw"  # a key of `fastsp.options.OPTIMIZERS`; see :mod:`fastsp.training.update`
    adafactor: AdafactorConfig = AdafactorConfig()
    prodigy: ProdigyConfig = ProdigyConfig()
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: AboveZero = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: AboveZero | None = 1.0  # largest norm of the whole gradient
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # the last two reach 0 after the stage's last step
    offload: bool = False  # keep AdamW's moments in the host's memory
    max_skipped: Positive = 20  # updates in a row whose gradient is not finite; then the run stops

    @model_validator(mode="after")
    def _adafactor_has_its_own(self) -> Self:
        fields = type(self).model_fields
        if self.kind == "adafactor" and any(getattr(self, key) != fields[key].default for key in ("betas", "eps")):
            raise ValueError("betas and eps are not adafactor's: use adafactor.beta1, .decay_rate and .eps")
        return self


class EMAConfig(Section):
    """Exponential moving average of the weights; each stage restarts its own."""

    place: Literal["device", "host", "none"] = "device"  # host: in the CPU's memory; none: no average, raw weights
    decay: Decay = 0.9995
    warmup: bool = True  # the decay of step n of a stage is at most (1 + n) / (10 + n): a short stage forgets its start


class CheckpointConfig(Section):
    """When to save, and which checkpoints stay."""

    every: Positive = 500  # steps
    keep: Positive = 3  # newest ones
    keep_every: Positive | None = None  # steps of a stage: those saved at a multiple of it stay for good
    asynchronous: bool = True  # write while the training goes on; a step waits only for a copy to the CPU


class WandbConfig(Section):
    """The Weights & Biases run that a run is logged to; a resumed run goes on with its own."""

    project: str
    entity: str | None = None
    name: str | None = None  # None: the run directory's
    group: str | None = None
    tags: list[str] = []
    mode: Literal["online", "offline"] = "online"


class LogConfig(Section):
    """How often a line goes to `metrics.jsonl` and TensorBoard, and where else."""

    every: Positive = 10  # steps
    wandb: WandbConfig | None = None


class SamplesConfig(Section):
    """Grids made during training, always from the same noise, with the EMA weights; the first one before it."""

    every: NonNegative = 500  # steps; 0: only at the end of a stage
    prompts: list[str] | None = None  # None: captions of the data
    guidance: Annotated[float, Field(ge=0.0)] = 0.0  # scale of classifier-free guidance; 0 and 1: none
    rescale: Fraction = 0.0  # of the guidance
    negative_prompt: str = ""  # what guidance leads away from
    resolution: PictureSize | None = None  # side, or width and height, in pixels; None: data.resolution
    count: Positive = 20  # images in a grid
    steps: Positive = 25  # of DDIM, or on a flow Euler's
    seed: int = 0

    @property
    def shape(self) -> int | tuple[int, int] | None:
        """`resolution` as the models take it: the side, or height and width."""
        return (self.resolution[1], self.resolution[0]) if isinstance(self.resolution, list) else self.resolution


class ValidationConfig(Section):
    """The loss on held-out samples with fixed noise and timesteps; see :mod:`fastsp.training.validation`."""

    every: NonNegative = 0  # steps of a stage, besides its start and its end; 0: never
    path: PathText | list[PathText] | None = None  # like data.path; None: evaluation.heldout. The digits have a split
    samples: Positive = 64  # evenly spread over the held-out data
    batch_size: Positive = 8  # samples of one forward


class GuidanceConfig(Section):
    """Rows of the evaluation with classifier-free guidance, at the first of the step counts."""

    stages: list[str] | None = None  # None: all
    scale: float
    rescale: Fraction = 0.0


class EvaluationConfig(Section):
    """What the finished run is measured by; see :mod:`fastsp.evaluation`."""

    enabled: Auto = "auto"  # auto: for the digits, and if heldout or captions is set; `config.yaml` has the outcome
    num_samples: Positive = 500  # of one row
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0, 1, 2]  # of the initial noise
    steps: Annotated[list[Positive], Field(min_length=1)] = [25, 50]  # of the sampler, in rows without guidance
    guidance: list[GuidanceConfig] = []
    unconditional: bool = True  # every stage with the empty prompt too, at the first step count
    batch_size: Positive | None = None  # samples made at once; None: 256, or 16 where a VAE decodes them
    features: PathText = "classifier"  # or an Inception-v3 safetensors file
    clip: PathText | None = None  # a folder with a CLIP, for the CLIP score of samples and their captions; None: none
    heldout: PathText | list[PathText] | None = None  # like data.path; the digits have their own split
    captions: PathText | None = None  # COCO's captions_val2014.json, or a text file: the first num_samples
    reference: PathText | None = None  # goes with it: a folder of real images, or statistics saved by `fastsp eval`


class Config(Section):
    """A whole run. See `configs/quickstart.yaml`."""

    run_dir: PathText
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 computes in bf16 and keeps float32 master weights
    compile: Auto = "auto"  # torch.compile; auto: on a GPU
    compile_mode: Literal["default", "max-autotune"] = "default"  # the latter tries more kernels, for minutes
    deterministic: bool = False  # on a GPU too the same bits every time, for some speed; a CPU's are so anyway
    gradient_checkpointing: bool = False  # less memory for activations, the online forward runs twice
    cuda_graph: Auto = "auto"  # the whole step in one CUDA graph; auto: on a GPU
    attention: str = "auto"  # or sdpa, cudnn, flash, efficient, xformers, math; auto: the fastest, measured on a GPU
    distributed: Literal["ddp", "fsdp"] = "ddp"  # of many processes: the network replicated, or sharded
    distributed_timeout: AboveZero = 1800.0  # seconds that one may keep the others waiting
    model: ModelConfig
    data: DataConfig
    stages: Annotated[list[Stage], Field(min_length=1)]
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    samples: SamplesConfig = SamplesConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    final: str | None = None  # the stage whose EMA weights become final/; None: the last one

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, tree: Any, info: ValidationInfo) -> Any:
        """Runs from before there were transformers spelled out what a UNet has by default."""
        return without_defaults(tree) if is_reading(info) and is_from_before_flows(tree) else tree

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        reading = is_reading(info)
        if self.evaluation.enabled == "auto":
            named = self.evaluation.heldout is not None or self.evaluation.captions is not None
            enabled = named or self.data.source == "digits"
            self.evaluation = self.evaluation.model_copy(update={"enabled": enabled})
        if faults := [*self._stage_faults(reading), *self._other_faults(reading)]:
            raise ValueError("\n".join(faults))
        return self

    def _stage_faults(self, reading: bool) -> Iterator[str]:
        """What is wrong with the stages' names for each other. Defaults that depend on other stages are filled in."""
        seen: list[str] = []
        for index, stage in enumerate(self.stages):
            where = f"stages.{index}"
            if stage.name in seen:
                yield f"{where}.name: {stage.name!r} is taken by an earlier stage"
            if stage.name == self.model.pretrained and not reading:
                yield f"{where}.name: {stage.name!r} is model.pretrained too: give the stage another name"
            if stage.init is None:
                stage.init = seen[-1] if seen else None
            elif stage.init not in seen:
                yield f"{where}.init: {stage.init!r} is no earlier stage; {_earlier(seen)}"
            if isinstance(stage, SelfPerceptualStage):
                if stage.critic is not None and self.data.batch_size == 1:
                    yield f"{where}.critic: needs a data.batch_size of at least 2"
                if stage.perceptual_network is None:
                    stage.perceptual_network = stage.init or self.model.pretrained
                if not reading and (fault := self._network_fault(stage.perceptual_network, seen)):
                    yield f"{where}.perceptual_network: {fault}"
            seen.append(stage.name)
        if self.final is None:
            self.final = seen[-1]
        elif self.final not in seen:
            yield f"final: {self.final!r} is no stage; stages are {', '.join(seen)}"

    def _network_fault(self, network: str | None, earlier: list[str]) -> str | None:
        """What is wrong with a perceptual network; None: nothing."""
        if network is None:
            return "a preset is untrained: put a stage of objective mse before this one"
        folder = Path(network)
        if network in earlier:
            if any((folder / file).is_file() for file in ("config.json", "unet/config.json")):
                return f"{network!r} is a stage, and a folder with a model too: rename the stage, or write ./{network}"
        elif network in (stage.name for stage in self.stages):
            return f"{network!r} is no earlier stage; {_earlier(earlier)}"
        elif network != self.model.pretrained and not folder.is_dir():
            return f"{network!r} is neither an earlier stage nor a folder; {_earlier(earlier)}"
        return None

    def _other_faults(self, reading: bool) -> Iterator[str]:
        if self.optimizer.kind not in OPTIMIZERS and not reading:
            allowed = ", ".join(sorted(OPTIMIZERS))
            yield f"optimizer.kind: {self.optimizer.kind!r} is not allowed: input should be {allowed}"
        if self.optimizer.offload and self.optimizer.kind != "adamw":
            yield f"optimizer.offload: is for optimizer.kind adamw, and this is {self.optimizer.kind}"
        for key, inside in (
            ("optimizer.offload: true", self.optimizer.offload),
            ("ema.place", self.ema.place != "device"),
        ):
            if inside and self.distributed == "fsdp":
                yield f"{key}: is not possible with distributed: fsdp, where every process holds its share alone"
            elif inside and self.cuda_graph is True and (key != "ema.place" or self.ema.place == "host"):
                yield f"{key}: moves memory between host and device, which cuda_graph: true cannot; use auto"
        if self.distributed == "fsdp" and self.model.lora is not None:
            yield "distributed: 'fsdp' is for training all weights; model.lora takes ddp"
        if self.samples.guidance in (0.0, 1.0) and (self.samples.negative_prompt or self.samples.rescale):
            yield "samples.guidance: is off, and samples.negative_prompt and samples.rescale change nothing without it"
        if self.validation.every and self.validation_data is None:
            yield "validation.path: is missing: held-out data of the same kind as data.path"
        data = self.data
        if data.microbatch is not None and data.batch_size % data.microbatch:
            yield f"data.microbatch: {data.microbatch} does not divide data.batch_size, which is {data.batch_size}"

        if data.masks and any(getattr(stage, "critic", None) is not None for stage in self.stages):
            yield "data.masks: true does not go with a critic, which judges whole pictures"

    def check_world_size(self, world_size: int) -> None:
        """Raises a UserError if a batch cannot be split evenly over so many processes."""
        data = self.data
        shared_by = world_size * (data.microbatch or 1)
        if data.batch_size % shared_by:
            microbatch = f" x data.microbatch {data.microbatch}" if data.microbatch else ""
            raise UserError(
                f"data.batch_size: {data.batch_size} must be a multiple of {shared_by} "
                f"({world_size} processes{microbatch}); it is of one optimizer step, over all processes"
            )

    def held_out(self, path: str | list[str] | None) -> DataConfig | None:
        """The data section of square samples that are not trained on: the digits' own, or of a path; None: no path."""
        if self.data.source == "digits":
            return self.data.model_copy(update={"split": "heldout", "buckets": "off"})
        return None if path is None else self.data.model_copy(update={"path": path, "buckets": "off"})

    @property
    def validation_data(self) -> DataConfig | None:
        """That of the validation, cropped at the center, to the training's shapes, and not mirrored."""
        data = self.held_out(self.validation.path or self.evaluation.heldout)
        still = {"crop": "center", "flip": False, "max_bad_fraction": 1.0, "buckets": self.data.buckets}
        return None if data is None else data.model_copy(update=still)

    def first_position(self, stage: StageConfig) -> int:
        """Where in the run's samples a stage starts: where its `init` stopped, so SP and its control see the same.

        A repetition starts as many of its own lengths later: it has samples, noise and timesteps of its own.
        """
        steps = stage.repetition * stage.steps
        while stage.init is not None:
            stage = self.stage(stage.init)
            steps += (stage.repetition + 1) * stage.steps
        return steps * self.data.batch_size

    def compiles_on(self, device: torch.device) -> bool:
        """Whether `compile` asks for it there; auto: on a GPU."""
        return device.type == "cuda" if self.compile == "auto" else self.compile

    def captures_on(self, device: torch.device) -> bool:
        """Whether `cuda_graph` asks for it there; auto: on a GPU.

        Raises:
            UserError: it is asked for elsewhere.
        """
        if self.cuda_graph is True and device.type != "cuda":
            raise UserError(f"cuda_graph: true needs a CUDA device, and this run is on the {device.type}; use auto")
        return device.type == "cuda" if self.cuda_graph == "auto" else self.cuda_graph

    def steps_before(self, stage: StageConfig) -> int:
        """Updates of the stages that come before a stage in the run."""
        return sum(earlier.steps for earlier in self.stages[: self.stages.index(stage)])

    def steps_done(self, stage: StageConfig, reached: int) -> int:
        """Updates of a stage among the first so many of the run."""
        return min(max(reached - self.steps_before(stage), 0), stage.steps)

    def stage(self, name: str) -> StageConfig:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def of_flow(self) -> Config:
        """The same without ``model.prediction``, which a model that is trained on a flow does not have."""
        return self.model_copy(update={"model": self.model.model_copy(update={"prediction": None})})

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`dump`, in hexadecimal."""
        return hashlib.sha256(self.dump().encode()).hexdigest()

    def dump(self) -> str:
        """The whole configuration as YAML, defaults included: what `config.yaml` of a run holds."""
        return dump_yaml(self.model_dump(mode="json"))


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration that is to be run, with overrides such as ``stages.0.steps=20``.

    Raises:
        UserError: no such file, broken YAML, unknown keys, wrong types or values, a perceptual network that is not
            there. One line names every mistake.
    """
    return config_of(_tree(file), overrides, str(file))


def read_config(file: Path) -> Config:
    """Read the `config.yaml` of a run that began: the folders that it names may be gone since.

    Raises:
        UserError: as of :func:`load_config`, but for what is on the disk.
    """
    return config_of(_tree(file), (), str(file), reading=True)


def config_of(tree: dict[str, Any], overrides: Sequence[str], where: str, reading: bool = False) -> Config:
    """A configuration from plain values, which are changed by the overrides; ``where`` names them in errors.

    Raises:
        UserError: see :func:`load_config` and, of a run's own file (``reading``), :func:`read_config`.
    """
    found: list[str] = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except UserError as error:
            found.append(str(error))
    try:
        in_steps(tree)
        config = Config.model_validate(tree, context={"reading": reading})
    except UserError as error:  # of the data, whose size was wanted
        found.append(str(error))
    except ValidationError as error:
        found += mistakes(error, Config)
    if found:
        raise UserError(f"{where}: {as_one_line(found)}")
    return config


def _tree(file: Path) -> dict[str, Any]:
    tree = parse_yaml(read_text(file, f"configuration file {file}"), str(file))
    if not isinstance(tree, dict):
        raise UserError(f"{file} is empty or no mapping: a configuration has keys such as run_dir, model, data, stages")
    return tree


def is_from_before_flows(tree: Any) -> bool:
    """Whether a run's configuration is of a version that trained UNets alone."""
    return isinstance(tree, dict) and "flow" not in (tree.get("model") or {})


def without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose stages do not spell out what a UNet has by default."""
    ours = {"normalize": ("none", False), "displacement": ("none",)}
    stages = [
        {key: value for key, value in stage.items() if value not in ours.get(key, ())}
        if isinstance(stage, dict)
        else stage
        for stage in tree.get("stages") or []
    ]
    return {**tree, "stages": stages}


def _earlier(names: list[str]) -> str:
    return f"earlier stages are {', '.join(names)}" if names else "there is no earlier stage"

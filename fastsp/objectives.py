"""The stages of a run as the configuration has them, one kind for each objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

from fastsp.options import Anchor, Displacement, Distance, Layers, Normalize, Teacher, TimestepSampling
from fastsp.utils.section import AboveZero, Name, NonNegative, PathText, Positive, Section, is_reading

OBJECTIVES: dict[str, type[StageConfig]] = {}
S = TypeVar("S", bound="StageConfig")


def register(kind: type[S]) -> type[S]:
    """Decorate a stage to make it known under the name that the Literal of its ``objective`` gives."""
    OBJECTIVES[get_args(kind.model_fields["objective"].annotation)[0]] = kind
    return kind


def _known(objective: str) -> str:
    if objective not in OBJECTIVES:
        raise ValueError(f"input should be {' or '.join(map(repr, OBJECTIVES))}")
    return objective


def _named(normalize: Any) -> Any:
    """True and False, as earlier versions had it."""
    return ("sample" if normalize else "none") if isinstance(normalize, bool) else normalize


FeatureNormalization = Annotated[Normalize, BeforeValidator(_named)]
Depth = Annotated[float, Field(gt=0.0, lt=1.0)]


class StageConfig(Section):
    """One stage: an objective for some steps, from the weights of the stage before or of another one.

    A new objective is a subclass with its own keys, decorated with :func:`register`.
    """

    loss: ClassVar[str] = "fastsp.training.objective:Objective"  # imported late, for it needs torch

    name: Name
    objective: Annotated[str, AfterValidator(_known)]
    steps: Positive  # optimizer steps
    learning_rate: AboveZero
    init: str | None = None  # a stage whose EMA weights it starts from; None: the stage before
    repetition: NonNegative = 0  # the n-th one sees the samples, noise and timesteps after those of the one before

    @property
    def title(self) -> str:
        """What the screen calls the objective."""
        return self.objective

    @property
    def frozen_network(self) -> str | None:
        """The stage, folder or model whose frozen network the loss takes; None: it needs none."""
        return None


@register
class MSEStage(StageConfig):
    """Mean squared error of the prediction."""

    objective: Literal["mse"]
    min_snr_gamma: AboveZero | None = None

    @property
    def title(self) -> str:
        return "MSE"


class CriticConfig(Section):
    """Heads on the frozen network's features that learn in the loop; see :mod:`fastsp.perceptual.critic`."""

    weight: Annotated[float, Field(ge=0.0)] = 0.02  # of their share in the network's loss
    heads: Positive = 128  # channels of their hidden layers
    learning_rate: AboveZero = 1e-3  # theirs; its warm-up and schedule are the network's
    warmup_steps: NonNegative = 100  # in which they learn alone: the network does not feel them yet
    anchor: Anchor = "self_perceptual"  # what their share is added to


@register
class SelfPerceptualStage(StageConfig):
    """The self-perceptual loss; see :class:`fastsp.loss.SelfPerceptualLoss`."""

    objective: Literal["self_perceptual"]
    min_snr_gamma: AboveZero | None = None  # of the share that mse_weight adds
    perceptual_network: PathText | None = None  # an earlier stage, or a folder with a network; None: `init`
    layers: Layers | Depth | Annotated[list[Positive], Field(min_length=1)] = "mid"  # a transformer's: depth, or blocks
    distance: Distance = "mse"
    timestep_sampling: TimestepSampling = "uniform"
    teacher: Teacher = "batched"
    # sample: divide the features' distance by the real ones' mean square; channel: each channel by its own variance;
    # None: channel for transformers, none for UNets
    normalize: FeatureNormalization | None = None
    # normalized: divide by max(c_f^2, 0.01), so that near and far t' count alike; None: transformers yes, UNets no
    displacement: Displacement | None = None
    mse_weight: Annotated[float, Field(ge=0.0)] = 0.0  # adds this much of the MSE objective to the self-perceptual one
    critic: CriticConfig | None = None

    @property
    def title(self) -> str:
        critic = f", critic on {self.critic.anchor}" if self.critic else ""
        return f"self-perceptual ({self.perceptual_network}, {self.layers}{critic})"

    @property
    def frozen_network(self) -> str | None:
        return self.perceptual_network

    @model_validator(mode="after")
    def _critic_has_a_part(self, info: ValidationInfo) -> Self:
        if self.critic is None or is_reading(info):
            return self
        if self.steps <= self.critic.warmup_steps and self.critic.weight:
            raise ValueError(f"critic.warmup_steps {self.critic.warmup_steps} leaves none of the {self.steps} steps")
        idle: dict[str, tuple[Any, ...]] = {"distance": ("mse",), "mse_weight": (0.0,)}
        idle |= dict.fromkeys(("normalize", "displacement"), (None, "none"))
        changed = [key for key, defaults in idle.items() if getattr(self, key) not in defaults]
        if self.critic.anchor == "mse" and changed:
            raise ValueError(f"critic.anchor 'mse' is the plain MSE, which does not take {' and '.join(changed)}")
        return self

    @model_validator(mode="after")
    def _gamma_weights_something(self, info: ValidationInfo) -> Self:
        if self.min_snr_gamma is not None and not self.mse_weight and not is_reading(info):
            raise ValueError("min_snr_gamma weights the MSE objective, of which mse_weight: 0.0 leaves nothing")
        return self


def _of_its_objective(stage: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """A union that is open: the section of the objective that the stage names.

    Earlier versions had the keys of all objectives in every stage. Those of others are left out where they hold their
    default, which says nothing (False is `normalize: none`), and where a run's own file is read.
    """
    if not isinstance(stage, dict):
        return handler(stage)
    name = stage.get("objective")
    if not isinstance(name, str) or name not in OBJECTIVES:  # refused by what all stages have in common
        return handler({key: stage[key] for key in StageConfig.model_fields if stage.get(key) is not None})
    kind, reading = OBJECTIVES[name], is_reading(info)
    idle = {
        key
        for other in OBJECTIVES.values()
        for key, field in other.model_fields.items()
        if key not in kind.model_fields and (reading or stage.get(key) in (field.default, False))
    }
    return kind.model_validate({key: stage[key] for key in stage if key not in idle}, context=info.context)


Stage = Annotated[SerializeAsAny[StageConfig], WrapValidator(_of_its_objective)]


def stage_config(objective: str, **keys: Any) -> StageConfig:
    """A stage of that objective, as in ``stage_config("mse", name="mse", ...)``.

    Raises:
        KeyError: an unknown objective.
        pydantic.ValidationError: keys that it does not take.
    """
    return OBJECTIVES[objective](objective=objective, **keys)

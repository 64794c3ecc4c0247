"""What the sections of a configuration are made of: strict types, paths, and sections of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from fastsp.utils.files import expand_home

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


PathText = Annotated[str, AfterValidator(expand_home)]  # a path, or a hub id


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    kinds: ClassVar[Kinds | None] = None  # of which this is one, or what they have in common


S = TypeVar("S", bound=Section)


def is_reading(info: ValidationInfo) -> bool:
    """Whether a run's own file is read (:func:`fastsp.config.read_config`): what it names may be gone since."""
    return bool(info.context and info.context.get("reading"))


class Kinds(dict[str, type[Section]]):
    """Sections that may stand in one place, told apart by the value of one key: a discriminated union that is open.

    A kind is a subclass of :class:`Section` that narrows the key to ``Literal["its name"]``, registered by decorating
    it with :meth:`register`. Unlike in pydantic's own unions, this can be done from outside of the package.

    Args:
        key: the key, such as ``objective``.
        default: the kind of a section that does not say; None: it has to.
    """

    def __init__(self, key: str, default: str | None = None) -> None:
        super().__init__()
        self.key, self.default = key, default

    def register(self, kind: type[S]) -> type[S]:
        """Make a kind known under the name that its key's Literal gives."""
        self[self.name_of(kind)] = kind
        return kind

    def name_of(self, kind: type[Section]) -> str:
        """What the configuration calls it."""
        return str(get_args(kind.model_fields[self.key].annotation)[0])

    def validate(self, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        """For pydantic's ``WrapValidator``: the section of the kind that ``value`` names.

        Earlier versions had the keys of all kinds in every section. Those of other kinds are left out where they hold
        their default, which says nothing, and where a run's own file is read.
        """
        if not isinstance(value, dict):
            return handler(value)
        name = value.get(self.key, self.default)
        kind = self.get(name) if isinstance(name, str) else None
        if kind is None:
            expected = " or ".join(map(repr, self))
            fault: Any = {"type": "literal_error", "loc": (self.key,), "input": name, "ctx": {"expected": expected}}
            if name is None:
                fault = {"type": "missing", "loc": (self.key,), "input": value}
            raise ValidationError.from_exception_data("section", [fault])
        fields = [(key, field) for other in self.values() for key, field in other.model_fields.items()]
        # False is `normalize: none` of earlier versions
        idle = {key for key, field in fields if is_reading(info) or value.get(key) in (field.default, False)}
        own = {key: content for key, content in value.items() if key in kind.model_fields or key not in idle}
        return kind.model_validate(own, context=info.context)

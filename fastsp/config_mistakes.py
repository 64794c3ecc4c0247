"""What is wrong with a configuration, in words: the key, the value and what is allowed, all mistakes in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from fastsp.objectives import OBJECTIVES, StageConfig
from fastsp.utils.section import Section

_OTHERS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("other_trainers.yaml").read_text(encoding="utf-8"))
OTHERS_KEYS = {name: ours for ours, names in _OTHERS.items() for name in names.split()}


def as_one_line(found: Sequence[str]) -> str:
    """All mistakes, numbered where there are several."""
    if len(found) == 1:
        return found[0]
    return f"{len(found)} mistakes: " + " ".join(f"({number}) {text}" for number, text in enumerate(found, start=1))


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a section and of those below it, a stage's of every objective; ``N`` stands for an index."""
    for kind in OBJECTIVES.values() if section is StageConfig else [section]:
        for name, field in kind.model_fields.items():
            yield f"{prefix}{name}"
            for below, in_list in _sections(field.annotation):
                yield from all_keys(below, f"{prefix}{name}.N." if in_list else f"{prefix}{name}.")


def _sections(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """The sections that an annotation names, and whether as the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, in_list
    elif get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _sections(part, in_list or get_origin(annotation) is list)


def mistakes(error: ValidationError, config: type[Section]) -> list[str]:
    """A line for each mistake that pydantic found."""
    known = list(dict.fromkeys(all_keys(config)))
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        parts = [str(part) for part in fault["loc"] if not _is_union_branch(part)]
        key, value = ".".join(parts), _as_written(fault["input"])
        value = value if len(value) <= 60 else f"{value[:57]}..."
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            lines[key] = f"{key}: {_meant(parts, fault['input'], known)}"
        elif fault["type"] == "missing":
            lines[key] = f"{key}: is missing"
        elif fault["type"] == "model_type":
            names = ", ".join(_names_below(parts, known)[:4])
            lines[key] = f"{key}: {value} is no section: keys such as {names} stand below it"
        elif fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of a section's keys together
            lines |= {line: f"{key}: {line}" if key else line for line in message.splitlines()}
        else:
            message = message[0].lower() + message[1:].replace("a valid dictionary", "a map, as {name: value, ...}")
            message = message.replace("True or False", "true or false")
            if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
                message += " (quote it where text is meant)"
            if there := OTHERS_KEYS.get(f"{parts[-1]}={fault['input']}"):
                message += f"; what other trainers call {fault['input']} is {there} here"
            start = lines.get(key, f"{key}: {value} is not allowed")  # another type of a union has one
            lines[key] = f"{start}{' or' if key in lines else ':'} {message}"
    return list(lines.values())


def _as_written(value: object) -> str:
    """As in YAML, where Python has words of its own."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _is_union_branch(part: int | str) -> bool:
    """Pydantic adds the tried type of a union to the place of a mistake; people have no use for it."""
    plain = part.removeprefix("constrained-") if isinstance(part, str) else ""
    return "[" in plain or plain in ("str", "int", "float", "bool")


def _prefix(place: Sequence[str]) -> str:
    """What the known keys of a section begin with."""
    return "".join(f"{'N' if part.isdecimal() else part}." for part in place)


def _names_below(place: Sequence[str], known: Sequence[str]) -> list[str]:
    """The keys of a section."""
    below = [key.removeprefix(_prefix(place)) for key in known if key.startswith(_prefix(place))]
    return [name for name in below if "." not in name]


def _meant(parts: Sequence[str], value: object, known: Sequence[str]) -> str:
    """Of an unknown key: what it is here, the likeliest key, or the keys that there are."""
    *place, name = parts
    siblings = _names_below(place, known)
    plain = name.lower().replace("-", "_").lstrip("_")
    if there := OTHERS_KEYS.get(f"{plain}={value}"):
        return f"unknown key; with this value it is {there} here"
    if name in siblings:
        owners = [objective for objective, kind in OBJECTIVES.items() if name in kind.model_fields]
        return f"only the objective {' and '.join(owners)} has this key"
    alike = [key for key in known if key.rpartition(".")[2] == plain]
    above = tuple(f"{key.rpartition('.')[0]}." for key in alike)  # a section's own key goes before those of its parts
    alike = [key for key in alike if not key.rpartition(".")[0].startswith(above)]
    ours = OTHERS_KEYS.get(plain) or " or ".join(alike[:3])
    if ours.startswith("none"):
        return f"unknown key; {ours}"
    if ours:
        here = ours.removeprefix(_prefix(place))
        return f"unknown key; here it is {ours if here == ours else '.'.join([*place, here])}"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"unknown key; did you mean {close[0]}?"
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    if close := difflib.get_close_matches(plain, leaves, n=1, cutoff=0.8):
        return f"unknown key; did you mean {leaves[close[0]]}?"
    return f"unknown key; allowed: {', '.join(siblings)}"

"""Configuration as people write it: YAML, and overrides such as ``stages.0.steps=20``."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fastsp.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading 1e-4 as the number that people mean (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """What YAML stands for; ``where`` names it in errors.

    Raises:
        UserError: broken YAML, with line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UserError(f"{where}{place} is broken YAML: {problem}") from None


def apply_override(tree: Any, override: str) -> None:
    """Set one value of the tree by ``key.path=value``. Lists are entered by index, missing sections are made.

    Raises:
        UserError: it has another form, or there is no such place.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r} must be key.path=value, as in stages.0.steps=20")
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        slot: Any = key
        if isinstance(tree, list):
            if not (key.isdecimal() and int(key) < len(tree)):
                raise UserError(f"override {override!r}: {key!r} is no index of a list of {len(tree)}")
            slot = int(key)
        elif not isinstance(tree, dict):
            raise UserError(f"override {override!r}: nothing can be set below {key!r}")
        if following is None:
            tree[slot] = parse_yaml(text, f"override {override!r}")
            return
        if isinstance(tree, dict) and tree.get(slot) is None:
            tree[slot] = {}
        tree = tree[slot]

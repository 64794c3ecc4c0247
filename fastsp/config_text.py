"""Configuration as people write it: YAML, and overrides such as ``stages.0.steps=20``."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fastsp.errors import UserError

_SCALARS = ("int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers that people mean.

    YAML 1.1 takes 010 for 8, 1:30 for 90, 2026-01-31 for a date and 1e-4 for text. Here the first three are text, which
    no numeric key takes, and the last is a number.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - yaml's own way
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []  # every key that a mapping has more than once: YAML itself would take the last one

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                self.twice.append(f"line {line}: the key {key.value!r} is in line {lines[key.value]} already")
            elif isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which quotes text that the loader would take for a number, such as 1e5."""


for _kind, _pattern in (
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
):
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), list("-+.0123456789")
        )


def dump_yaml(content: Any) -> str:
    """YAML from which :func:`parse_yaml` makes the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """What YAML stands for; ``where`` names it in errors.

    Raises:
        UserError: broken YAML, with line and column, or keys that are given twice, with their lines.
    """
    loader = _Loader(text)
    try:
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UserError(f"{where}{place} is broken YAML: {problem}") from None
    if loader.twice:
        raise UserError(f"{where}: {'; '.join(reversed(loader.twice))}")  # the outermost first
    return content


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
            tree[slot] = _value(text.strip(), f"override {override!r}")
            return
        if isinstance(tree, dict) and tree.get(slot) is None:
            tree[slot] = {}
        tree = tree[slot]


def _value(text: str, where: str) -> Any:
    """A list, a mapping or a quoted text is YAML. All else is one number, truth value, null or text, as it stands:
    no comment ends it, and shard patterns such as ``{00000..00231}.tar`` and ``[0-9]*.tar`` are text."""
    is_list, is_mapping = text.startswith("["), text.startswith("{") and (":" in text or text == "{}")
    if not (is_list or is_mapping or text.startswith(("'", '"'))):
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text)) if tag.endswith(_SCALARS) else text
    try:
        return parse_yaml(text, where)
    except UserError as error:
        closed = text.count("[") == text.count("]") and text.count("{") == text.count("}")
        if closed and not text.endswith(("]", "}", "'", '"')):
            return text
        if "broken YAML" not in str(error):
            raise
        raise UserError(f"{error}; quote what is text, as in data.path='[\"a {{0..9}}.tar\", b.tar]'") from None

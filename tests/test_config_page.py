"""docs/config.md against the configuration: every key, what it may be, its default, and nothing that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsp.config import Config, load_config
from fastsp.config_mistakes import OTHERS_KEYS, all_keys
from fastsp.config_text import parse_yaml
from fastsp.errors import UserError
from fastsp.objectives import OBJECTIVES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
SCHEMA = Config.model_json_schema()
NAMES = {"integer": "int", "number": "float", "string": "text", "boolean": "true, false"}
REQUIRED = "required"
QUICKSTART = PAGE.parents[1] / "configs" / "quickstart.yaml"
KINDS = {"StageConfig": OBJECTIVES}  # sections that are of several kinds
DEFINITIONS = {
    name: definition
    for section in (*OBJECTIVES.values(), Config)
    for name, definition in section.model_json_schema().get("$defs", {}).items()
}


def keys(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Of a section and those below it: the dotted key, what it may be, its default. Sections have headings instead."""
    for name, field in section["properties"].items():
        default = REQUIRED if name in section.get("required", ()) else field["default"]
        below = part_of(field)
        values, where = allowed(field), f"{path}{name}"
        if values != "section":
            yield where, values, default
        if below is not None:
            yield from keys(below, f"{where}.N." if values.startswith("list") else f"{where}.")


def part_of(field: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, if it does; of several kinds, the keys of all."""
    found = re.search(r'"#/\$defs/(\w+)"', json.dumps(field))
    if found is None:
        return None
    kinds = KINDS.get(found[1])
    if kinds is None:
        return DEFINITIONS[found[1]]
    parts = [kind.model_json_schema() for kind in kinds.values()]
    properties = {name: field for part in parts for name, field in part["properties"].items()}
    required = {name for part in parts for name in part["required"]}
    return {"properties": {**properties, "objective": {"enum": list(kinds)}}, "required": required}


def allowed(field: dict[str, Any]) -> str:
    """In words."""
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        return ", ".join(map(allowed, field["anyOf"]))
    if "enum" in field:
        return ", ".join(json.dumps(value).strip('"') for value in field["enum"])
    if field["type"] == "null":
        return "null"
    if field["type"] == "object":
        return f"map of text to {allowed(field['additionalProperties'])}"
    if field["type"] == "array":
        few = {1: " (at least one)", 2: " (two)"}.get(field.get("minItems"), "")
        return f"list of {allowed(field['items'])}{few}"
    return field.get("const") or NAMES[field["type"]] + bounds(field)


def bounds(field: dict[str, Any]) -> str:
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [(sign, field[name]) for name, sign in limits.items() if name in field]
    return " and".join(f" {sign} {'2^63' if limit == 2**63 else format(limit, 'g')}" for sign, limit in found)


def written() -> list[tuple[str, str, Any]]:
    """The tables' rows."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    return [(key, values, parse_yaml(default.strip("`"), "default")) for key, values, default in rows]


def test_the_page_has_every_key_with_its_values_and_default():
    assert sorted(written(), key=str) == sorted(keys(SCHEMA), key=str)


def test_other_trainers_keys_are_answered_as_the_page_says():
    """docs/coming-from.md: what the second column names for a key is what the error message names."""
    lines = (PAGE.parent / "coming-from.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| `")]
    ours = set(all_keys(Config))
    named = {name for _, here in rows for name in re.findall(r"`((?:\w+\.)+\w+)", here)} - {"report.html"}
    answers = {answer for answer in OTHERS_KEYS.values() if not answer.startswith("none")}
    assert len(named) > 25 and named <= ours and answers <= ours
    assert answers <= named | Config.model_fields.keys(), "the page lacks them"
    for there, here in rows:
        for name in re.findall(r"`([a-z]\w+)`", there):
            answer = OTHERS_KEYS.get(name) or min((key for key in ours if key.rpartition(".")[2] == name), key=len)
            assert f"`{answer}" in here or (answer.startswith("none") and here.startswith("none")), name


@pytest.mark.parametrize(
    "name",
    [
        "resolution",
        "train_batch_size",
        "lr_warmup_steps",
        "learning_rate",
        "lr_scheduler",
        "max_train_steps",
        "mixed_precision",
        "output_dir",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "validation_prompt",
        "report_to",
        "use_ema",
        "snr_gamma",
        "max_grad_norm",
        "network_dim",
        "train_data_dir",
        "num_train_epochs",
        "center_crop",
        "random_flip",
        "adam_weight_decay",
    ],
)
@pytest.mark.parametrize("place", ["{0}", "stages.0.{0}", "optimizer.{0}"])
def test_what_tutorials_set_is_answered_with_its_whole_path_here(name, place):
    ours = set(all_keys(Config))
    known = {key.replace("stages.N.", "stages.0.") for key in ours}
    if (key := place.format(name)) not in known:
        with pytest.raises(UserError) as caught:
            load_config(QUICKSTART, [f"{key}=1"])
        answer = str(caught.value).partition(f"{key}: unknown key; here it is ")[2]
        assert answer in ours | known, caught.value

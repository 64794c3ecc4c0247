"""The model card: what the model is, how it was trained and measured, and how to sample it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import yaml

from fastsp.evaluation.rows import by_setting
from fastsp.evaluation.run_files import RunFiles
from fastsp.models.hub import is_hub_id

_TEMPLATE = Path(__file__).with_name("model_card.md")
_TORCH_DTYPES = {"fp32": None, "fp16": "torch.float16", "bf16": "torch.bfloat16"}  # None: diffusers' own


def model_card(
    run: RunFiles, stage: str, pipeline_class: str, with_single_file: bool, dtype: str = "fp32", raw: bool = False
) -> str:
    """The card as Markdown with the front matter of Hugging Face's hub.

    Args:
        run: with its configuration; rows of the evaluation and the environment may be empty.
        stage: whose weights these are.
        pipeline_class: diffusers' (or our) class that loads the folder.
        with_single_file: whether a single file goes with the folder.
        dtype: of the weights, "fp32", "fp16" or "bf16".
        raw: these are not the averaged weights.
    """
    config = run.config
    base = config["model"].get("pretrained")
    way = _way_to(run.stages, stage)
    perceptual = any(entry["objective"] == "self_perceptual" for entry in way)
    front = {  # a path says nothing to others; it may say too much
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusion", *(["self-perceptual"] if perceptual else []), "fastsp"],
        **({"base_model": base} if base and is_hub_id(base) else {}),
    }
    groups = [(setting, group) for setting, group in by_setting(run.rows).items() if setting.stage == stage]
    scores = [
        (setting, *(mean(row[key] for row in group) for key in ("fid", "inception_score")), len(group))
        for setting, group in groups
    ]
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False),
        run=config["run_dir"].rstrip("/").rpartition("/")[2],
        stage=stage,
        perceptual=perceptual,
        module="fastsp.models" if pipeline_class.startswith("Pixel") else "diffusers",
        pipeline=pipeline_class,
        dtype=_TORCH_DTYPES[dtype],
        with_single_file=with_single_file,
        way=way,
        cell=_cell,
        name=_name,
        config=config,
        raw=raw,
        environment=run.environment,
        scores=scores,
        first=groups[0][1][0] if groups else None,
    )


def _way_to(stages: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    """The stages whose weights went into one, first first."""
    stage = next((stage for stage in stages if stage["name"] == name), None)
    return [] if stage is None else [*_way_to(stages, stage["init"]), stage]


def _name(path: str | list[str] | None) -> str:
    """Of local files the last part alone: the folders before it are nobody's business."""
    parts = [path] if isinstance(path, str) else path or []
    return ", ".join(part if is_hub_id(part) else part.rstrip("/").rpartition("/")[2] for part in parts)


def _cell(value: Any) -> str:
    """A value inside a cell of a table."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str("" if value is None else value)
    return " ".join(text.split()).replace("|", "\\|")

"""The model card: what the model is, how it was trained and measured, and how to sample it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, Literal

import jinja2
import torch
import yaml

from fastsp.diffusion.text import TextSettings
from fastsp.evaluation.rows import by_setting
from fastsp.evaluation.run_files import RunFiles
from fastsp.export.layout import noise_marks
from fastsp.families import family_of
from fastsp.models.hub import is_hub_id
from fastsp.models.schedulers import is_flow, meaning_of


def model_card(
    run: RunFiles,
    stage: str,
    pipeline: Any,
    single_file: Literal["all", "transformer"] | None,
    dtype: torch.dtype,
    raw: bool,
    text: TextSettings,
) -> str:
    """The card as Markdown with the front matter of Hugging Face's hub.

    The pipeline has the weights of a stage, raw or averaged, written in a dtype; a single file may go with them, with
    all parts or the transformer alone.
    """
    config, way, pipeline_class = run.config, _way_to(run.stages, stage), type(pipeline).__name__
    predicts, schedule = meaning_of(pipeline.scheduler.config)
    base = config["model"].get("pretrained")
    perceptual = any(entry["objective"] == "self_perceptual" for entry in way)
    front = {  # a path says nothing to others; it may say too much
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusion", *(["self-perceptual"] if perceptual else []), "fastsp"],
        **({"base_model": base} if base and is_hub_id(base) else {}),
    }
    rows = [row for row in run.rows if row["stage"] == stage]
    scores = [
        (setting, *(mean(row[key] for row in group) for key in ("fid", "inception_score")), len(group))
        for setting, group in by_setting(rows).items()
    ]
    source = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    template = jinja2.Template(source, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False),
        run=config["run_dir"].rstrip("/").rpartition("/")[2],
        stage=stage,
        perceptual=perceptual,
        module="fastsp.models" if pipeline_class.startswith("Pixel") else "diffusers",
        pipeline=pipeline_class,
        dtype=None if dtype == torch.float32 else dtype,  # diffusers' own
        single_file=single_file,
        is_flow=is_flow(pipeline.scheduler.config),
        predicts=predicts,
        family=family_of(getattr(pipeline, "unet", None) or pipeline.transformer),
        schedule=schedule,
        advice=text.advice(pipeline_class.startswith("StableDiffusionXL")),
        marks=noise_marks(pipeline.scheduler.config),
        way=way,
        cell=_cell,
        name=_name,
        config=config,
        raw=raw,
        environment=run.environment,
        scores=scores,
        first=rows[0] if rows else None,
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

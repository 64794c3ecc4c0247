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
from fastsp.models.schedulers import meaning_of

_TORCH_DTYPES = {"fp32": None, "fp16": "torch.float16", "bf16": "torch.bfloat16"}  # None: diffusers' own


def model_card(
    run: RunFiles,
    stage: str,
    pipeline_class: str,
    with_single_file: bool,
    scheduler: Any,
    dtype: str = "fp32",
    raw: bool = False,
) -> str:
    """The card as Markdown with the front matter of Hugging Face's hub.

    The weights are those of a stage, raw or averaged, in a dtype "fp32", "fp16" or "bf16"; `pipeline_class` loads them,
    and a single file may go with them. The scheduler's configuration says what they predict.
    """
    config, way = run.config, _way_to(run.stages, stage)
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
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False),
        run=config["run_dir"].rstrip("/").rpartition("/")[2],
        stage=stage,
        perceptual=perceptual,
        module="fastsp.models" if pipeline_class.startswith("Pixel") else "diffusers",
        pipeline=pipeline_class,
        dtype=_TORCH_DTYPES[dtype],
        with_single_file=with_single_file,
        predicts=meaning_of(scheduler)[0],
        schedule=meaning_of(scheduler)[1],
        marks=[key for key, there in _marks(scheduler).items() if there],
        way=way,
        cell=_cell,
        name=_name,
        config=config,
        raw=raw,
        environment=run.environment,
        scores=scores,
        first=rows[0] if rows else None,
    )


def _marks(scheduler: Any) -> dict[str, bool]:
    """The keys by which a single file tells what its model predicts."""
    return {"v_pred": scheduler["prediction_type"] == "v_prediction", "ztsnr": scheduler["rescale_betas_zero_snr"]}


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

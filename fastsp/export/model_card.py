"""The model card: what the model is, how it was trained and measured, and how to sample it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import yaml

from fastsp.evaluation.rows import by_setting
from fastsp.models.hub import is_hub_id

_TEMPLATE = Path(__file__).with_name("model_card.md")
_TORCH_DTYPES = {"fp32": None, "fp16": "torch.float16", "bf16": "torch.bfloat16"}  # None: diffusers' own


def model_card(
    config: dict[str, Any],
    stage: str,
    rows: list[dict[str, Any]],
    environment: dict[str, Any],
    pipeline_class: str,
    with_single_file: bool,
    dtype: str = "fp32",
    raw: bool = False,
) -> str:
    """The card as Markdown with the front matter of Hugging Face's hub.

    Args:
        config: of the run, resolved.
        stage: whose weights these are.
        rows: of `evaluation.json`; may be empty.
        environment: versions and machine; may be empty.
        pipeline_class: diffusers' (or our) class that loads the folder.
        with_single_file: whether a single file goes with the folder.
        dtype: of the weights, "fp32", "fp16" or "bf16".
        raw: these are not the averaged weights.
    """
    base = config["model"].get("pretrained")
    way = _way_to(config["stages"], stage)
    perceptual = any(entry["objective"] == "self_perceptual" for entry in way)
    front = {  # a path says nothing to others; it may say too much
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusion", *(["self-perceptual"] if perceptual else []), "fastsp"],
        **({"base_model": base} if base and is_hub_id(base) else {}),
    }
    groups = [(setting, group) for setting, group in by_setting(rows).items() if setting.stage == stage]
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
        objective=_objective,
        cell=_cell,
        facts=_facts(config, raw) | environment,
        scores=scores,
        first=groups[0][1][0] if groups else None,
    )


def _facts(config: dict[str, Any], raw: bool) -> dict[str, Any]:
    model, data, optimizer = config["model"], config["data"], config["optimizer"]
    lora = model.get("lora")
    warmup = ", reached by a warm-up" if config["ema"].get("warmup") else ""
    facts = {
        "base model": _name(model.get("pretrained")) or f"preset {model.get('preset')}, random weights",
        "data": f"{data['source']} {_name(data['path'])}".strip() + f", {data['resolution']} px",
        "batch size": data["batch_size"],
        "adapters": lora
        and f"LoRA, rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['target_modules'])}; "
        "these weights are the base model's with the adapters merged into them",
        "caption dropout": "unconditional: every caption empty" if data["unconditional"] else data["caption_dropout"],
        "optimizer": f"{optimizer.get('kind', 'adamw')}, betas {optimizer['betas']}, "
        f"weight decay {optimizer['weight_decay']}",
        "EMA": f"{config['ema']['decay']}{warmup}; these are the {'raw' if raw else 'averaged'} weights",
        "precision": config["precision"],
        "seed": config["seed"],
    }
    return {name: value for name, value in facts.items() if value is not None}


def _way_to(stages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The stages whose weights went into one, first first."""
    stage = next(stage for stage in stages if stage["name"] == name)
    return [*(_way_to(stages, stage["init"]) if stage["init"] is not None else []), stage]


def _objective(stage: dict[str, Any]) -> str:
    if stage["objective"] == "mse":
        return "MSE on v" + (f", min-SNR gamma {gamma:g}" if (gamma := stage.get("min_snr_gamma")) else "")
    parts = [
        f"self-perceptual: metric `{_name(stage['perceptual_network'])}`",
        f"layers {stage['layers']}",
        f"distance {stage['distance']}",
        f"t' {stage['timestep_sampling']}",
    ]
    parts += ["features normalized"] if stage.get("normalize", "none") not in ("none", False) else []
    parts += ["displacement normalized"] if stage.get("displacement", "none") != "none" else []
    parts += [f"plus {weight:g} x MSE on v"] if (weight := stage.get("mse_weight")) else []
    return ", ".join(parts)


def _name(path: str | list[str] | None) -> str:
    """Of local files the last part alone: the folders before it are nobody's business."""
    parts = [path] if isinstance(path, str) else path or []
    return ", ".join(part if is_hub_id(part) else part.rstrip("/").rpartition("/")[2] for part in parts)


def _cell(value: Any) -> str:
    """A value inside a cell of a table."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str("" if value is None else value)
    return " ".join(text.split()).replace("|", "\\|")

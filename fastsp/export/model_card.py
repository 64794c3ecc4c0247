"""The model card: what the model is, how it was trained and measured, and how to sample it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import yaml

from fastsp.evaluation.rows import by_setting
from fastsp.models.hub import is_hub_id

_TORCH_DTYPES = {"fp32": None, "fp16": "torch.float16", "bf16": "torch.bfloat16"}  # None: diffusers' own
_HEAD = """\
Trained with fastsp by the self-perceptual objective of Lin & Yang, *Diffusion Model
with Perceptual Loss*: a frozen copy of the MSE-trained network is the perceptual metric. Such a model is made to be
sampled **without classifier-free guidance**.
"""
_HEAD_MSE = """\
Trained with fastsp by the mean squared error on v: what the self-perceptual objective of Lin & Yang,
[*Diffusion Model with Perceptual Loss*](https://arxiv.org/abs/2401.00110), starts from and is compared with. It was not
trained by that objective itself.
"""
_PROGRAMS = """\
The single file is in the original Stable Diffusion layout. It predicts v on a zero-terminal-SNR schedule, and says so
by the keys `v_pred` and `ztsnr`. Not every program reads them for every family:

- **ComfyUI**: put a `ModelSamplingDiscrete` node (`v_prediction`, `zsnr` on) behind the loader, unless it is SDXL.
- **A1111**: keep the `.yaml` beside the file, if there is one.
- **InvokeAI**: set the prediction type to `v_prediction` in the model manager.

Everywhere: CFG scale 1 (no guidance), DDIM or Euler, trailing ("SGM uniform") timesteps.
"""
_LIMITS = """\
Samples can show grid artefacts (section 6.6 of the paper), and an MSE model with guidance and rescale scores better
than self-perceptual training without guidance (section 6.7).
"""
_BIASES = "Biases of the base model and of the data remain.\n"
_CITATION = """\
## Citation

```bibtex
@article{lin2024diffusion,
  title   = {Diffusion Model with Perceptual Loss},
  author  = {Lin, Shanchuan and Yang, Xiao},
  journal = {arXiv preprint arXiv:2401.00110},
  year    = {2024}
}
```
"""


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
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {config['run_dir'].rstrip('/').rpartition('/')[2]}, stage {stage}\n",
        _HEAD if perceptual else _HEAD_MSE,
        _usage(pipeline_class, _TORCH_DTYPES[dtype]),
        _PROGRAMS if with_single_file else "",
        _training(config, way, environment, raw),
        "\n".join(_metrics(rows, stage)),
        "## Limits\n",
        _LIMITS if perceptual else "",
        _BIASES,
        _CITATION,
    ]
    return "\n".join(section for section in sections if section)


def _usage(pipeline_class: str, dtype: str | None) -> str:
    module = "fastsp.models.pixel_pipeline" if pipeline_class.startswith("Pixel") else "diffusers"
    option = f", torch_dtype={dtype}" if dtype else ""
    return (
        "```python\n"
        f"{f'import torch{chr(10)}' if dtype else ''}"
        f"from {module} import {pipeline_class}\n\n"
        f'pipeline = {pipeline_class}.from_pretrained("path/to/this/folder"{option})\n'
        'image = pipeline("a prompt", num_inference_steps=25, guidance_scale=1.0).images[0]  # 1: no guidance\n'
        "```\n"
    )


def _training(config: dict[str, Any], way: list[dict[str, Any]], environment: dict[str, Any], raw: bool) -> str:
    data, optimizer = config["data"], config["optimizer"]
    base = config["model"].get("pretrained")
    model = _name(base) if base else f"preset {config['model'].get('preset')}, random weights"
    warmup = ", reached by a warm-up" if config["ema"].get("warmup") else ""
    facts = {
        "base model": model,
        "data": f"{data['source']} {_name(data['path'])}".strip() + f", {data['resolution']} px",
        "batch size": data["batch_size"],
        **_adapters(config["model"].get("lora")),
        "caption dropout": "unconditional: every caption empty" if data["unconditional"] else data["caption_dropout"],
        "optimizer": f"{optimizer.get('kind', 'adamw')}, betas {optimizer['betas']}, "
        f"weight decay {optimizer['weight_decay']}",
        "EMA": f"{config['ema']['decay']}{warmup}; these are the {'raw' if raw else 'averaged'} weights",
        "precision": config["precision"],
        "seed": config["seed"],
        **environment,
    }
    lines = ["## Training", "", "| stage | objective | starts from | steps | learning rate |", "|---|---|---|---|---|"]
    for entry in way:
        lines.append(
            f"| {entry['name']} | {_objective(entry)} | {entry['init'] or 'the base model'} | {entry['steps']} "
            f"| {entry['learning_rate']:g} |"
        )
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in facts.items()), ""]
    return "\n".join(lines)


def _adapters(lora: dict[str, Any] | None) -> dict[str, str]:
    if lora is None:
        return {}
    shape = f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['target_modules'])}"
    return {"adapters": f"LoRA, {shape}; these weights are the base model's with the adapters merged into them"}


def _way_to(stages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The stages whose weights went into one, first first."""
    by_name = {stage["name"]: stage for stage in stages}
    way: list[dict[str, Any]] = []
    current: str | None = name
    while current is not None:
        way.insert(0, by_name[current])
        current = by_name[current]["init"]
    return way


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


def _metrics(rows: list[dict[str, Any]], stage: str) -> Iterator[str]:
    """The stage's rows of the evaluation, means over the sampling seeds."""
    groups = {setting: group for setting, group in by_setting(rows).items() if setting.stage == stage}
    if not groups:
        return
    first = next(iter(groups.values()))[0]
    yield "## Evaluation\n"
    yield f"{first['num_samples']} samples a row, features `{first.get('features', 'unknown')}`.\n"
    yield "| steps | guidance | rescale | prompts | FID | IS | seeds |\n|---|---|---|---|---|---|---|"
    for setting, group in groups.items():
        fid, score = (mean(row[key] for row in group) for key in ("fid", "inception_score"))
        prompts = "captions" if setting.conditional else "empty"
        yield (
            f"| {setting.steps} | {setting.guidance:g} | {setting.rescale:g} | {prompts} | {fid:.2f} | {score:.2f} "
            f"| {len(group)} |"
        )
    yield ""


def _name(path: str | list[str] | None) -> str:
    """Of local files the last part alone: the folders before it are nobody's business."""
    if path is None:
        return ""
    parts = [path] if isinstance(path, str) else path
    return ", ".join(part if is_hub_id(part) else part.rstrip("/").rpartition("/")[2] for part in parts)


def _text(value: Any) -> str:
    """A value inside a cell of a table."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str("" if value is None else value)
    return " ".join(text.split()).replace("|", "\\|")

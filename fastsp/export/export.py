"""A finished run as a folder for diffusers and a single file for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from fastsp.errors import UserError
from fastsp.evaluation.run_files import RunFiles, read_run
from fastsp.export.layout import check_layout, layout_of, save_single_file
from fastsp.export.model_card import model_card
from fastsp.generation.checkpoints import load_checkpoint
from fastsp.generation.generate import load_trained, raw_weights
from fastsp.models import TextToImageModel
from fastsp.models.saving import save_pipeline
from fastsp.training.checkpoint_folder import damage, newest_first, progress_of
from fastsp.utils.files import new_folder, write_file

_PUBLISHED_WIDTHS = [320, 640, 1280, 1280]  # of the UNets of Stable Diffusion 1 and 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_run(
    run_dir: Path,
    out: Path,
    single_file: Path | None = None,
    dtype: str = "fp32",
    stage: str | None = None,
    base: str | None = None,
    raw: bool = False,
    checkpoint: str | None = None,
    transformer_only: bool = False,
) -> list[Path]:
    """Write the weights of a run's stage where other programs can read them, in place of what is there.

    Args:
        run_dir: of a finished run.
        out: the folder to write: a diffusers pipeline and the model card.
        single_file: a `.safetensors` file in the original layout, and beside it the `.yaml` that A1111 reads.
        dtype: of the weights, a name of :data:`DTYPES`; fp32 loses nothing: what was not trained stays as it was read,
            in the single file as it is held, which is in float32 but for T5.
        stage: None: the one the run's configuration calls final.
        base: of a LoRA run, the model to merge the adapters into; None: the one they name.
        raw: write the raw weights, not their moving average.
        checkpoint: the name of one of the run's checkpoints/, to write what the run had then.
        transformer_only: leave VAE and text encoders out of the single file of a Stable Diffusion 3 or FLUX.

    Returns what was written. `UserError`: no finished run, no such stage, or no original layout.
    """
    run = read_run(run_dir)
    model, chosen = _model(run, stage, base, raw) if checkpoint is None else _then(run, checkpoint, base, raw)
    pipeline = model.pipeline()
    if single_file is not None:
        check_layout(pipeline, transformer_only)  # before anything is written
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and dtype != "fp32":
            part.to(DTYPES[dtype])
    holds: Literal["all", "transformer"] | None = None
    if single_file is not None:
        holds = "transformer" if transformer_only else "all"
    card = model_card(run, chosen, pipeline, holds, DTYPES[dtype], raw, model.text)
    written = [out]
    with new_folder(out) as unfinished:
        save_pipeline(pipeline, unfinished, model.files if dtype == "fp32" else None)
        model.text.save(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    if single_file is not None:
        save_single_file(pipeline, single_file, DTYPES[dtype], single_file.stem, transformer_only)
        written.append(single_file)
        if (description := original_config(pipeline)) is not None:
            written.append(single_file.with_suffix(".yaml"))
            write_file(written[-1], description.read_bytes())
    return written


def original_config(pipeline: Any) -> Path | None:
    """The YAML file that A1111 reads beside a single file, without which it takes Stable Diffusion 1 for an epsilon
    model; None for those that are, for XL, whose files carry markers that A1111 reads, and for UNets that nobody
    published."""
    if pipeline.scheduler.config.get("prediction_type") != "v_prediction":
        return None
    file = Path(__file__).with_name(f"{layout_of(pipeline)}.yaml")
    is_published = list(pipeline.unet.config.block_out_channels) == _PUBLISHED_WIDTHS
    return file if is_published and file.is_file() else None


def _then(run: RunFiles, checkpoint: str, base: str | None, raw: bool) -> tuple[TextToImageModel, str]:
    """The model of a checkpoint, and the name of its stage, which ``run`` is told to have ended there."""
    folder = run.directory / "checkpoints" / checkpoint
    if (fault := damage(folder)) is not None:
        there = ", ".join(path.name for path in newest_first(folder.parent)) or "none"
        raise UserError(f"--checkpoint {checkpoint}: {fault}; the run's checkpoints: {there}")
    progress = progress_of(folder)
    for entry in run.config["stages"]:
        entry["steps"] = progress.step if entry["name"] == progress.stage else entry["steps"]
    return load_checkpoint(folder, raw, base), progress.stage


def _model(run: RunFiles, stage: str | None, base: str | None, raw: bool) -> tuple[TextToImageModel, str]:
    """The model of a stage, and the stage's name."""
    final, names = run.directory / "final", [entry["name"] for entry in run.stages]
    if not final.is_dir():
        raise UserError(f"--run {run.directory} holds no finished run: it has no final/; train it first")
    if not names:
        raise UserError(f"--run {run.directory} has no config.yaml, or none that names stages")
    if stage is not None and stage not in names:
        raise UserError(f"--stage {stage!r} is no stage of {run.directory}; allowed: {', '.join(names)}")
    last = run.config.get("final") or names[-1]
    chosen = stage or last
    folder = run.directory / "stages" / chosen
    if raw:
        return load_trained(raw_weights(str(folder)), base=base), chosen
    return load_trained(str(final if chosen == last else folder), base=base), chosen

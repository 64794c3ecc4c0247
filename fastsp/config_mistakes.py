"""What is wrong with a configuration, in words: the key, the value and what is allowed, all mistakes in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from fastsp.section import Section

# What a key of other trainers (diffusers' scripts, kohya's sd-scripts, OneTrainer, SimpleTuner) is here: our key, or
# why there is none. docs/coming-from.md agrees with it. A key that has the same name here needs no row.
OTHERS_KEYS: dict[str, str] = {
    "pretrained_model_name_or_path": "model.pretrained",
    "base_model_name": "model.pretrained",
    "train_data_dir": "data.path",
    "instance_data_dir": "data.path",
    "dataset_name": "data.path",
    "in_json": "data.path",
    "image_dir": "data.path",
    "output_dir": "run_dir",
    "output_name": "run_dir",
    "logging_dir": "run_dir",
    "train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "data.microbatch",
    "max_train_steps": "stages.N.steps",
    "max_train_epochs": "stages.N.steps",
    "num_train_epochs": "stages.N.steps",
    "epochs": "stages.N.steps",
    "lr": "stages.N.learning_rate",
    "unet_lr": "stages.N.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "learning_rate_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "learning_rate_warmup_steps": "optimizer.warmup_steps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "adam_weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.grad_clip",
    "clip_grad_norm": "optimizer.grad_clip",
    "mixed_precision": "precision",
    "train_dtype": "precision",
    "use_ema": "ema.decay",
    "ema_decay": "ema.decay",
    "snr_gamma": "stages.N.min_snr_gamma",
    "random_flip": "data.flip",
    "flip_aug": "data.flip",
    "center_crop": "data.crop",
    "random_crop": "data.crop",
    "dataloader_num_workers": "data.workers",
    "max_data_loader_n_workers": "data.workers",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_dropout_probability": "data.caption_dropout",
    "proportion_empty_prompts": "data.caption_dropout",
    "cache_latents": "data.source",
    "cache_text_encoder_outputs": "data.source",
    "network_dim": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "network_alpha": "model.lora.alpha",
    "lora_alpha": "model.lora.alpha",
    "network_module": "model.lora",
    "checkpointing_steps": "checkpoint.every",
    "save_every_n_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "save_last_n_steps": "checkpoint.keep",
    "validation_prompt": "samples.prompts",
    "validation_prompts": "samples.prompts",
    "sample_prompts": "samples.prompts",
    "validation_steps": "samples.every",
    "sample_every_n_steps": "samples.every",
    "log_with": "log.wandb",
    "report_to": "log.wandb",
    "torch_compile": "compile",
    "enable_xformers_memory_efficient_attention": "attention",
    "xformers": "attention",
    "sdpa": "attention",
    "resume_from_checkpoint": "none: fastsp train --resume goes on with the run in run_dir",
    "resume": "none: fastsp train --resume goes on with the run in run_dir",
    "save_state": "none: a checkpoint always has the whole state",
    "prediction_type": "none: v-prediction is trained always",
    "v_parameterization": "none: v-prediction is trained always",
    "zero_terminal_snr": "none: the schedule has zero terminal SNR always",
    "rescale_betas_zero_snr": "none: the schedule has zero terminal SNR always",
    "noise_offset": "none: zero terminal SNR is there for what it works around",
    "multires_noise_iterations": "none: zero terminal SNR is there for what it works around",
    "ip_noise_gamma": "none: zero terminal SNR is there for what it works around",
    "enable_bucket": "none: pictures are cropped to squares",
    "shuffle_caption": "none",
    "keep_tokens": "none",
    "max_token_length": "none: 77 tokens, what is behind them is cut",
    "train_text_encoder": "none: text encoders are frozen",
    "allow_tf32": "none: precision says what is computed how",
}


def as_one_line(found: Sequence[str]) -> str:
    """All mistakes, numbered where there are several."""
    if len(found) == 1:
        return found[0]
    return f"{len(found)} mistakes: " + " ".join(f"({number}) {text}" for number, text in enumerate(found, start=1))


def all_keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The dotted keys of a section and of those below it, each with its own; ``N`` stands for an index."""
    for kind in section.kinds.values() if section.kinds is not None else [section]:
        for name, field in kind.model_fields.items():
            yield f"{prefix}{name}", kind
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
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        parts = [part for part in fault["loc"] if not _is_union_branch(part)]
        key = ".".join(map(str, parts))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            lines[key] = f"{key}: {_meant(parts, config)}"
        elif fault["type"] == "missing":
            lines[key] = f"{key}: is missing"
        elif fault["type"] == "model_type":
            names = ", ".join(_names_below(parts, config)[:4])
            lines[key] = f"{key}: {_short(fault['input'])} is no section: keys such as {names} stand below it"
        elif fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of a section's keys together
            lines |= {line: f"{key}: {line}" if key else line for line in message.splitlines()}
        else:
            message = message[0].lower() + message[1:]
            if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
                message += " (quote it where text is meant)"
            start = lines.get(key, f"{key}: {_short(fault['input'])} is not allowed")  # another type of a union has one
            lines[key] = f"{start}{' or' if key in lines else ':'} {message}"
    return list(lines.values())


def _is_union_branch(part: int | str) -> bool:
    """Pydantic adds the tried type of a union to the place of a mistake; people have no use for it."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _pattern(parts: Sequence[int | str]) -> str:
    return ".".join("N" if isinstance(part, int) else part for part in parts)


def _names_below(parts: Sequence[int | str], config: type[Section]) -> list[str]:
    """The keys of a section."""
    prefix = _pattern([*parts, ""])
    below = [key.removeprefix(prefix) for key, _ in all_keys(config) if key.startswith(prefix)]
    return list(dict.fromkeys(name for name in below if "." not in name))


def _meant(parts: Sequence[int | str], config: type[Section]) -> str:
    """Of an unknown key: what it is here, the likeliest key, or the keys that there are."""
    place, name = list(parts[:-1]), str(parts[-1])
    known = dict.fromkeys(key for key, _ in all_keys(config))
    if kinds := [kind for key, kind in all_keys(config) if key == _pattern(parts) and kind.kinds is not None]:
        names = [kind.kinds.name_of(kind) for kind in kinds if kind.kinds is not None]
        return f"only the {kinds[0].kinds.key} {' and '.join(names)} has this key"
    plain = name.lower().replace("-", "_").lstrip("_")
    places = [key for key in known if key.rpartition(".")[2] == plain]
    if ours := OTHERS_KEYS.get(plain) or " or ".join(places[:3]):
        if ours.startswith(f"{_pattern(place)}."):
            ours = ".".join(map(str, [*place, ours.rpartition(".")[2]]))
        return f"unknown key; {'' if ours.startswith('none') else 'here it is '}{ours}"
    siblings = _names_below(place, config)
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"unknown key; did you mean {close[0]}?"
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    if close := difflib.get_close_matches(plain, leaves, n=1, cutoff=0.8):
        return f"unknown key; did you mean {leaves[close[0]]}?"
    return f"unknown key; allowed: {', '.join(siblings)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

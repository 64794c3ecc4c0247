"""What is wrong with a configuration, in words: the key, the value and what is allowed, all mistakes in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from fastsp.utils.section import Section

# What keys of other trainers (diffusers' scripts, kohya's sd-scripts, OneTrainer, SimpleTuner) are here: our key, or
# "none" and why. docs/coming-from.md agrees with it. A key that has the same name here needs no row.
_OTHERS = {
    "run_dir": "output_dir output_name logging_dir",
    "model.pretrained": "pretrained_model_name_or_path base_model_name network_weights",
    "model.lora": "network_module",
    "model.lora.rank": "network_dim lora_rank",
    "model.lora.alpha": "network_alpha lora_alpha",
    "data.source": "cache_latents cache_text_encoder_outputs",
    "data.path": "train_data_dir instance_data_dir dataset_name in_json image_dir",
    "data.batch_size": "train_batch_size",
    "data.microbatch": "gradient_accumulation_steps",
    "data.crop": "center_crop random_crop",
    "data.flip": "random_flip flip_aug",
    "data.workers": "dataloader_num_workers max_data_loader_n_workers",
    "data.caption_dropout": "caption_dropout_rate caption_dropout_probability proportion_empty_prompts",
    "stages.N.steps": "max_train_steps max_train_epochs num_train_epochs epochs",
    "stages.N.learning_rate": "lr unet_lr",
    "stages.N.min_snr_gamma": "snr_gamma",
    "optimizer.kind": "optimizer_type use_8bit_adam",
    "optimizer.schedule": "lr_scheduler learning_rate_scheduler",
    "optimizer.warmup_steps": "lr_warmup_steps learning_rate_warmup_steps",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.weight_decay": "adam_weight_decay",
    "optimizer.grad_clip": "max_grad_norm clip_grad_norm",
    "ema.decay": "use_ema ema_decay",
    "precision": "mixed_precision train_dtype",
    "compile": "torch_compile",
    "attention": "enable_xformers_memory_efficient_attention xformers sdpa",
    "checkpoint.every": "checkpointing_steps save_every_n_steps",
    "checkpoint.keep": "checkpoints_total_limit save_last_n_steps",
    "samples.prompts": "validation_prompt validation_prompts sample_prompts",
    "samples.every": "validation_steps sample_every_n_steps",
    "log.wandb": "log_with report_to",
    "none: fastsp train --resume goes on with the run in run_dir": "resume resume_from_checkpoint",
    "none: a checkpoint always holds the whole state": "save_state",
    "none: v-prediction on a zero-terminal-SNR schedule is always trained": (
        "prediction_type v_parameterization zero_terminal_snr rescale_betas_zero_snr"
    ),
    "none: zero terminal SNR mends what it works around": "noise_offset multires_noise_iterations ip_noise_gamma",
    "none: pictures are cropped to squares": "enable_bucket",
    "none: captions are taken as they are": "shuffle_caption keep_tokens",
    "none: captions are cut after 77 tokens": "max_token_length",
    "none: text encoders are frozen": "train_text_encoder",
}
OTHERS_KEYS = {name: ours for ours, names in _OTHERS.items() for name in names.split()}


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
    if having := [(kind.kinds, kind) for key, kind in all_keys(config) if key == _pattern(parts) and kind.kinds]:
        names = " and ".join(kinds.name_of(kind) for kinds, kind in having)
        return f"only the {having[0][0].key} {names} has this key"
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

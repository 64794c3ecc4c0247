"""PixArt's transformer, of Alpha (Chen et al., arXiv 2310.00426) and Sigma (arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastsp.families.trained import TrainedTransformer


class PixArtFamily(TrainedTransformer):
    """It answers with a variance after the noise (Nichol & Dhariwal, arXiv 2102.09672), which neither the losses nor
    deterministic samplers see. Texts have a mask; Alpha for 1024 pixels is told the size of the image."""

    other_kernels = ("cudnn", "flash", "efficient", "math", "xformers")  # its texts have masks, which few of them take
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    input_keys: tuple[str, ...] = ("in_channels", "caption_channels")

    def fault(self, config: Mapping[str, Any]) -> str | None:
        takes, returns = config["in_channels"], config.get("out_channels")
        if returns in (None, takes, 2 * takes):
            return None
        return f"it takes {takes} channels and returns {returns}; they must be as many, or twice as many"

    def conditioning_fault(self, config: Mapping[str, Any], conditioning: Mapping[str, Any]) -> str | None:
        if self.takes_sizes(config) and conditioning.get("added_cond_kwargs") is None:
            return f"added_cond_kwargs missing, which this {self.class_name} needs: resolution and aspect_ratio"
        return super().conditioning_fault(config, conditioning)

    def takes_sizes(self, config: Mapping[str, Any]) -> bool:
        told = config.get("use_additional_conditions")
        return bool(config["sample_size"] == 128 if told is None else told)  # as the class decides

    def text_widths(self, config: Mapping[str, Any]) -> tuple[int, int | None]:
        return config["caption_channels"] or config["cross_attention_dim"], None

    def keywords(self, config: Mapping[str, Any], conditioning: Any, guidance: float = 1.0) -> dict[str, Any]:
        states, sizes = conditioning.encoder_hidden_states, conditioning.time_ids
        given = {"encoder_hidden_states": states, "encoder_attention_mask": states.any(dim=-1)}  # padding is zeros
        if sizes is not None:
            height, width = sizes[:, 4:5], sizes[:, 5:6]
            given["added_cond_kwargs"] = {"resolution": sizes[:, 4:6], "aspect_ratio": height / width}
        return given

    def exchange_attention(self, network: Any, exchange: Callable[[Any], Any]) -> None:
        """They stay."""

    def pipeline_class(self, config: Mapping[str, Any]) -> str:
        """As far as a network's configuration tells: those of Sigma say that they are told no sizes."""
        return "PixArtSigmaPipeline" if config.get("use_additional_conditions") is False else "PixArtAlphaPipeline"


PIXART = PixArtFamily("PixArtTransformer2DModel", takes=("encoder_attention_mask", "added_cond_kwargs"))

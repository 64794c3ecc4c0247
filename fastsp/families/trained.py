"""What the trainer needs to know of a family, as far as those that it trains have it in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fastsp.families.transformers import TransformerFamily


class TrainedFamily:
    """See :class:`fastsp.families.NetworkFamily`, also for what is not documented here."""

    class_name: str

    def network_class(self) -> type[Any]:
        import diffusers  # takes seconds

        return getattr(diffusers, self.class_name)

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds"))

    def patch(self, config: Mapping[str, Any]) -> int:
        return 1

    def largest_side(self, config: Mapping[str, Any]) -> int | None:
        return None

    def tokens(self, config: Mapping[str, Any], height: int, width: int) -> int:
        patch = self.patch(config)
        return (height // patch) * (width // patch)

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"])

    def exchange_attention(self, network: Any, exchange: Callable[[Any], Any]) -> None:
        # `set_attention_backend` does nothing on UNets: their processors do not dispatch.
        network.set_attn_processor({name: exchange(old) for name, old in network.attn_processors.items()})


class TrainedTransformer(TrainedFamily, TransformerFamily):
    """A diffusion transformer that the trainer knows."""

    part = "transformer"

    def fault(self, config: Mapping[str, Any]) -> str | None:
        takes, predicts = config["in_channels"], config.get("out_channels")
        if predicts not in (None, takes):
            return f"it takes {takes} channels and returns {predicts}; they must be equal"
        return None

    def takes_sizes(self, config: Mapping[str, Any]) -> bool:
        return False

    def side(self, config: Mapping[str, Any]) -> int:
        return int(config["sample_size"])

    def patch(self, config: Mapping[str, Any]) -> int:
        return int(config["patch_size"])

    def kohya_base(self, config: Mapping[str, Any]) -> str:
        return "unknown"

    def keep_channels_last(self, module: nn.Module) -> None:
        """There are no images in it: its patches are tokens."""

    def original_names(self, network: Any) -> Iterable[tuple[str, str]]:
        return ()

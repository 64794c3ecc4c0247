"""The drop-in losses, for anybody's training loop.

    criterion = SelfPerceptualLoss(unet, scheduler)          # before training: `unet` is the MSE model
    loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)

The names of the arguments are those of diffusers' training scripts. Equation numbers are those of Lin & Yang,
*Diffusion Model with Perceptual Loss* (arXiv 2401.00110).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from fastsp_kernels import reproject
from fastsp_kernels._checks import check_in_table
from safetensors import SafetensorError
from torch import Tensor, nn

from fastsp import prediction
from fastsp.half_backward import HalfBackward, Misaligned
from fastsp.options import Distance, Reduction, Teacher, TimestepSampling
from fastsp.perceptual import PerceptualNetwork
from fastsp.prediction import PREDICTION_TYPES, expand
from fastsp.schedule import NoiseSchedule, sample_perceptual_timesteps

Features = tuple[Tensor, ...]  # one tensor for each layer

_log = logging.getLogger(__name__)


def choose(name: str, value: str, allowed: Any) -> str:
    """``value`` if the Literal type (or sequence of names) ``allowed`` has it.

    Raises:
        ValueError: it has not; the message names all three.
    """
    names = get_args(allowed) or tuple(allowed)
    if value not in names:
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(names)}")
    return value


def reduce(per_sample: Tensor, reduction: str) -> Tensor:
    """(B,) -> its mean, or itself."""
    return per_sample.mean() if reduction == "mean" else per_sample


class _ScheduledLoss(nn.Module):
    """What both losses share: the schedule, the prediction type and the checks of their arguments."""

    def __init__(self, scheduler: Any, prediction_type: str | None, reduction: str) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.of(scheduler)
        if prediction_type is None:
            prediction_type = getattr(getattr(scheduler, "config", None), "prediction_type", "v_prediction")
        self.prediction_type = choose("prediction_type", prediction_type, PREDICTION_TYPES)
        self.schedule.require(self.prediction_type)
        self.reduction = choose("reduction", reduction, Reduction)

    def _checked_timesteps(self, model_pred: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The timesteps as (B,) int64 on the prediction's device; refuses shapes that do not fit together."""
        if not model_pred.shape == latents.shape == noise.shape:
            raise ValueError(
                f"model_pred {tuple(model_pred.shape)}, latents {tuple(latents.shape)} and noise "
                f"{tuple(noise.shape)} must have one shape"
            )
        if model_pred.shape[0] == 0:
            raise ValueError("the batch is empty")
        if timesteps.ndim == 0:
            timesteps = timesteps.expand(model_pred.shape[0])
        if timesteps.shape != model_pred.shape[:1]:
            raise ValueError(f"timesteps must have shape ({model_pred.shape[0]},), got {tuple(timesteps.shape)}")
        self.schedule.to(model_pred.device)
        if not torch.compiler.is_compiling():
            check_in_table("timesteps", timesteps, len(self.schedule))
        return timesteps.to(model_pred.device, torch.int64)


class DenoisingLoss(_ScheduledLoss):
    """The plain objective, equations (3) and (6): mean squared error of the prediction, in float32.

    It is called as :class:`SelfPerceptualLoss` is, and ignores what it does not need.

    Args:
        scheduler: diffusers scheduler, ``NoiseSchedule`` or 1-D tensor of alpha_bar.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``; None: the scheduler's.
        min_snr_gamma: min-SNR weighting (Hang et al., arXiv 2303.09556); None: no weighting.
        reduction: ``mean``, or ``none`` for one value a sample, (B,).

    Raises:
        ValueError: unknown names; a prediction type that the schedule cannot carry; a gamma that is not positive.
    """

    def __init__(
        self,
        scheduler: Any,
        prediction_type: str | None = None,
        min_snr_gamma: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(scheduler, prediction_type, reduction)
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma {min_snr_gamma!r} must be greater than 0")
        self.min_snr_gamma = min_snr_gamma

    def forward(
        self,
        model_pred: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Scalar float32 loss, or (B,) with ``reduction="none"``. Arguments as for :class:`SelfPerceptualLoss`."""
        del encoder_hidden_states, unused
        timesteps = self._checked_timesteps(model_pred, latents, noise, timesteps)
        a = expand(self.schedule.signal[timesteps], latents)
        s = expand(self.schedule.noise[timesteps], latents)
        target = prediction.target(self.prediction_type, latents.float(), noise.float(), a, s)
        return reduce(self.against(model_pred, target, timesteps), self.reduction)

    def against(self, model_pred: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """The loss where the target is at hand: per-sample mean squared error, weighted by min-SNR. (B,) float32."""
        per_sample = (model_pred.float() - target.float()).square().flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            per_sample = per_sample * self._min_snr_weight(timesteps)
        return per_sample

    def _min_snr_weight(self, timesteps: Tensor) -> Tensor:
        """``min(SNR, gamma)`` for a loss on x0, carried over to the prediction's own loss. (B,) float32."""
        alphas_cumprod = self.schedule.alphas_cumprod[timesteps]
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        clipped = snr.clamp(max=self.min_snr_gamma)
        if self.prediction_type == "v_prediction":
            clipped = clipped / (snr + 1.0)
        elif self.prediction_type == "epsilon":
            clipped = clipped / snr
        return clipped.float()


class SelfPerceptualLoss(_ScheduledLoss):
    """The self-perceptual objective, equation (11), with the model's own frozen copy as the metric.

    Args:
        unet: **the MSE model**, a diffusers ``UNet2DConditionModel``. It is copied (truncated) and never changed. Build
            the criterion before SP training starts, and before DDP, FSDP or compile wrap the UNet; after resuming an SP
            run ``unet`` would be the SP model: use :meth:`from_pretrained` with the MSE model's folder there.
        scheduler: diffusers scheduler, ``NoiseSchedule`` or 1-D tensor of alpha_bar.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``; None: the scheduler's.
        layers: ``mid`` (the paper's choice), ``encoder``, ``decoder`` or ``encoder+mid`` (Table 3).
        distance: ``mse`` or ``mae`` (Table 5).
        timestep_sampling: how t' is drawn: ``uniform``, ``normal`` or ``offset`` (Table 4).
        teacher: ``batched`` runs predicted and real half in one call, whose backward costs the predicted half alone
            (traced once for every new shape); ``split`` in two calls, for the same FLOPs.
        reduction: ``mean``, or ``none`` for one value a sample, (B,).
        dtype: of the perceptual network; None: the UNet's.
        normalize: divide each layer's distance of a sample by the real features' own mean square (``mae``: mean
            absolute value), so that the loss says how far the features are off in parts of their size, whatever the
            network and t'. Ours, not the paper's: for sums with other losses.
        share_frozen: hold the UNet's frozen parameters themselves instead of copies. For LoRA: only the adapters are
            copied, the base is held once. They must stay frozen, and in their dtype.

    The module's parameters are all frozen; it stays in eval mode and follows the device of ``model_pred``.

    Raises:
        ValueError: unknown names; a prediction type that the schedule cannot carry (epsilon with zero terminal SNR); a
            scheduler without alpha_bar; a UNet without mid block, or sharded by FSDP.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        prediction_type: str | None = None,
        layers: str = "mid",
        distance: str = "mse",
        timestep_sampling: str = "uniform",
        teacher: str = "batched",
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        normalize: bool = False,
        share_frozen: bool = False,
    ) -> None:
        super().__init__(scheduler, prediction_type, reduction)
        self.normalize = normalize
        self.distance = choose("distance", distance, Distance)
        self.timestep_sampling = choose("timestep_sampling", timestep_sampling, TimestepSampling)
        self.teacher = choose("teacher", teacher, Teacher)
        self.perceptual_network = PerceptualNetwork(unet, layers=layers, dtype=dtype, share_frozen=share_frozen)
        self._half_backward = HalfBackward(self.perceptual_network)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, scheduler: Any = None, **kwargs: Any) -> SelfPerceptualLoss:
        """The criterion of an MSE model on disk or on the hub, safetensors only.

        Args:
            folder_or_hub_id: a diffusers pipeline (its ``unet/`` and ``scheduler/`` are read); or, of a run of
                ``fastsp train``, one of ``stages/``, with the scheduler of the run.
            scheduler: instead of the pipeline's own.
            **kwargs: the constructor's other keywords.

        Raises:
            ValueError: one of the two is not there, or cannot be loaded.
        """
        folder = Path(folder_or_hub_id).expanduser()
        if folder.is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
            what = "is a single file" if folder.is_file() else "holds adapters"
            raise ValueError(
                f"{folder_or_hub_id} {what}: load the UNet with diffusers (and the adapters into it), and give it to "
                "SelfPerceptualLoss(unet, scheduler, share_frozen=True)"
            )
        if (folder / "config.json").is_file():
            unet_source, subfolder, scheduler_source = str(folder), None, str(folder.parent.parent / "final")
        else:
            unet_source, subfolder, scheduler_source = folder_or_hub_id, "unet", folder_or_hub_id
        try:
            unet = UNet2DConditionModel.from_pretrained(unet_source, subfolder=subfolder, use_safetensors=True)
            if scheduler is None:
                scheduler = DDIMScheduler.from_pretrained(scheduler_source, subfolder="scheduler")
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder_or_hub_id} cannot be loaded as a pipeline of diffusers: {reason}") from error
        return cls(unet, scheduler, **kwargs)

    def train(self, mode: bool = True) -> SelfPerceptualLoss:
        """Stays in eval mode."""
        del mode
        return super().train(False)

    def forward(
        self,
        model_pred: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        noisy_latents: Tensor | None = None,
        perceptual_timesteps: Tensor | None = None,
        generator: torch.Generator | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Equation (11) for one batch.

        Args:
            model_pred: the online network's answer at (x_t, t, c), (B, C, H, W), any float dtype.
            latents: x_0, (B, C, H, W).
            noise: eps, (B, C, H, W).
            timesteps: t, (B,) integers in 0 .. T-1.
            encoder_hidden_states: c, (B, L, D), as the online network got it.
            noisy_latents: x_t as the online network got it; None: equation (1).
            perceptual_timesteps: t', (B,); None: drawn.
            generator: for t'; None: torch's default one.
            added_cond_kwargs: SDXL's ``text_embeds`` and ``time_ids``.
            class_labels: (B, ...) where the UNet takes them.

        Returns:
            Scalar float32 loss, or (B,) with ``reduction="none"``. Gradient flows to ``model_pred`` alone.

        Raises:
            ValueError: shapes that do not fit together, an empty batch, timesteps outside of the schedule (on a CPU).
        """
        timesteps = self._checked_timesteps(model_pred, latents, noise, timesteps)
        if perceptual_timesteps is None:
            perceptual_timesteps = sample_perceptual_timesteps(
                timesteps, len(self.schedule), self.timestep_sampling, generator
            )
        perceptual_timesteps = perceptual_timesteps.to(model_pred.device, torch.int64)
        if self.perceptual_network.device != model_pred.device:
            self.perceptual_network.to(model_pred.device)
        inputs = self.teacher_inputs(
            model_pred, latents, timesteps, perceptual_timesteps, noise=noise, noisy_latents=noisy_latents
        )
        per_sample = self.between(inputs, perceptual_timesteps, encoder_hidden_states, added_cond_kwargs, class_labels)
        return reduce(per_sample, self.reduction)

    def between(
        self,
        inputs: Tensor,
        perceptual_timesteps: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The distance of the features of both halves of ``inputs`` (see :meth:`teacher_inputs`). (B,) float32."""
        conditioning = {
            "timesteps": perceptual_timesteps,
            "encoder_hidden_states": encoder_hidden_states.to(inputs.dtype),
            "added_cond_kwargs": added_cond_kwargs,
            "class_labels": class_labels,
        }
        if self.teacher == "split" or not inputs.requires_grad or torch.compiler.is_compiling():
            return self._distance(*self._split(inputs, conditioning))
        try:
            return self._distance(*self._batched(inputs, conditioning))
        except Misaligned as reason:
            _log.warning("teacher='batched' goes on as 'split': %s", reason)
            self.teacher = "split"
            if self._half_backward.compile_options is not None:
                self.compile_teacher(**self._half_backward.compile_options)
            return self._distance(*self._split(inputs, conditioning))

    def compile_teacher(self, **options: Any) -> None:
        """Hand the perceptual network to ``torch.compile``, whichever way it is called."""
        if self.teacher == "batched":
            self._half_backward.compile_options = options
        else:
            self.perceptual_network.compile(**options)

    def teacher_inputs(
        self, model_pred: Tensor, latents: Tensor, timesteps: Tensor, perceptual_timesteps: Tensor, **source: Any
    ) -> Tensor:
        """``[x^_t' ; x_t']``, (2B, C, H, W) in the network's dtype and layout: equations (7) to (10) by rotation.

        ``source`` is ``noise``, or ``seed`` and ``positions`` to make it again; see
        :func:`fastsp_kernels.reproject`, which is safe at zero terminal SNR and alike for both halves.
        """
        schedule, network = self.schedule, self.perceptual_network
        return reproject(
            model_pred,
            latents,
            timesteps,
            perceptual_timesteps,
            schedule.signal,
            schedule.noise,
            schedule.angles,
            prediction_type=self.prediction_type,
            dtype=network.dtype,
            memory_format=network.memory_format,
            **source,
        )

    def _batched(self, inputs: Tensor, conditioning: dict[str, Any]) -> tuple[Features, Features]:
        """Features of the predicted and of the real half, from one call of the perceptual network."""
        flat = {**conditioning, **{f"added.{k}": v for k, v in (conditioning["added_cond_kwargs"] or {}).items()}}
        both = {name: torch.cat([value, value]) for name, value in flat.items() if isinstance(value, Tensor)}
        halves = [feature.chunk(2) for feature in self._half_backward(inputs, both)]
        return tuple(pred for pred, _ in halves), tuple(real.detach() for _, real in halves)

    def _split(self, inputs: Tensor, conditioning: dict[str, Any]) -> tuple[Features, Features]:
        """The same from two calls: the real half without gradient, then the predicted one."""
        pred, real = inputs.chunk(2)
        with torch.no_grad():
            real_features = self.perceptual_network(real.detach(), **conditioning)
        return self.perceptual_network(pred, **conditioning), real_features

    def _distance(self, pred: Features, real: Features) -> Tensor:
        """Each layer's distance within a sample, then the plain mean over layers. (B,) float32."""
        pairs = [(p.float().flatten(1), r.float().flatten(1)) for p, r in zip(pred, real, strict=True)]
        per_layer = [self._magnitude(p - r) for p, r in pairs]
        if self.normalize:
            sizes = [self._magnitude(r).clamp_min(torch.finfo(torch.float32).tiny) for _, r in pairs]
            per_layer = [distance / size for distance, size in zip(per_layer, sizes, strict=True)]
        return torch.stack(per_layer).mean(0)

    def _magnitude(self, features: Tensor) -> Tensor:
        """Mean square (or absolute value) of a sample's features: (B, N) -> (B,)."""
        return features.abs().mean(1) if self.distance == "mae" else features.square().mean(1)

"""The drop-in losses, for anybody's training loop.

    criterion = SelfPerceptualLoss(unet, scheduler)          # before training: `unet` is the MSE model
    loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)

The names of the arguments are those of diffusers' training scripts. Equation numbers are those of Lin & Yang,
*Diffusion Model with Perceptual Loss* (arXiv 2401.00110).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastsp_kernels import reproject
from torch import Tensor, nn

from fastsp.diffusion.draws import FromGenerator
from fastsp.diffusion.process import process_of
from fastsp.errors import UserError, install_command
from fastsp.families import family_of
from fastsp.options import Anchor, Displacement, Reduction, TimestepSampling, one_of
from fastsp.perceptual.critic import Critic, Heads, Verdict
from fastsp.perceptual.metric import build_metric
from fastsp.perceptual.network import AlwaysEval, unwrap
from fastsp.perceptual.pretrained import find_network, load_network, load_scheduler

_log = logging.getLogger(__name__)
SMALLEST_DISPLACEMENT = 0.1  # |c_f| below it counts as this much: the features' own rounding is what is left there


class _Loss(nn.Module):
    """What both losses share: the noise process, the reduction and the checks of their arguments."""

    def __init__(self, scheduler: Any, prediction_type: str | None, reduction: str) -> None:
        super().__init__()
        self.process = process_of(scheduler, prediction_type)
        self.reduction = one_of("reduction", reduction, Reduction)
        self._seen_times = False

    def _check_shapes(self, model_pred: Tensor, latents: Tensor, noise: Tensor) -> None:
        for name, given in (("model_pred", model_pred), ("latents", latents), ("noise", noise)):
            if not isinstance(given, Tensor):
                hint = ": pass its .sample" if hasattr(given, "sample") else ""
                raise TypeError(f"{name} is a {type(given).__name__}, not a tensor{hint}")
        if not model_pred.shape == latents.shape == noise.shape:
            raise ValueError(
                f"model_pred {tuple(model_pred.shape)}, latents {tuple(latents.shape)} and noise "
                f"{tuple(noise.shape)} must have one shape"
            )
        if model_pred.shape[0] == 0:
            raise ValueError("the batch is empty")

    def _times(self, name: str, t: Tensor, model_pred: Tensor) -> Tensor:
        """Times of the process as (B,) on the prediction's device, checked."""
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, not a tensor of shape ({model_pred.shape[0]},)")
        if t.ndim == 0:
            t = t.expand(model_pred.shape[0])
        if t.shape != model_pred.shape[:1]:
            raise ValueError(f"{name} must have shape ({model_pred.shape[0]},), got {tuple(t.shape)}")
        self.process.to(model_pred.device)
        if not (self._seen_times or t.is_meta or torch.compiler.is_compiling()):
            self._seen_times = True  # the first call alone waits for a GPU
            if t.is_floating_point() and bool((t < 1).all()):
                _log.warning("%s are all below 1: give sigma x 1000, as before any division for the network", name)
        return self.process.from_model_time(name, t).to(model_pred.device)

    def _weights(self, weights: Tensor | None, latents: Tensor) -> Tensor | None:
        """As (B, 1, H, W) float32 on the latents' device, checked."""
        if weights is None:
            return None
        weights = weights[:, None] if weights.ndim == 3 else weights
        if latents.ndim != 4 or weights.shape != (len(latents), 1, *latents.shape[2:]):
            of = f"weights {tuple(weights.shape)} must be (B, H, W) or (B, 1, H, W) of latents {tuple(latents.shape)}"
            raise ValueError(of + (", and have no frames" if latents.ndim == 5 else ""))
        return weights.to(latents.device, torch.float32)

    def _target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network predicts at t, float32."""
        _, _, p, q = self.process.marginal(t).view(4, -1, *[1] * (latents.ndim - 1))
        return p * latents.float() + q * noise.float()

    def _reduced(self, per_sample: Tensor) -> Tensor:
        """(B,) -> its mean, or itself."""
        return per_sample.mean() if self.reduction == "mean" else per_sample


class DenoisingLoss(_Loss):
    """The plain objective, equations (3) and (6): mean squared error of the prediction, in float32.

    It is called as :class:`SelfPerceptualLoss` is, and ignores what it does not need.

    Args:
        scheduler: diffusers scheduler, ``NoiseSchedule``, 1-D tensor of alpha_bar, or a ``Process``.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``; None: the scheduler's.
        min_snr_gamma: min-SNR weighting (Hang et al., arXiv 2303.09556); None: no weighting.
        reduction: ``mean``, or ``none`` for one value per sample, (B,).

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
        weights: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Scalar float32 loss, or (B,) with ``reduction="none"``. Arguments as for :class:`SelfPerceptualLoss`."""
        del encoder_hidden_states, unused
        self._check_shapes(model_pred, latents, noise)
        t = self._times("timesteps", timesteps, model_pred)
        weights = self._weights(weights, latents)
        return self._reduced(self.per_sample(model_pred, self._target(latents, noise, t), t, weights))

    def per_sample(self, model_pred: Tensor, target: Tensor, t: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean squared error of each sample against a target at hand, weighted by min-SNR, and place by place by
        ``weights``, (B, 1, H, W). (B,) float32."""
        loss = squared_error(model_pred, target, weights)
        return loss if self.min_snr_gamma is None else loss * self.process.min_snr_weight(t, self.min_snr_gamma)


class SelfPerceptualLoss(_Loss, AlwaysEval):
    """The self-perceptual objective, equation (11), with the model's own frozen copy as the metric.

    Args:
        unet: **the MSE model**, a diffusers ``UNet2DConditionModel`` or a transformer of :mod:`fastsp.families`. It is
            copied (truncated) and never changed. Build the criterion before SP training starts, and before DDP, FSDP or
            compile wrap the model; after resuming an SP run ``unet`` would be the SP model: use
            :meth:`from_pretrained` with the MSE model's folder there.
        scheduler: diffusers scheduler, ``NoiseSchedule``, 1-D tensor of alpha_bar, or a ``Process``.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``; None: the scheduler's.
        layers: ``mid`` (the paper's choice), ``encoder``, ``decoder`` or ``encoder+mid`` (Table 3); of a transformer
            ``mid``, a depth between 0 and 1, or numbers of blocks, from 1.
        distance: ``mse`` or ``mae`` (Table 5).
        timestep_sampling: how t' is drawn: ``uniform``, ``normal`` or ``offset`` (Table 4); ``same``, as t is;
            ``lower``, evenly below t.
        teacher: how the frozen network is called: ``batched``, predicted and real half in one call whose backward costs
            the predicted half alone (traced once per shape); or ``split``, two calls, for the same FLOPs.
        reduction: ``mean``, or ``none`` for one value per sample, (B,).
        dtype: of the perceptual network; None: the model's.
        normalize: ``none``, or ``sample`` (also False and True): divide each layer's distance by the real features' own
            mean square (``mae``: mean absolute value), so that the loss is relative to their size, whatever the network
            and t'; or ``channel``: divide each channel by its standard deviation over the first real samples. Not in
            the paper. None: ``channel`` for transformers, ``none`` for UNets.
        share_frozen: hold the model's frozen parameters themselves instead of copies. For LoRA: only the adapters are
            copied, the base is held once. They must stay frozen, and in their dtype.
        displacement: ``none``, or ``normalized``: divide by ``max(c_f^2, 0.01)``, where ``c_f`` is how much of the
            prediction's error arrives at t'; by its square root for ``mae``. Near and far t' then count alike. Not in
            the paper. None: ``normalized`` for transformers, ``none`` for UNets.
        metric: the name of a registered metric (:mod:`fastsp.perceptual.metric`).
        **metric_options: what that metric takes beside the keywords above.

    The module's parameters are all frozen; it stays in eval mode and follows the device of ``model_pred``.

    Raises:
        ValueError: unknown names; a prediction type that the schedule cannot carry (epsilon with zero terminal SNR); a
            scheduler without alpha_bar; a network of no such class, without the layers, or sharded by FSDP.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        prediction_type: str | None = None,
        layers: str | float | Sequence[int] = "mid",
        distance: str = "mse",
        timestep_sampling: str = "uniform",
        teacher: str = "batched",
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        normalize: str | bool | None = None,
        share_frozen: bool = False,
        displacement: str | None = None,
        metric: str = "frozen_features",
        **metric_options: Any,
    ) -> None:
        super().__init__(scheduler, prediction_type, reduction)
        self.timestep_sampling = one_of("timestep_sampling", timestep_sampling, TimestepSampling)
        family = family_of(unwrap(unet))
        self.displacement = one_of("displacement", displacement or family.displacement, Displacement)
        self.conditions = family.conditions
        if family.reversed_time:
            self.process = self.process.reversed()
        self.metric = build_metric(
            metric,
            unet,
            layers=layers,
            distance=distance,
            normalize=family.normalize if normalize is None else normalize,
            calls=teacher,
            dtype=dtype,
            share_frozen=share_frozen,
            **metric_options,
        )
        self.train(False)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, scheduler: Any = None, **kwargs: Any) -> SelfPerceptualLoss:
        """The criterion of an MSE model on disk or on the hub, safetensors only, read in ``dtype`` or float32.

        Args:
            folder_or_hub_id: a diffusers pipeline, of which ``transformer/`` or ``unet/``, and ``scheduler/`` are read.
                With fastsp's extra ``train`` also a ``.safetensors`` file of a whole Stable Diffusion model; or one of
                ``stages/`` of a run of ``fastsp train``, finished or not, with the scheduler of the run.
            scheduler: instead of the model's own.
            **kwargs: the constructor's other keywords.

        Raises:
            ValueError: one of the two is not there, or cannot be loaded; the extra is needed and not installed.
        """
        name, folder = str(folder_or_hub_id), Path(folder_or_hub_id).expanduser()
        part = find_network(name, ("transformer",))
        try:
            if part is None:
                from fastsp.models import network_and_scheduler_of, network_of  # takes seconds
        except ModuleNotFoundError as error:
            if (part := find_network(name)) is None:
                command = install_command("train")
                raise UserError(
                    f"SelfPerceptualLoss.from_pretrained needs {error.name} for {name}: {command}"
                ) from None
        if part is not None:
            own = load_scheduler(name) if scheduler is None else scheduler
            return cls(load_network(name, part, kwargs.get("dtype")), own, **kwargs)
        if scheduler is not None and folder.is_dir():
            return cls(network_of(folder), scheduler, **kwargs)
        unet, own = network_and_scheduler_of(name)
        return cls(unet, own if scheduler is None else scheduler, **kwargs)

    @property
    def perceptual_network(self) -> Any:
        """The frozen network of the metric."""
        return self.metric.network

    @property
    def teacher(self) -> str:
        """How it is called: as asked for, or ``split`` where it turned out that it cannot be traced.

        SD3, Flux 2 and Sana are called twice for a batch of one, where PyTorch multiplies by other operators, whatever
        this says. The cost is the same.
        """
        return str(self.metric.calls)

    def compile_teacher(self, **options: Any) -> None:
        """Hand the frozen network to ``torch.compile``, with its keywords; also after the first call."""
        self.metric.compile_network(**options)

    def forward(
        self,
        model_pred: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Any = None,
        noisy_latents: Tensor | None = None,
        perceptual_timesteps: Tensor | None = None,
        generator: torch.Generator | None = None,
        weights: Tensor | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Equation (11) for one batch.

        Args:
            model_pred: the online network's prediction at (x_t, t, c), (B, C, H, W), any float dtype; unpacked, and
                (B, C, F, H, W) of networks for videos.
            latents: x_0, (B, C, H, W).
            noise: eps, (B, C, H, W).
            timesteps: t, (B,), as the scheduler has them: integers in 0 .. T-1; on a flow floats, sigma x 1000.
            encoder_hidden_states: c, (B, L, D), as the online network got it; Z-Image's is a list of (L, D).
            noisy_latents: x_t as the online network got it; None: equation (1).
            perceptual_timesteps: t', (B,); None: drawn.
            generator: for t'; None: torch's default one.
            weights: of every place of the latents, (B, H, W) or (B, 1, H, W), such as a mask of zeros and ones: what a
                place adds to the mean is multiplied by its weight. Features take the average of the weights that
                each of their places covers. None: ones.
            **conditions: what the online network got beside that, under the names of its own forward, such as
                ``added_cond_kwargs`` (SDXL's ``text_embeds`` and ``time_ids``), ``class_labels``,
                ``pooled_projections``, ``guidance`` or ``encoder_attention_mask``. Packed latents' ids may be left out.

        Returns:
            Scalar float32 loss, or (B,) with ``reduction="none"``. Gradient flows to ``model_pred`` alone.

        Raises:
            ValueError: shapes that do not fit together, an empty batch, timesteps outside of the schedule (seen only
                on a CPU), conditioning that the network needs and does not get.
            TypeError: no tensor where one is needed; a condition that the network does not know.
        """
        self._check_shapes(model_pred, latents, noise)
        t = self._times("timesteps", timesteps, model_pred)
        if perceptual_timesteps is None:
            random = FromGenerator(len(t), t.device, generator)
            t_prime = self.process.draw_perceptual(random, t, self.timestep_sampling)
        else:
            t_prime = self._times("perceptual_timesteps", perceptual_timesteps, model_pred)
        if next(self.metric.parameters(), model_pred).device != model_pred.device:
            self.metric.to(model_pred.device)
        if unknown := set(conditions) - set(self.conditions):
            raise TypeError(f"unexpected {', '.join(sorted(unknown))}: this network takes {', '.join(self.conditions)}")
        conditioning = {"encoder_hidden_states": encoder_hidden_states, **conditions}
        noise_source = {"noise": noise, "noisy_latents": noisy_latents, "weights": self._weights(weights, latents)}
        return self._reduced(self.per_sample(model_pred, latents, t, t_prime, conditioning, **noise_source))

    def per_sample(
        self,
        model_pred: Tensor,
        latents: Tensor,
        t: Tensor,
        t_prime: Tensor,
        conditioning: dict[str, Any],
        transition: Tensor | None = None,
        weights: Tensor | None = None,
        **noise_source: Any,
    ) -> Tensor:
        """The loss at given t and t', nothing checked. (B,) float32.

        ``transition`` is the process's from t to t', if it is at hand. ``weights`` are (B, 1, H, W). ``noise_source``
        is ``noise`` and perhaps ``noisy_latents``; or ``seed`` and ``positions``, to draw it again.
        """
        transition, metric = self.process.transition(t, t_prime) if transition is None else transition, self.metric
        layout: dict[str, Any] = {"dtype": metric.dtype, "memory_format": metric.memory_format}
        if frames := latents.shape[2:-2]:  # of videos; to the process a higher image is the same
            model_pred, latents = model_pred.flatten(2, -2), latents.flatten(2, -2)
            noise_source = {k: v.flatten(2, -2) if v is not None and v.ndim > 4 else v for k, v in noise_source.items()}
        inputs = reproject(model_pred, latents, self.process.marginal(t), transition, **noise_source, **layout)
        inputs = inputs.unflatten(2, (*frames, -1)) if frames else inputs
        weighted = {} if weights is None else {"weights": weights}
        distance = metric.distance(inputs, self.process.model_time(t_prime), conditioning, **weighted)
        if self.displacement == "none":
            return distance
        return distance / transition[1].abs().clamp_min(SMALLEST_DISPLACEMENT) ** metric.order


class LearnedPerceptualLoss(SelfPerceptualLoss):
    """Experimental: an anchor, plus what a critic adds that learns in the loop. See :mod:`fastsp.perceptual.critic`.

        criterion = LearnedPerceptualLoss(unet, scheduler)
        optimizer_of_heads = torch.optim.AdamW(criterion.heads.parameters(), lr=1e-4)
        loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)
        (loss + criterion.critic_loss).backward()     # no parameter has a gradient from both

    Args:
        unet, scheduler, prediction_type: see :class:`SelfPerceptualLoss`.
        weight: of the critic's share in the loss. A 0-d tensor may take its place later, on the device.
        anchor: what the share is added to: ``self_perceptual``, or ``mse``, the plain objective.
        **options: other keywords of :class:`SelfPerceptualLoss`; ``heads``, the width of the critic's hidden layers
            (128), and ``seed``, of its initial weights (0).

    Of the module's parameters those of ``heads`` are trained, by whoever calls it; the others are frozen. In many
    processes their gradients are to be averaged like the network's.

    Raises:
        ValueError: as :class:`SelfPerceptualLoss`; no anchor, without which the critic ruins the network; a negative
            weight.
    """

    metric: Critic

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        prediction_type: str | None = None,
        *,
        weight: float | Tensor = 0.02,
        anchor: str = "self_perceptual",
        **options: Any,
    ) -> None:
        super().__init__(unet, scheduler, prediction_type, metric="critic", **options)
        if not weight >= 0:
            raise ValueError(f"weight {weight!r} must be at least 0")
        self.weight, self.anchor = weight, one_of("anchor", anchor, Anchor)
        self.heads.requires_grad_()
        self.verdict: Verdict | None = None  # of the latest call

    @property
    def heads(self) -> Heads:
        """The critic's trainable part, float32."""
        return self.metric.heads

    @property
    def critic_loss(self) -> Tensor:
        """What the heads are to minimise, of the latest call, reduced as the loss is. Gradient flows to them alone."""
        if self.verdict is None:
            raise ValueError("critic_loss is that of a call: call the criterion first")
        return self._reduced(self.verdict.loss)

    def _check_shapes(self, model_pred: Tensor, latents: Tensor, noise: Tensor) -> None:
        super()._check_shapes(model_pred, latents, noise)
        if len(model_pred) == 1:
            raise ValueError("a batch of one is too little for a critic, which would follow every single sample")

    def per_sample(
        self,
        model_pred: Tensor,
        latents: Tensor,
        t: Tensor,
        t_prime: Tensor,
        conditioning: dict[str, Any],
        transition: Tensor | None = None,
        weights: Tensor | None = None,
        target: Tensor | None = None,
        **noise_source: Any,
    ) -> Tensor:
        """As there. ``target`` is what a perfect network predicts; without it ``noise`` is needed."""
        if weights is not None:
            raise ValueError("weights: a critic judges whole pictures")
        transition = self.process.transition(t, t_prime) if transition is None else transition
        anchor = super().per_sample(model_pred, latents, t, t_prime, conditioning, transition, **noise_source)
        self.verdict = self.metric.judge(transition[1])
        if self.anchor == "mse":
            target = self._target(latents, noise_source["noise"], t) if target is None else target
            anchor = squared_error(model_pred, target)
        return anchor + self.weight * F.softplus(self.verdict.gap)


def squared_error(model_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over a sample's elements, weighted by (B, 1, H, W), which need not sum to one. (B,) float32."""
    error = (model_pred.float() - target.float()).square()
    return (error if weights is None else error * weights).flatten(1).mean(1)

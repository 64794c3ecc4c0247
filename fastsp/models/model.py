"""The parts of a text-to-image pipeline, and what fastsp does with them: encode, sample, decode, save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from fastsp.diffusion.conditioning import Conditioning, time_ids
from fastsp.diffusion.latents import fingerprint
from fastsp.diffusion.process import Process, RectifiedFlow, process_of
from fastsp.diffusion.sampling import NO_GUIDANCE, Guidance, ddim, guided_denoiser
from fastsp.diffusion.text import USUAL, TextSettings, token_ids
from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.models.kinds import Kind, kind_named, on_its_device, register_kind
from fastsp.models.lora import Base
from fastsp.models.saving import Files, save_pipeline
from fastsp.models.schedulers import is_flow, trained_scheduler
from fastsp.options import Keep


@dataclass
class TextToImageModel:
    """The parts of a pipeline. Pixel-space models have no VAE: their latents are the pixels in [-1, 1].

    The network is a UNet or a transformer. Stable Diffusion XL has a second text encoder, and a UNet that takes pooled
    features and sizes.
    """

    network: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    vae: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    text_encoder_3: Any = None
    tokenizer_3: Any = None
    text_width: int | None = None
    """Of the text features that the network takes, where it is not loaded and no text encoder tells it."""
    pipeline_class: str | None = None
    """Of diffusers; None: a pixel-space one, Stable Diffusion 1.x and 2.x or XL, by the parts that are there."""
    flow: Mapping[str, Any] | None = None
    """How training spreads the times of a flow: ``fastsp.config.FlowConfig``, by key; None: as by default there."""
    base: Base | None = None
    """Of a network with adapters in training: the model that they belong to."""
    zeros_for_empty_prompt: bool = False
    """Guidance starts from zeros, as SDXL folders ask for by ``force_zeros_for_empty_prompt``, and not from the
    features of the empty prompt, which is what fastsp trains and writes."""
    text: TextSettings = USUAL
    """How captions become features."""
    loaded_prediction_type: str | None = None
    """What the weights as they were loaded predict, where that may differ from what they are trained for."""
    files: Mapping[str, Files] = field(default_factory=dict)
    """Of the frozen parts that were read from folders: :meth:`save` writes these again as they were."""

    @property
    def process(self) -> Process:
        """The noise process, a new one: its tables move to wherever they are used."""
        return self.kind.process(process_of(self.scheduler))

    @property
    def training_process(self) -> Process:
        """The process as training draws its times, of latents of any size: :meth:`of_size` makes it that of one."""
        process = self.process
        return process.training(**(self.flow or {})) if isinstance(process, RectifiedFlow) else process

    def of_size(self, process: Process, latents: Tensor) -> Process:
        """The process for latents (B, C, H, W) of their size: a flow may be shifted by it."""
        return process.of_size(family_of(self.network).tokens(self.network.config, *latents.shape[-2:]))

    @property
    def kind(self) -> Kind:
        """What class of pipelines it belongs to."""
        name = self.pipeline_class
        if name is None:
            latent = "StableDiffusionPipeline" if self.text_encoder_2 is None else "StableDiffusionXLPipeline"
            name = "PixelTextToImagePipeline" if self.vae is None else latent
        kind = kind_named(name, "transformer" if is_flow(self.scheduler.config) else "unet")
        assert kind is not None
        return kind

    @property
    def prediction_type(self) -> str:
        return "flow_prediction" if is_flow(self.scheduler.config) else self.scheduler.config.prediction_type

    @property
    def channels(self) -> int:
        """Of the images: 1 (grey) or 3."""
        return self.network.config["in_channels"] if self.vae is None else self.vae.config.in_channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image's side for one of the latents' side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the network was made for."""
        return family_of(self.network).side(self.network.config) * self.vae_scale_factor

    def latent_shape(self, resolution: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image of ``resolution`` pixels, or of one of such a height and width.

        Raises:
            UserError: ``resolution`` is no multiple of the VAE's factor and of the network's patches, or too large for
                the network.
        """
        family, config, factor = family_of(self.network), self.network.config, self.vae_scale_factor
        height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        of = resolution if isinstance(resolution, int) else f"{width} x {height}"
        if height % factor or width % factor:
            raise UserError(f"resolution {of} must be a multiple of {factor}: the VAE shrinks by it")
        if height % (multiple := factor * family.patch(config)) or width % multiple:
            raise UserError(f"resolution {of} must be a multiple of {multiple}: so large are its patches")
        largest = family.largest_side(config)
        if largest is not None and max(height, width) > largest * factor:
            raise UserError(f"resolution {of} is too large for this network: it has places for {largest * factor}")
        return (family.latent_channels(config), height // factor, width // factor)

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """One, Stable Diffusion XL's and FLUX's two, or Stable Diffusion 3's two or three."""
        every = self.text_encoder, self.text_encoder_2, self.text_encoder_3
        return tuple(encoder for encoder in every if encoder is not None)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """Those of the text encoders."""
        every = self.tokenizer, self.tokenizer_2, self.tokenizer_3
        return tuple(tokenizer for tokenizer in every if tokenizer is not None)

    def reading(self, token_chunks: int | None, clip_skip: int | None) -> TextToImageModel:
        """The same with other text settings, where they are given; UserError for a layer that is not there."""
        text = self.text.but(token_chunks, clip_skip)
        model = replace(self, text=text)
        if (fault := model.text_fault()) is not None:
            raise UserError(f"model.{fault}")
        return model

    def text_fault(self) -> str | None:
        """Why the text settings cannot be used with these text encoders."""
        if not self.kind.has_text_settings and not self.text.usual:
            return f"token_chunks and clip_skip: {self.kind.name} has neither"
        return self.text.fault(self.text_encoders)

    def text_fingerprint(self) -> str:
        """Of the text encoders and of how they are used: what text features depend on."""
        plain = fingerprint(*self.text_encoders)
        if isinstance(self.text_encoder, T5EncoderModel):  # alone: PixArt Alpha and Sigma have one, for 120 and 300
            return f"{plain} {self.tokenizer.model_max_length} tokens"
        return plain if self.text.usual else f"{plain} {self.text.token_chunks} {self.text.clip_skip}"

    def frozen_parts(self) -> tuple[Any, ...]:
        """Text encoders and VAE, which are never trained."""
        return (*self.text_encoders, *([] if self.vae is None else [self.vae]))

    def place(self, device: torch.device | str, compiles: bool = False) -> None:
        """Move the frozen parts to ``device`` and compile those that training calls: text encoders, the VAE's encoder.

        They stay in the dtype in which they were loaded, float32, T5 in bfloat16: Stable Diffusion's VAEs overflow in
        float16.
        """
        for part in self.frozen_parts():
            part.to(device)
        if self.vae is not None:
            self.vae.to(memory_format=torch.channels_last)
        if compiles:
            for part in self.frozen_parts():
                (part.encoder if part is self.vae else part).compile()

    def for_training(self, prediction: Keep = "v_zero_snr", flow: Mapping[str, Any] | None = None) -> TextToImageModel:
        """As fastsp trains it: trailing timesteps; no prompt is the empty prompt.

        Args:
            prediction: "keep" leaves what it predicts and its noise schedule; "v_zero_snr" makes them v-prediction with
                zero terminal SNR, which the first stage teaches a model of epsilon by MSE, as in the paper. A flow
                stays as it is.
            flow: how the times of a flow are spread; None: as by default.

        Raises:
            UserError: a prediction that is to be kept cannot be trained on its schedule; ``flow`` for another process.
        """
        own, scheduler = self.prediction_type, self.scheduler
        if self.kind.is_flow:
            return replace(self, loaded_prediction_type=own, flow=flow)
        if flow is not None:
            raise UserError("model.flow is set, and this model is not trained on a flow: remove it")
        if prediction == "v_zero_snr":
            scheduler = trained_scheduler(scheduler.config)
        try:
            process_of(scheduler)
        except ValueError as error:
            raise UserError(f"model.prediction: {prediction}: {error}") from None
        return replace(self, scheduler=scheduler, zeros_for_empty_prompt=False, loaded_prediction_type=own)

    @torch.no_grad()
    def encode_ids(self, *ids: Tensor) -> Conditioning:
        """Token ids (B, n L) of :func:`token_ids`, by each tokenizer, -> text features, without sizes; see
        :mod:`fastsp.models.kinds`."""
        return self.kind.encode(self, ids)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Texts -> text features, without sizes; padded and truncated to the tokenizers' length, or chunks of it."""
        chunks = self.text.token_chunks
        return self.encode_ids(*(token_ids(tokenizer, prompts, chunks) for tokenizer in self.tokenizers))

    def encode_no_prompt(self) -> Conditioning:
        """What guidance starts from, for one sample: the empty prompt's features, or zeros."""
        empty = self.encode_prompts([""])
        if not self.zeros_for_empty_prompt or empty.text_embeds is None:
            return empty
        return Conditioning(torch.zeros_like(empty.encoder_hidden_states), torch.zeros_like(empty.text_embeds))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (B, C, H, W) in [-1, 1], float32.

        The VAE takes one at a time: for one image of Stable Diffusion XL its activations fill gigabytes.
        """
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            latents = latents.float() / self.vae.config.scaling_factor + shift
            latents = torch.cat([self.vae.decode(one).sample for one in latents.split(1)])
        return latents.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        noise: Tensor,
        num_steps: int,
        guidance: Guidance = NO_GUIDANCE,
        negative_prompt: str = "",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Deterministic DDIM from ``noise``, on a flow Euler's steps: yields ``(x_next, x0^)`` after each step.

        Args:
            prompts: B texts; empty ones sample without condition.
            noise: x_T, (B, C, H, W) float32.
            num_steps: 1 .. T.
            negative_prompt: what guidance starts from; empty: :meth:`encode_no_prompt`.
        """
        conditioning = self._with_own_size(self.encode_prompts(prompts), noise)
        empty, embedded = conditioning, family_of(self.network).embeds_guidance(self.network.config)
        if embedded and negative_prompt:
            raise UserError("this model is told the scale of guidance, and takes no negative prompt")
        if guidance.active and not embedded:
            empty = self.encode_prompts([negative_prompt]) if negative_prompt else self.encode_no_prompt()
        denoise = guided_denoiser(self.network, conditioning, empty, guidance)
        yield from ddim(denoise, self.of_size(self.process, noise), noise, num_steps)

    def generate(
        self,
        prompts: list[str],
        noise: Tensor,
        num_steps: int,
        guidance: Guidance = NO_GUIDANCE,
        negative_prompt: str = "",
    ) -> Tensor:
        """The images at the end of :meth:`sample`, (B, C, H, W) float32 in [-1, 1]."""
        for x_t, _ in self.sample(prompts, noise, num_steps, guidance, negative_prompt):
            latents = x_t
        return self.decode(latents)

    def _with_own_size(self, conditioning: Conditioning, latents: Tensor) -> Conditioning:
        """For SDXL: an image that was never resized or cropped, as diffusers' pipeline has it by default."""
        if not family_of(self.network).takes_sizes(self.network.config):
            return conditioning
        size = torch.tensor(latents.shape[-2:], device=latents.device) * self.vae_scale_factor
        sizes = size.expand(len(latents), 2)
        return replace(conditioning, time_ids=time_ids(sizes, torch.zeros_like(sizes), sizes))

    def pipeline(self) -> DiffusionPipeline:
        """The same parts as a diffusers pipeline."""
        return self.kind.pipeline(self)

    def save(self, folder: Path) -> None:
        """Write a diffusers pipeline folder, safetensors only."""
        save_pipeline(self.pipeline(), folder, self.files)
        self.text.save(folder)


class PixelTextToImagePipeline(DiffusionPipeline):
    """A diffusers pipeline without a VAE, as ``final/`` holds it for pixel-space models.

    ``PixelTextToImagePipeline.from_pretrained("runs/quickstart/final")("a handwritten seven").images[0]``
    """

    model_cpu_offload_seq = "text_encoder->unet->transformer"
    _optional_components = ["unet", "transformer"]  # noqa: RUF012 - it has one of the two

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
    ) -> None:
        super().__init__()
        networks = {"unet": unet, "transformer": transformer}
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, **networks)

    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 25,
        guidance_scale: float = 0.0,
        guidance_rescale: float = 0.0,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample one image for every prompt by deterministic DDIM, on a flow by Euler's steps; no guidance by default.

        Args:
            prompt: one text or several.
            num_inference_steps: of the sampler, trailing spacing.
            guidance_scale: 0: none.
            guidance_rescale: phi of the rescaled guidance.
            latents: initial noise (B, C, H, W); None: drawn from ``generator``.
            generator: for the initial noise; on the pipeline's device or on the CPU.
            output_type: ``pil``, or ``pt`` for float32 (B, C, H, W) in [-1, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        network = self.transformer if self.unet is None else self.unet
        model = TextToImageModel(network, self.text_encoder, self.tokenizer, self.scheduler)
        if latents is None:
            shape = (len(prompts), *model.latent_shape(model.default_resolution))
            latents = randn_tensor(shape, generator=generator, device=self.device)
        images = model.generate(prompts, latents, num_inference_steps, Guidance(guidance_scale, guidance_rescale))
        if output_type != "pt":
            images = self.numpy_to_pil((images / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy())
        return ImagePipelineOutput(images=images)


class Pixel(Kind):
    """fastsp's own, without a VAE. A transformer takes the encoder's pooled features too, and is trained on a flow."""

    name = "PixelTextToImagePipeline"
    has_vae = False

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        seen = model.text_encoder(*on_its_device(model.text_encoder, ids))
        return Conditioning(seen[0], seen.pooler_output if self.is_flow else None)

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        width = model.text_encoder.config.hidden_size
        return width, width if self.is_flow else None

    def pipeline(self, model: Any) -> Any:
        return PixelTextToImagePipeline(**self._named(model))


class PixelFlow(Pixel):
    """With a transformer."""

    network, is_flow = "transformer", True


register_kind(Pixel())
register_kind(PixelFlow())

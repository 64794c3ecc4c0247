"""The diffusers pipeline of pixel-space models, which `final/` of such a run holds."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fastsp.models import TextToImageModel
from fastsp.pictures import to_pil
from fastsp.sampling import Guidance


class PixelTextToImagePipeline(DiffusionPipeline):
    """A text-to-image pipeline without a VAE, as ``final/`` holds it for pixel-space models.

    ``PixelTextToImagePipeline.from_pretrained("runs/quickstart/final")("a handwritten seven").images[0]``
    """

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

    @torch.no_grad()
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
        """Sample one image for every prompt by deterministic DDIM; no guidance by default.

        Args:
            prompt: one text or several.
            num_inference_steps: DDIM steps, trailing spacing.
            guidance_scale: 0: none.
            guidance_rescale: phi of the rescaled guidance.
            latents: initial noise (B, C, H, W); None: drawn from ``generator``.
            generator: for the initial noise.
            output_type: ``pil``, or ``pt`` for float32 (B, C, H, W) in [-1, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        size = self.unet.config.sample_size
        if latents is None:
            shape = (len(prompts), self.unet.config.in_channels, size, size)
            latents = torch.randn(shape, generator=generator, device=self.device)
        model = TextToImageModel(self.unet, self.text_encoder, self.tokenizer, self.scheduler)
        guidance = Guidance(guidance_scale, guidance_rescale)
        images = model.generate(prompts, latents, num_inference_steps, guidance)
        return ImagePipelineOutput(images=images if output_type == "pt" else to_pil(images))

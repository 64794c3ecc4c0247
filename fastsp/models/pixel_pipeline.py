"""The diffusers pipeline of pixel-space models, which `final/` of such a run holds."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.process import process_of
from fastsp.diffusion.sampling import Guidance, ddim, guided_denoiser
from fastsp.families import family_of


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
            generator: for the initial noise; on the pipeline's device or on the CPU.
            output_type: ``pil``, or ``pt`` for float32 (B, C, H, W) in [-1, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        size = family_of(self.unet).side(self.unet.config)
        if latents is None:
            shape = (len(prompts), self.unet.config.in_channels, size, size)
            latents = randn_tensor(shape, generator=generator, device=self.device)
        denoise = guided_denoiser(
            self.unet, self._encode(prompts), self._encode([""]), Guidance(guidance_scale, guidance_rescale)
        )
        process = process_of(self.scheduler).to(latents.device)
        for x_t, _ in ddim(denoise, process, latents, num_inference_steps):
            latents = x_t
        images = latents.clamp(-1.0, 1.0)
        if output_type != "pt":
            images = self.numpy_to_pil((images / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy())
        return ImagePipelineOutput(images=images)

    def _encode(self, prompts: list[str]) -> Conditioning:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Conditioning(self.text_encoder(ids.to(self.text_encoder.device))[0])

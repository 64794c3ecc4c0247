"""channels_last from end to end: a UNet whose images never change their layout on the way.

Converting the weights is not enough on a GPU. PyTorch's GroupNorm makes its input contiguous there and answers in that
layout, and diffusers' transformer blocks make their output contiguous; so nearly every convolution is handed the layout
that cuDNN has to convert first, in the backward once more. And the compiler sees an upsampling as indexing, whose
backward scatters atomic additions over a contiguous image.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class ChannelsLastGroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He, arXiv 1803.08494) of images that answers in the layout of its input.

    Statistics and arithmetic are float32, with one rounding to the input's dtype. Written for compilers: they turn it
    into two kernels, where PyTorch's own would be preceded by a copy. Over channels first and groups second, so that
    neighbouring threads read neighbouring channels.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, dtype and layout; what is no image goes PyTorch's way."""
        if input.ndim != 4:
            return super().forward(input)
        image = input.float()
        of_channels = torch.var_mean(image, dim=(2, 3), correction=0)
        variance, mean = (value.unflatten(1, (self.num_groups, -1)) for value in of_channels)
        group_mean = mean.mean(2, keepdim=True)
        group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
        scale = torch.rsqrt(group_variance + self.eps)
        shift = -group_mean * scale
        if self.affine:
            weight, bias = (p.float().unflatten(0, (self.num_groups, -1)) for p in (self.weight, self.bias))
            scale, shift = scale * weight, shift * weight + bias
        scale, shift = (value.expand_as(mean).flatten(1)[:, :, None, None] for value in (scale, shift))
        return (image * scale + shift).to(input.dtype)


class RepeatingUpsample2D(Upsample2D):
    """An :class:`Upsample2D` that doubles an image by repeating its pixels: the backward adds up four neighbours."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) to (B, C', 2H, 2W) in channels_last; to any other ``output_size``, diffusers' way."""
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        doubled = repeat_pixels(hidden_states)
        return self.conv(doubled) if self.use_conv else doubled


def repeat_pixels(image: Tensor) -> Tensor:
    """Twice as high and wide by nearest neighbours: (B, C, H, W) of any dtype to (B, C, 2H, 2W), channels_last."""
    rows = image.permute(0, 2, 3, 1)
    batch, height, width, channels = rows.shape
    repeated = rows[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    doubled = repeated.reshape(batch, 2 * height, 2 * width, channels).contiguous()  # that of one pixel was a view
    return doubled.permute(0, 3, 1, 2)


def keep_channels_last(unet: nn.Module) -> None:
    """Let a UNet of diffusers keep its images in channels_last, in place; parameters and their names stay.

    What it computes is the same up to float32 rounding.
    """
    for module in unet.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
        elif isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_convert_input)
        elif isinstance(module, Transformer2DModel):
            module.register_forward_hook(_convert_output)
        elif _only_doubles(module):
            module.__class__ = RepeatingUpsample2D


def _only_doubles(module: nn.Module) -> bool:
    """An upsampling by nearest neighbours, with a convolution or without, as those of Stable Diffusion's UNets are."""
    if type(module) is not Upsample2D or module.norm is not None:
        return False
    return module.interpolate and not module.use_conv_transpose and module.name == "conv"


def _convert_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])


def _convert_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Of a transformer block, which answers a tuple with `return_dict=False`."""
    return (output[0].contiguous(memory_format=torch.channels_last), *output[1:])

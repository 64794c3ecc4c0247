"""A frozen base whose linear layers lie in 8 bits, under adapters: a byte per weight, and a scale per output channel.

The weights alone are quantized, symmetrically and by torchao: a layer makes its weight again in the compute dtype
whenever it is called, and once more for the backward, and is otherwise a linear layer with that weight. Codes and
scales are plain tensors, not torchao's subclasses: they are shared, traced and captured like any frozen parameter.

The scales are bfloat16 numbers. No cast of the network to or from bfloat16 changes what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsp.errors import UserError, install_command
from fastsp.families import family_of

LARGEST = 127  # code: symmetric, so that no scale has to be larger for one sign


class Int8Linear(nn.Module):
    """A frozen linear layer with ``weight = codes * scale``, which is there only while the layer is called."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        """Args: codes (out, in) int8; scale (out, 1), in the compute dtype; bias of the layer that they replace."""
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(out, in) in the dtype of the scale, made anew; one rounding in bfloat16, none in float32."""
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), as a linear layer with :attr:`weight`; differentiable with respect to x alone."""
        answer: Tensor = _Linear.apply(x, self.codes, self.scale, self.bias)
        return answer

    def extra_repr(self) -> str:
        return f"in_features={self.codes.shape[1]}, out_features={self.codes.shape[0]}, bias={self.bias is not None}"


@torch.library.custom_op("fastsp::int8_linear_backward", mutates_args=())
def _input_gradient(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The gradient (..., in) of a layer's input, from that (..., out) of its answer.

    One operator, so that a compiler cannot find the forward's ``codes * scale`` in it, and keep that.
    """
    return gradient @ (codes * scale).to(gradient.dtype)


@_input_gradient.register_fake
def _(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], codes.shape[1])


class _Linear(torch.autograd.Function):
    """Keeps the codes for the backward. Plain autograd would keep every layer's weight, and save nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes * scale, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        return _input_gradient(*gradients, codes, scale), None, None, None


def hold_in_int8(network: Any) -> None:
    """Quantize the frozen linear layers in the blocks of a network, in place, a layer at a time.

    What is outside of the blocks stays as it is (embeddings of latents, text and time, the last layers), and so do
    convolutions, norms, biases and all that is trained. What the codes are depends on the weights alone.

    Args:
        network: of a family that the trainer knows, with its adapters if it is to have any.

    Raises:
        UserError: torchao is not installed.
    """
    check_torchao()
    for parent, name, layer in list(_linear_layers(network)):
        setattr(parent, name, Int8Linear(*quantized(layer.weight.detach()), layer.bias))


def check_torchao() -> None:
    """A UserError if it is not installed."""
    if find_spec("torchao") is None:
        command = install_command("int8")
        raise UserError(f"model.lora.base_precision: int8 needs torchao, which is not installed: {command}")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) float32 or bfloat16 -> codes (out, in) int8 from -127 to 127, and scale (out, 1) in that dtype.

    ``|weight - codes * scale| <= scale / 2``: the largest weight of a channel is 127 scales but for the rounding of the
    scale to bfloat16, half a step at most. A channel of zeros stays one.
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    values, channel = weight.float(), (1, weight.shape[1])
    limits = {"quant_min": -LARGEST, "quant_max": LARGEST}
    scale, zero = choose_qparams_affine(
        values,
        MappingType.SYMMETRIC,
        channel,
        torch.int8,
        **limits,
        eps=torch.finfo(torch.bfloat16).tiny,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.int8,
    )
    codes = quantize_affine(values, channel, scale.float(), zero, torch.int8, **limits)
    return codes, scale[:, None].to(weight.dtype)


def _linear_layers(network: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Those that are to be quantized, with their parents and names there. Adapters are trained."""
    for block in family_of(network).blocks(network):
        for parent in block.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and not layer.weight.requires_grad:
                    yield parent, name, layer

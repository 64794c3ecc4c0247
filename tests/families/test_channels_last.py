"""channels_last from end to end: the same numbers, and no convolution that is handed another layout."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from tiny import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, TIME_IDS, tiny_unet
from torch import nn
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fastsp.families.channels_last import ChannelsLastGroupNorm, RepeatingUpsample2D, keep_channels_last, repeat_pixels

CHANNELS_LAST = torch.channels_last


def inputs(kind: str, device: str = "cpu", batch: int = 2) -> tuple[tuple, dict]:
    """Positional and keyword arguments of a tiny UNet."""
    torch.manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, device=device).to(memory_format=CHANNELS_LAST)
    t, states = torch.arange(batch, device=device), torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH, device=device)
    added = None
    if kind == "sdxl":
        added = {
            "text_embeds": torch.randn(batch, POOLED_WIDTH, device=device),
            "time_ids": torch.ones(batch, TIME_IDS, device=device),
        }
    return (sample, t, states), {"added_cond_kwargs": added, "return_dict": False}


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 12, 1, 1), (3, 4, 16, 16)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_group_norm_against_float64(shape, affine, layout):
    torch.manual_seed(0)
    ours = ChannelsLastGroupNorm(4, shape[1], eps=1e-5, affine=affine)
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    image = (3 + torch.randn(shape)).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(shape)
    result = ours(image)
    result.backward(gradient)
    assert result.is_contiguous(memory_format=layout)

    oracle_image = image.detach().double().requires_grad_()
    oracle = copy.deepcopy(ours).double()
    oracle.zero_grad()
    expected = F.group_norm(oracle_image, 4, oracle.weight, oracle.bias, oracle.eps)
    expected.backward(gradient.double())
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(image.grad.double(), oracle_image.grad, rtol=1e-5, atol=2e-5)
    for p, q in zip(ours.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=2e-5)


def test_group_norm_of_bfloat16_has_float32_statistics():
    """Of values whose variance a bfloat16 sum would lose."""
    image = 100 + torch.randn(2, 8, 16, 16).bfloat16()
    norm = ChannelsLastGroupNorm(4, 8, affine=False)
    result, expected = norm(image), F.group_norm(image.double(), 4)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-3)
    rows = torch.randn(2, 8, 5)
    assert torch.equal(norm(rows), F.group_norm(rows, 4)), "rows are not images"


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (64, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_repeated_pixels_are_nearest_neighbours(shape, dtype, layout):
    torch.manual_seed(0)
    ours = torch.randn(shape, dtype=dtype).to(memory_format=layout).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    repeated, expected = repeat_pixels(ours), F.interpolate(theirs, scale_factor=2.0, mode="nearest")
    assert torch.equal(repeated, expected)
    assert repeated.is_contiguous(memory_format=CHANNELS_LAST)
    gradient = torch.randint(-8, 8, expected.shape).to(dtype)  # whose sums are exact, in whatever order
    repeated.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("size", [None, (10, 14), (9, 13)])
@pytest.mark.parametrize("use_conv", [True, False])
def test_an_upsampling_answers_every_size_as_before(size, use_conv):
    torch.manual_seed(0)
    plain = Upsample2D(4, use_conv=use_conv, out_channels=4)
    ours = copy.deepcopy(plain)
    keep_channels_last(ours)
    assert type(ours) is RepeatingUpsample2D
    image = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(ours(image, size), plain(image, size), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"use_conv_transpose": True}, {"norm_type": "rms_norm", "eps": 1e-6}])
def test_other_upsamplings_stay_as_they_are(options):
    module = Upsample2D(4, **options)
    keep_channels_last(module)
    assert type(module) is Upsample2D


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_unet_computes_the_same(kind):
    plain = tiny_unet(kind).to(memory_format=CHANNELS_LAST)
    ours = copy.deepcopy(plain)
    keep_channels_last(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    arguments, keywords = inputs(kind)
    results = []
    for unet in (ours, plain):
        answer = unet(*arguments, **keywords)[0]
        answer.square().mean().backward()
        results.append((answer, torch.cat([p.grad.flatten() for p in unet.parameters()])))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


class CudaConvolutions(TorchDispatchMode):
    """On the meta device, convolutions answer as cuDNN's do: in channels_last where the weight is. Writes down operands
    in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.converted = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.note("forward", args[0])
            return results.contiguous(memory_format=CHANNELS_LAST)
        if func is torch.ops.aten.convolution_backward.default:
            self.note("gradient", args[0])
            self.note("backward", args[1])
            *images, bias = results
            return *(None if image is None else image.to(memory_format=CHANNELS_LAST) for image in images), bias
        return results

    def note(self, role: str, operand: torch.Tensor) -> None:
        self.calls += 1
        if operand.stride(1) != 1:  # a slice of the channels, as the gradient of a skip connection is, will do
            self.converted.append((role, tuple(operand.shape)))


@pytest.mark.parametrize("linear", [True, False])  # the transformers of 2.x and XL, of 1.x
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_no_convolution_is_handed_another_layout(kind, linear):
    converted = {}
    for ours in (True, False):
        unet = tiny_unet(kind, use_linear_projection=linear).to("meta").to(memory_format=CHANNELS_LAST)
        if ours:
            keep_channels_last(unet)
        arguments, keywords = inputs(kind, "meta")
        with CudaConvolutions() as convolutions:
            answer = unet(*arguments, **keywords)[0]
            answer.backward(torch.empty_like(answer, memory_format=CHANNELS_LAST))  # as `reproject`'s backward does
        assert convolutions.calls > 30
        converted[ours] = convolutions.converted
    assert converted[True] == [] and len(converted[False]) > 10


def test_the_backward_of_a_unet_scatters_nothing():
    """Additions to places that the compiler does not know are atomic on a GPU, in an order that changes."""
    scattering = {}
    for ours in (True, False):
        unet = tiny_unet("sd")
        if ours:
            keep_channels_last(unet)
        arguments, keywords = inputs("sd")
        graphs: list[str] = []

        def keep(graph, _inputs, graphs=graphs):
            graphs.append(graph.code)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(
            unet, backend=aot_autograd(fw_compiler=keep, decompositions=core_aten_decompositions())
        )
        compiled(*arguments, **keywords)[0].sum().backward()
        assert len(graphs) == 2
        scattering[ours] = "index_put" in graphs[1] or "upsample" in graphs[1]
    assert scattering == {True: False, False: True}

"""The attention kernel: measured on the network's own shapes, set on its processors, refused where there is none."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny import TEXT_LENGTH, TEXT_WIDTH, batch, tiny_unet
from tiny_transformers import batch_of, tiny_transformer
from torch.profiler import ProfilerActivity, profile

from fastsp.errors import UserError
from fastsp.families import family_of, full_config
from fastsp.models import attention
from fastsp.models.attention import (
    Choice,
    JointAttnProcessor,
    attention_calls,
    available,
    by_length,
    check_available,
    choose_attention,
    kept_choice,
    milliseconds,
    use_attention,
)
from fastsp.models.presets import preset_model
from fastsp.models.published import SD21

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = ((2, 4, 8, 8), (2, TEXT_LENGTH, TEXT_WIDTH))


def forward(unet, shape: tuple[int, int] = (8, 8)) -> torch.Tensor:
    data = batch("sd", 2)
    latents = F.interpolate(data["latents"], shape)
    return unet(latents, data["timesteps"], data["encoder_hidden_states"], return_dict=False)[0]


def operators(unet, shape: tuple[int, int] = (8, 8)) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        forward(unet, shape)
    return {event.key for event in profiler.key_averages()}


def test_the_choice_reaches_the_kernels():
    """By the operators that ran: diffusers' own setter would leave them as they are."""
    unet = tiny_unet()
    fused, plain = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
    expected = forward(unet)
    assert fused in (by_default := operators(unet)) and plain not in by_default
    assert plain in (by_math := operators(use_attention(unet, "math"))) and fused not in by_math
    torch.testing.assert_close(forward(unet), expected, rtol=1e-4, atol=1e-5)
    use_attention(unet, "sdpa")
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_images_of_several_shapes_have_a_kernel_each():
    """An upright and a wide image have queries of the same lengths, a square one others."""
    unet, config = tiny_unet(), full_config(tiny_unet())
    fused, plain = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
    shapes = {(8, 8): "math", (6, 10): "sdpa", (10, 6): "sdpa"}

    def kernel(names: dict[tuple[int, int], str]):
        text = (2, TEXT_LENGTH, TEXT_WIDTH)
        return by_length(
            [
                (Choice(name, {}), lambda shape=shape: attention_calls(config, (2, 4, *shape), text))
                for shape, name in names.items()
            ]
        )

    assert kernel(dict.fromkeys(shapes, "math")) == "math", "nothing to choose"
    lengths = kernel(shapes)
    assert lengths[64] == "math" and lengths[60] == "sdpa"
    expected = {shape: forward(unet, shape) for shape in shapes}
    use_attention(unet, lengths)
    for shape, name in shapes.items():
        ran = operators(unet, shape)
        assert (plain in ran) == (name == "math") and (fused in ran) == (name != "math"), shape
        torch.testing.assert_close(forward(unet, shape), expected[shape], rtol=1e-4, atol=1e-5)
    use_attention(unet, "sdpa")
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_processors_of_other_kinds_stay():
    class Other(AttnProcessor2_0):
        pass

    unet = tiny_unet()
    name = next(iter(unet.attn_processors))
    other = Other()
    unet.set_attn_processor({**unet.attn_processors, name: other})
    use_attention(unet, "math")
    assert unet.attn_processors[name] is other
    assert sum(isinstance(p, attention.ChosenAttnProcessor) for p in unet.attn_processors.values()) > 1


def test_the_shapes_are_the_unet_s_own():
    calls = attention_calls(SD21["unet"], (3, 4, 64, 64), (3, 77, 1024))
    assert calls[(3, 5, 4096, 64), (3, 5, 4096, 64)] == calls[(3, 5, 4096, 64), (3, 5, 77, 64)] == 5
    assert calls[(3, 20, 64, 64), (3, 20, 77, 64)] == 1, "the mid block"
    assert sum(calls.values()) == 32
    assert sum(attention_calls(full_config(tiny_unet("sdxl")), *SHAPES).values()) > 0


def test_measured_on_a_cpu():
    calls = attention_calls(full_config(tiny_unet()), *SHAPES)
    times = milliseconds(("sdpa", "math", "flash", "cudnn"), calls, torch.float32, CPU)
    assert times.keys() >= {"sdpa", "math"} and "cudnn" not in times
    assert all(ms > 0 for ms in times.values())


def test_what_cannot_be_had_is_left_out(monkeypatch):
    """A package that is built for another torch fails at its import, by any error."""
    calls = attention_calls(full_config(tiny_unet()), *SHAPES)

    def attend(name, q, k, v):
        if name != "sdpa":
            raise {"cudnn": RuntimeError, "xformers": ImportError, "flash": AttributeError}[name]("planted")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(attention, "_attend", attend)
    assert milliseconds(("xformers", "sdpa", "flash", "cudnn"), calls, torch.float32, CPU).keys() == {"sdpa"}
    monkeypatch.setattr(attention, "milliseconds", lambda *_: {})
    nothing = choose_attention("auto", full_config(tiny_unet()), *SHAPES, torch.bfloat16, CUDA)
    assert nothing == attention.Choice("sdpa", {})


def test_xformers_is_measured_as_its_processor_calls_it(monkeypatch):
    """(B * heads, length, width), contiguous: diffusers copies the heads out of the features, and back."""
    layouts = []

    def memory_efficient_attention(q, k, v):
        layouts.extend((x.ndim, x.is_contiguous()) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    module = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=module))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    q, k = (torch.randn(2, length, 3 * 8).view(2, length, 3, 8).transpose(1, 2) for length in (16, 5))
    ours = attention._attend("xformers", q, k, k)
    torch.testing.assert_close(ours, attention._attend("sdpa", q, k, k))
    assert layouts == [(3, True)] * 3 and ours.transpose(1, 2).is_contiguous()


def test_the_fastest_is_taken(monkeypatch):
    monkeypatch.setattr(attention, "available", lambda device: ("sdpa", "cudnn", "flash"))

    def measure(names, calls, dtype, device):
        assert sum(calls.values()) > 0 and dtype == torch.bfloat16 and device == CUDA
        return {name: {"sdpa": 2.0, "cudnn": 1.25}[name] for name in names if name != "flash"}

    monkeypatch.setattr(attention, "milliseconds", measure)

    def chosen(wanted):
        return choose_attention(wanted, full_config(tiny_unet()), *SHAPES, torch.bfloat16, CUDA)

    assert chosen("auto").name == "cudnn"
    assert str(chosen("auto")) == "attention: cudnn (cudnn 1.25 ms, sdpa 2 ms a forward and backward)"
    assert chosen("sdpa") == attention.Choice("sdpa", {}), "by name, PyTorch's own choice needs no measurement"
    assert chosen("cudnn").milliseconds == {"cudnn": 1.25, "sdpa": 2.0}
    with pytest.raises(UserError, match="'flash' cannot compute these shapes in bfloat16; use auto"):
        chosen("flash")


TRANSFORMERS = pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
FUSED, PLAIN = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"


def transformer_call(name: str, side: int = 8):
    """A network, and a function that calls it on square latents."""
    network, data = tiny_transformer(name), batch_of(name)
    given = {key: data[key] for key in family_of(network).conditions if key in data}
    latents = F.interpolate(data["latents"], (side, side))
    return network, lambda of=network: family_of(network).call(of, latents, data["timesteps"], given)


@TRANSFORMERS
def test_the_choice_reaches_a_transformer_s_kernels(name):
    """By the operators that ran, and through the compiler."""
    network, call = transformer_call(name)

    def ran() -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
            call()
        return {event.key for event in profiler.key_averages()}

    expected = call()
    assert FUSED in ran()
    for _ in range(2):  # a second stage sets it on a copy that has it
        use_attention(network, "math")
    assert PLAIN in (by_math := ran()) and FUSED not in by_math
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    use_attention(network, "sdpa")
    assert not any(isinstance(p, JointAttnProcessor) for p in network.attn_processors.values())


@TRANSFORMERS
def test_sequences_of_several_lengths_have_a_kernel_each(name):
    """Text and image together are 21 tokens, SD3.5's image alone 16; an image of another size has PyTorch's choice."""
    for side, lengths in ((8, {21: "math", 16: "sdpa"}), (4, {21: "math", 16: "math"})):
        network, call = transformer_call(name, side)
        expected = call()
        use_attention(network, lengths)
        with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
        ran = {event.key for event in profiler.key_averages()}
        assert (PLAIN in ran) == (side == 8)
        assert (FUSED in ran) == (side == 4 or name == "SD3Transformer2DModel")


def test_a_transformer_s_shapes_are_those_of_text_and_image_together():
    """SD3.5's first blocks have a second attention, to the image alone."""
    shapes = (3, 4, 8, 8), (3, 5, 16)
    sd3 = attention_calls(full_config(tiny_transformer("SD3Transformer2DModel")), *shapes)
    assert sd3 == {((3, 2, 21, 8), (3, 2, 21, 8)): 4, ((3, 2, 16, 8), (3, 2, 16, 8)): 1}
    flux = attention_calls(full_config(tiny_transformer("FluxTransformer2DModel")), *shapes)
    assert flux == {((3, 2, 21, 16), (3, 2, 21, 16)): 5}


def test_a_transformer_takes_the_fastest_of_pytorch_s_own(monkeypatch):
    """A preset's too, whose configuration is that of no file, which would have the class's name."""
    monkeypatch.setattr(attention, "available", lambda device: ("sdpa", "cudnn", "xformers"))
    monkeypatch.setattr(attention, "milliseconds", lambda names, *_: dict(zip(names, (2.0, 1.0, 0.5), strict=False)))
    config = full_config(preset_model("digits", 8, 0, "dit").network)

    def chosen(wanted):
        return choose_attention(wanted, config, (2, 1, 8, 8), (2, 16, 64), torch.bfloat16, CUDA)

    assert chosen("auto") == Choice("cudnn", {"sdpa": 2.0, "cudnn": 1.0})
    line = "^attention: 'xformers' is not for a SD3Transformer2DModel; it takes auto, sdpa, cudnn$"
    with pytest.raises(UserError, match=line):
        chosen("xformers")


def test_masks_of_texts_leave_the_kernel_to_pytorch(monkeypatch):
    monkeypatch.setattr(attention, "available", lambda device: ("sdpa", "cudnn", "xformers"))
    config = full_config(tiny_transformer("PixArtTransformer2DModel"))

    def chosen(wanted):
        return choose_attention(wanted, config, (2, 4, 8, 8), (2, 5, 16), torch.bfloat16, CUDA)

    assert chosen("auto") == chosen("sdpa") == Choice("sdpa", {})
    with pytest.raises(
        UserError, match=r"^attention: 'cudnn' is not for a PixArtTransformer2DModel; it takes auto, sdpa$"
    ):
        chosen("cudnn")


def test_on_a_cpu_nothing_is_measured():
    assert choose_attention("auto", full_config(tiny_unet()), *SHAPES, torch.float32, CPU) == attention.Choice(
        "sdpa", {}
    )
    assert available(CPU) == ("sdpa", "math")
    with pytest.raises(UserError, match=r"^attention: 'flash' is not available here; on this cpu there are auto, sdpa"):
        check_available("flash", CPU)
    with pytest.raises(UserError, match=r"^attention: 'magic' is unknown; on this cpu there are auto, sdpa, math$"):
        check_available("magic", CPU)


def test_a_run_keeps_what_was_measured(tmp_path):
    file, question, asked = tmp_path / "attention.json", {"wanted": "auto", "device": "a GPU"}, []

    def make(name="flash", ms=1.0):
        asked.append(name)
        return attention.Choice(name, {name: ms} if ms else {})

    first = kept_choice(file, question, make)
    assert kept_choice(file, question, lambda: make("cudnn")) == first and asked == ["flash"]
    assert kept_choice(file, {**question, "device": "another"}, lambda: make("cudnn")).name == "cudnn"
    unmeasured = tmp_path / "other.json"
    assert kept_choice(unmeasured, question, lambda: make("sdpa", 0)).name == "sdpa" and not unmeasured.exists()


def test_the_compiler_sees_through_it():
    unet = use_attention(tiny_unet(), "math")
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled), forward(unet))


@pytest.mark.gpu
def test_gpu_probe_of_sd21():
    calls = attention_calls(SD21["unet"], (4, 4, 64, 64), (4, 77, 1024))
    times = milliseconds(available(CUDA), calls, torch.bfloat16, CUDA)
    assert times.keys() >= {"sdpa", "flash", "efficient", "math"}
    assert min(times.values()) < times["math"]
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated(), "a run's figures are the training's own"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash", "efficient", "xformers", "math"])
def test_gpu_kernels_agree(name):
    if name not in available(CUDA):
        pytest.skip(f"{name} is not installed")
    query, key = torch.randn(2, 256, 3 * 64), torch.randn(2, 77, 3 * 64)
    heads = [x.view(2, -1, 3, 64).transpose(1, 2) for x in (query, key, key)]
    exact = torch.nn.functional.scaled_dot_product_attention(*heads)
    ours = attention._attend(name, *(x.to(CUDA, torch.bfloat16) for x in heads))
    torch.testing.assert_close(ours.float().cpu(), exact, rtol=0, atol=2e-2)

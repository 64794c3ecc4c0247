"""The seam: what is a known network, through its wrappers, and how a program adds a class of its own."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel
from tiny import tiny_stable_diffusion, tiny_unet
from torch import nn

from fastsp import families
from fastsp.families import family_named, family_of, register
from fastsp.families.unet import UNetFamily
from fastsp.models import load_pipeline
from fastsp.models.attention import attention_calls, use_attention


class Wrapper(nn.Module):
    """As DDP wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_unet_is_known_through_wrappers_and_inheritance():
    class Mine(UNet2DConditionModel):
        pass

    mine = Mine.from_config(tiny_unet().config)
    for network in (tiny_unet(), mine, Wrapper(mine), torch.compile(mine), Wrapper(torch.compile(mine))):
        assert isinstance(family_of(network), UNetFamily)


def test_other_classes_are_refused_in_one_line():
    line = r"^{} is no class of networks that fastsp knows; known: Chroma.*, UNet2DCond.*; fastsp\.families\.register"
    with pytest.raises(ValueError, match=line.format("UNet2DModel")):
        family_of(UNet2DModel.__new__(UNet2DModel))
    with pytest.raises(ValueError, match=line.format("UNetMotionModel")):
        family_of(UNetMotionModel.__new__(UNetMotionModel))
    with pytest.raises(ValueError, match=line.format("str")):
        family_of("a/name")
    with pytest.raises(ValueError, match=line.format("HunyuanDiT2DModel")):
        family_named("HunyuanDiT2DModel")


def test_a_class_from_outside_is_added_by_one_call(monkeypatch):
    """A network that has nothing of a UNet, and what fastsp then does with it."""
    monkeypatch.setattr(families, "_families", dict(families._families))

    class Attention(nn.Module):
        processor = "plain"

    class Toy(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.stack, self.attention = nn.ModuleList([nn.Linear(width, width)]), Attention()

        @classmethod
        def from_config(cls, config):
            return cls(config["width"])

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(*[self.stack[0](x)] * 3)

    class ToyFamily:
        class_name = "Toy"

        def network_class(self):
            return Toy

        def example_inputs(self, config, latents, text):
            return {"x": torch.empty(latents[0], 2, text[1], config["width"])}

        def blocks(self, network):
            return list(network.stack)

        def exchange_attention(self, network, exchange):
            network.attention.processor = exchange(network.attention.processor)

    register(ToyFamily())
    assert family_of(Toy()).blocks(toy := Toy()) == [toy.stack[0]]
    shape = (3, 2, 7, 4)
    assert attention_calls({"_class_name": "Toy", "width": 4}, (3,), (3, 7)) == Counter({(shape, shape): 1})
    assert use_attention(toy, "math").attention.processor == "plain", "a processor of another kind"


@pytest.mark.parametrize(
    ("size", "side"), [(4, 4), ([4, 6], 4), ((8, 4), 4), (None, 64)], ids=["number", "list", "tuple", "null"]
)
def test_the_side_of_a_network(size, side):
    assert family_named("UNet2DConditionModel").side(tiny_unet(sample_size=size).config) == side


@pytest.mark.parametrize("size", [[4, 6], None], ids=["list", "null"])
def test_a_folder_whose_sample_size_is_no_number(tmp_path, size):
    folder = tiny_stable_diffusion(tmp_path / "model", "sd21")
    tiny_unet(sample_size=size, use_linear_projection=True).save_pretrained(folder / "unet")
    model = load_pipeline(str(folder))
    assert model.default_resolution == (256 if size is None else 16)
    model.for_training().save(tmp_path / "saved")
    command = ["-m", "fastsp", "sample", "--model", tmp_path / "saved", "--prompt", "a", "--steps", "1", "--out"]
    done = subprocess.run([sys.executable, *command, tmp_path / "a.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr

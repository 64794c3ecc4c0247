"""The truncated, frozen copy: what it holds, what it refuses, what it leaves alone."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel
from tiny import batch, scheduler, tiny_unet
from torch import nn

from fastsp.loss import SelfPerceptualLoss
from fastsp.models.lora import adapters, add_adapters
from fastsp.perceptual import PerceptualNetwork


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_held_at_stable_diffusion_2_1_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    assert round(count(unet) / 1e6, 1) == 865.9
    assert round(count(PerceptualNetwork(unet)) / 1e6, 1) == 351.7
    assert count(PerceptualNetwork(unet, "encoder")) < count(PerceptualNetwork(unet, "encoder+mid"))
    assert count(PerceptualNetwork(unet, "decoder")) > 0.99 * count(unet)


def test_copies_nothing_of_the_decoder(monkeypatch):
    """Not even for a moment: the up blocks are never deep-copied."""
    unet = tiny_unet()
    decoder = {id(p) for block in (unet.up_blocks, unet.conv_out) for p in block.parameters()}
    copied = set()
    original = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: (copied.add(id(p)), original(p, memo))[1])
    PerceptualNetwork(unet)
    assert copied and not copied & decoder


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("layers", ["mid", "encoder", "decoder", "encoder+mid"])
def test_features_equal_those_of_the_whole_network(kind, layers):
    unet, data, seen = tiny_unet(kind).eval(), batch(kind), []
    blocks = {"encoder": [*unet.down_blocks], "decoder": [*unet.up_blocks], "mid": [unet.mid_block]}
    wanted = [block for part in layers.split("+") for block in blocks[part]]
    network = PerceptualNetwork(unet, layers)
    for block in wanted:
        block.register_forward_hook(lambda _m, _a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    arguments = (data["latents"], data["timesteps"], data["encoder_hidden_states"])
    with torch.no_grad():
        unet(*arguments, added_cond_kwargs=data["added_cond_kwargs"])
        features = network(*arguments, added_cond_kwargs=data["added_cond_kwargs"])
    assert len(features) == len(wanted)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, seen, strict=True))


def test_hooks_checkpointing_and_autocast_wrappers_stay_behind():
    unet = tiny_unet()
    calls = []
    unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    unet.enable_gradient_checkpointing()
    unet.forward = lambda *_, **__: pytest.fail("the wrapper of somebody's loop was called")
    data = batch()
    with torch.no_grad():
        PerceptualNetwork(unet)(data["latents"], data["timesteps"], data["encoder_hidden_states"])
    assert not calls
    assert not any(getattr(module, "gradient_checkpointing", False) for module in PerceptualNetwork(unet).modules())
    assert unet.mid_block.gradient_checkpointing


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_adapters_are_copied_and_their_base_is_shared(kind):
    unet, sched, data = tiny_unet(kind), scheduler(), batch(kind)
    add_adapters(unet, rank=4, alpha=8, target_modules=["to_q", "to_out.0"])
    for adapter in adapters(unet).values():
        torch.nn.init.normal_(adapter, std=0.3)
    copied, shared, split = (
        SelfPerceptualLoss(unet, sched, share_frozen=share, teacher=teacher)
        for share, teacher in ((False, "batched"), (True, "batched"), (True, "split"))
    )
    base = {p.data_ptr() for p in unet.parameters() if not p.requires_grad}
    own = [p for p in shared.parameters() if p.data_ptr() not in base]
    assert {id(p) for p in own} == {id(p) for p in adapters(shared.perceptual_network.truncated).values()}
    assert not any(p.requires_grad for p in shared.parameters())

    pred = torch.randn(3, 4, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(copied(pred, **data), pred)[0]
    with torch.no_grad():
        for adapter in adapters(unet).values():
            adapter.add_(1.0)  # training goes on, the metric stays
    for criterion in (shared, split):
        torch.testing.assert_close(torch.autograd.grad(criterion(pred, **data), pred)[0], expected)
    assert shared.teacher == "batched"  # it has not fallen back
    with pytest.raises(ValueError, match="share_frozen keeps the network's dtype"):
        SelfPerceptualLoss(unet, sched, share_frozen=True, dtype=torch.bfloat16)


def test_wrapped_networks_are_unwrapped():
    unet, data = tiny_unet(), batch()
    plain = PerceptualNetwork(unet)
    arguments = (data["latents"], data["timesteps"], data["encoder_hidden_states"])
    for wrapped in (torch.compile(unet), nn.DataParallel(unet)):
        assert torch.equal(PerceptualNetwork(wrapped)(*arguments)[0], plain(*arguments)[0])


def test_dtype():
    assert PerceptualNetwork(tiny_unet(), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert PerceptualNetwork(tiny_unet().to(torch.bfloat16)).dtype == torch.bfloat16


def test_refusals():
    without_mid = tiny_unet(mid_block_type=None)
    with pytest.raises(ValueError, match="layers 'mid': this network has no mid block; use one of encoder, decoder"):
        PerceptualNetwork(without_mid)
    with pytest.raises(ValueError, match="layers 'up' is unknown: use one of mid, encoder"):
        PerceptualNetwork(tiny_unet(), "up")
    data = batch()
    for layers in ("encoder", "decoder"):
        network = PerceptualNetwork(without_mid, layers)
        assert network(data["latents"], data["timesteps"], data["encoder_hidden_states"])


SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
UNCONDITIONAL = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
VIDEO = {
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: nn.Linear(1, 1), "Linear is no class of networks that fastsp knows"),
        (lambda: UNet2DModel(**SMALL, **UNCONDITIONAL), "UNet2DModel is no class"),
        (lambda: UNetMotionModel(**SMALL, **VIDEO), "UNetMotionModel is no class"),
        (lambda: tiny_unet(in_channels=9), "takes 9 channels and predicts 4; .* inpainting"),
        (lambda: SimpleNamespace(unet=tiny_unet()), "SimpleNamespace is no network, but it has one: give its unet"),
    ],
    ids=["other", "unconditional", "video", "inpainting", "pipeline"],
)
def test_what_is_no_such_network_is_refused_when_the_loss_is_built(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        SelfPerceptualLoss(wrong(), scheduler())
    assert "\n" not in str(caught.value)


def test_peft_s_wrapper_is_taken_off():
    unet, data = tiny_unet(), batch()
    arguments = (data["latents"], data["timesteps"], data["encoder_hidden_states"])
    expected = PerceptualNetwork(unet)(*arguments)[0]
    wrapped = peft.get_peft_model(unet, peft.LoraConfig(target_modules=["to_q"]))  # B = 0: it changes nothing yet
    assert torch.equal(PerceptualNetwork(wrapped)(*arguments)[0], expected)


@pytest.mark.parametrize("teacher", ["batched", "split"])
def test_a_missing_condition_is_the_caller_s_error_and_changes_nothing(teacher):
    data, pred = batch("sdxl"), torch.randn(3, 4, 8, 8, requires_grad=True)
    criterion = SelfPerceptualLoss(tiny_unet("sdxl"), scheduler(), teacher=teacher)
    with pytest.raises(ValueError, match=r"added_cond_kwargs lacks text_embeds and time_ids, which this UNet"):
        criterion(pred, **data | {"added_cond_kwargs": None})
    with pytest.raises(ValueError, match="added_cond_kwargs lacks time_ids"):
        criterion(pred, **data | {"added_cond_kwargs": {"text_embeds": data["added_cond_kwargs"]["text_embeds"]}})
    with pytest.raises(RuntimeError):  # text features of another width: found inside the network
        criterion(pred, **data | {"encoder_hidden_states": torch.randn(3, 5, 7)})
    assert criterion.teacher == teacher
    assert criterion(pred, **data) > 0 and criterion.teacher == teacher
    labelled = SelfPerceptualLoss(tiny_unet(num_class_embeds=3), scheduler(), teacher=teacher)
    with pytest.raises(ValueError, match="class_labels is missing"):
        labelled(pred, **batch())
    assert labelled(pred, **batch(), class_labels=torch.tensor([0, 1, 2])) > 0 and labelled.teacher == teacher

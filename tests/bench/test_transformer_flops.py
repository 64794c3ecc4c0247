"""The count of a transformer's step: the frozen part costs what its products and its attention cost, either way."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step" / "transformer_flops.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("transformer_flops", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_sd3(script, dual: tuple[int, ...] = ()):
    config = {"num_layers": 4, "num_attention_heads": 4, "caption_projection_dim": 256, "pos_embed_max_size": 32}
    others = {"pooled_projections": (2048,)}
    config |= {"dual_attention_layers": dual, "joint_attention_dim": 64}
    return script.Case("small", "SD3Transformer2DModel", config, 16, (20, 64), others)


def test_a_step_costs_three_forwards_of_the_frozen_part_and_one_more_of_its_attention(script):
    case = small_sd3(script)
    (mse, whole), (step, part) = (script.gflop(case, 256, layers) for layers in (None, "mid"))
    assert 0.5 < part / whole < 0.52, "two of four blocks, and the embeddings"
    inner, tokens = 256, 256 + 20
    attention = 2 * 4 * tokens**2 * inner / 1e9  # of two blocks, two products of (N, N, C), a multiply-add as two
    assert step - mse == pytest.approx(3 * part + attention, rel=0.03)
    batched, _ = script.gflop(case, 256, "mid", teacher="batched")
    assert 0.99 * step < batched < step, "its graph leaves out what follows the feature: the head, the text's last part"


def test_a_second_attention_in_the_first_blocks_makes_the_frozen_half_more_than_half(script):
    (_, whole), (_, part) = (script.gflop(small_sd3(script, (0, 1)), 256, layers) for layers in (None, "mid"))
    assert part / whole > 0.55


def test_adapters_make_the_ratio_larger(script):
    case = small_sd3(script)
    full, lora = (
        script.gflop(case, 256, "mid", some)[0] / script.gflop(case, 256, None, some)[0] for some in (False, True)
    )
    assert 1.4 < full < lora < 2

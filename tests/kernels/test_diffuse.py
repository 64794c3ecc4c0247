"""diffuse against float64, as reference, interpreted and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import triton
from fastsp_kernels import diffuse
from fastsp_kernels.diffuse import _diffuse_kernel, _diffuse_reference
from kernel_oracles import (
    BLOCKS,
    DTYPES,
    LAYOUTS,
    PREDICTION_TYPES,
    SEEDED_SHAPES,
    SHAPES,
    VIEWS,
    assert_rounded,
    diffuse64,
    make_tables,
    per_sample_view,
    stream_noise,
)
from torch import Tensor

ATOL = 2e-6  # of float32 arithmetic on values of about 5
SEED = -12345


def make_case(
    device: torch.device,
    shape: tuple[int, ...] = (3, 4, 7, 6),
    dtype: torch.dtype = torch.float32,
    prediction_type: str = "v_prediction",
) -> Any:
    """(latents, noise, timesteps, tables, marginal), with t at both ends of the table."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    timesteps = torch.tensor([49, 0, 20], device=device)[: shape[0]]
    tables = make_tables()
    return latents, noise, timesteps, tables, tables.marginal(timesteps, prediction_type)


def seeded_arguments(device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """A seed, and positions on both sides of 2^32."""
    return torch.tensor(SEED, device=device), torch.arange(2**32 - 1, 2**32 - 1 + batch, device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64(device: torch.device, shape: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    latents, noise, timesteps, tables, marginal = make_case(device, shape, dtype)
    noisy, target = diffuse(latents, marginal, noise=noise, memory_format=layout)
    assert target is not None
    oracle_noisy, oracle_velocity = diffuse64(latents, noise, timesteps, tables)
    assert_rounded(noisy, oracle_noisy, ATOL)
    assert_rounded(target, oracle_velocity, ATOL)
    assert noisy.dtype == dtype and target.dtype == torch.float32
    assert noisy.is_contiguous(memory_format=layout) and target.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_noise_agrees_with_the_reference_to_the_last_bit(
    device: torch.device, prediction_type: str, layout: torch.memory_format
) -> None:
    latents, noise, _, _, marginal = make_case(device, SHAPES[2], prediction_type=prediction_type)
    actual = diffuse(latents, marginal, noise=noise, memory_format=layout)
    expected = [torch.empty(latents.shape, memory_format=layout) for _ in range(2)]
    _diffuse_reference(expected, latents.cpu(), noise.cpu(), None, None, marginal.cpu())
    assert all(torch.equal(one.cpu(), other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once_to_nearest(
    device: torch.device, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.bfloat16 and request.node.callspec.params["device"] == "interpreter":
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    latents, noise, _, _, marginal = make_case(device, SHAPES[2])
    exact, _ = diffuse(latents, marginal, noise=noise)
    rounded, _ = diffuse(latents, marginal, noise=noise, dtype=dtype)
    assert torch.equal(rounded, exact.to(dtype)) and not torch.equal(rounded.float(), exact)


def test_samples_further_apart_than_32_bits(device: torch.device) -> None:
    """Offsets are 64 bits wide: the last sample starts 3 * 2^30 elements behind the first."""
    if device.type == "cuda":
        pytest.skip("six gigabytes of memory that a CPU never touches")
    behind = 1 << 30
    memory = torch.from_numpy(np.zeros(3 * behind + 6, np.float16))  # given by the system when it is written
    values, marginal = torch.randn(4, 1, 2, 3).half(), make_tables().marginal(torch.arange(4))
    latents = memory.as_strided((4, 1, 2, 3), (behind, 6, 3, 1)).copy_(values)
    noise = torch.randn(4, 1, 2, 3)
    actual, _ = diffuse(latents, marginal, noise=noise, dtype=torch.float32)
    assert torch.equal(actual, diffuse(values, marginal, noise=noise, dtype=torch.float32)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_dtype_is_chosen(device: torch.device, layout: torch.memory_format) -> None:
    latents, noise, timesteps, tables, marginal = make_case(device)
    options = {"dtype": torch.float16, "memory_format": layout, "with_target": False}
    noisy, target = diffuse(latents, marginal, noise=noise.bfloat16(), **options)
    assert noisy.dtype == torch.float16 and target is None
    assert_rounded(noisy, diffuse64(latents, noise.bfloat16(), timesteps, tables)[0], ATOL)


def test_strides_do_not_matter(device: torch.device) -> None:
    latents, noise, _, _, marginal = make_case(device)
    expected = diffuse(latents, marginal, noise=noise)
    views = (latents.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), noise.repeat_interleave(2, 3)[..., ::2])
    assert not any(view.is_contiguous() for view in views)
    actual = diffuse(views[0], marginal, noise=views[1])
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_coefficients_and_positions_do_not_matter(device: torch.device, view: str) -> None:
    latents, _, _, _, marginal = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    marginal, positions = (per_sample_view(values, view) for values in (marginal, positions))
    assert not marginal.is_contiguous() and not positions.is_contiguous()
    actual = diffuse(latents, marginal, seed=seed, positions=positions)
    expected = diffuse(latents, marginal.clone(), seed=seed, positions=positions.clone())
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_ends_of_a_zero_terminal_snr_table(device: torch.device) -> None:
    latents, noise, _, tables, _ = make_case(device)
    noisy, target = diffuse(latents, tables.marginal(torch.full((3,), 49, device=device)), noise=noise)
    assert torch.equal(noisy, noise) and torch.equal(target, -latents)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_is_given_with_the_reference_noise(
    device: torch.device, prediction_type: str, layout: torch.memory_format
) -> None:
    shape = SHAPES[2]
    latents, _, timesteps, tables, marginal = make_case(device, shape, prediction_type=prediction_type)
    seed, positions = seeded_arguments(device, shape[0])
    noisy, target = diffuse(latents, marginal, seed=seed, positions=positions, memory_format=layout)
    noise = stream_noise(SEED, positions, shape[1:])
    oracle_noisy, oracle_velocity = diffuse64(latents, noise, timesteps, tables)
    oracle = {"v_prediction": oracle_velocity, "epsilon": noise.double(), "sample": latents.cpu().double()}
    assert_rounded(noisy, oracle_noisy, 3e-6)
    assert_rounded(target, oracle[prediction_type], 3e-6)
    assert noisy.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SEEDED_SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_noise_at_odd_sizes(device: torch.device, shape: tuple, layout: torch.memory_format) -> None:
    latents, _, timesteps, tables, marginal = make_case(device, shape, prediction_type="epsilon")
    seed, positions = seeded_arguments(device, shape[0])
    noisy, target = diffuse(latents, marginal, seed=seed, positions=positions, memory_format=layout)
    noise = stream_noise(SEED, positions, shape[1:])
    assert_rounded(target, noise.double(), 3e-6)
    assert_rounded(noisy, diffuse64(latents, noise, timesteps, tables)[0], 3e-6)


@pytest.mark.parametrize("shape", SEEDED_SHAPES)
@pytest.mark.usefixtures("interpreter")
def test_block_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    latents, _, _, _, marginal = make_case(torch.device("cpu"), shape, prediction_type="epsilon")
    seed, positions = seeded_arguments(latents.device, shape[0])
    expected = diffuse(latents, marginal, seed=seed, positions=positions)
    for block in BLOCKS:
        monkeypatch.setattr(_diffuse_kernel, "configs", [triton.Config({"BLOCK": block})])
        actual = diffuse(latents, marginal, seed=seed, positions=positions)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_split_batch_draws_the_same(device: torch.device) -> None:
    latents, _, _, _, marginal = make_case(device, prediction_type="epsilon")
    seed, positions = seeded_arguments(device, 3)
    whole = diffuse(latents, marginal, seed=seed, positions=positions)
    parts = [
        diffuse(latents[some], marginal[:, some], seed=seed, positions=positions[some])
        for some in (slice(0, 1), slice(1, 3))
    ]
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(whole, zip(*parts, strict=True), strict=True))


def test_first_position_stands_for_all(device: torch.device) -> None:
    latents, _, _, _, marginal = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    expected = diffuse(latents, marginal, seed=seed, positions=positions)
    assert torch.equal(diffuse(latents, marginal, seed=seed, positions=positions[0])[0], expected[0])


def test_one_sample_of_a_strided_batch(device: torch.device) -> None:
    """A batch of one, whose batch stride means nothing."""
    latents, noise, _, _, marginal = make_case(device)
    noisy, _ = diffuse(latents[1::3], marginal[:, 1::3], noise=noise[1::3])
    assert torch.equal(noisy, diffuse(latents, marginal, noise=noise)[0][1:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(0, 4, 7, 6)}, r"latents must be a non-empty \(B, C, H, W\) tensor"),
        ({"latents": torch.zeros(3, 4, 7)}, r"latents must be a non-empty \(B, C, H, W\) tensor"),
        ({"latents": torch.zeros(3, 4, 7, 6).double()}, "latents must be torch.float32 or .* got torch.float64"),
        (
            {"noise": torch.zeros(3, 4, 6, 7)},
            r"noise must be .* \(3, 4, 7, 6\) on cpu, got .* \(3, 4, 6, 7\)",
        ),
        ({"noise": torch.zeros(3, 4, 7, 6).int()}, "noise must be torch.float32 or .* got torch.int32"),
        ({"noise": torch.zeros(3, 4, 7, 6, device="meta")}, "noise must be .* on cpu, got .* on meta"),
        ({"noise": None}, "either noise, or both seed and positions"),
        ({"noise": [0.0]}, "noise must be a tensor, got list"),
        (
            {"marginal": torch.zeros(4, 2)},
            r"marginal must be torch.float32 of shape \(4, 3\) on cpu, got torch.float32 of shape \(4, 2\)",
        ),
        (
            {"marginal": torch.zeros(4, 3).double()},
            r"marginal must be torch.float32 of shape \(4, 3\) on cpu, got torch.float64",
        ),
        ({"dtype": torch.int32}, "dtype must be torch.float32 or .* got torch.int32"),
        ({"memory_format": torch.preserve_format}, "memory_format must be"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    latents, noise, _, _, marginal = make_case(torch.device("cpu"))
    with pytest.raises(ValueError, match=message) as caught:
        diffuse(**{"latents": latents, "noise": noise, "marginal": marginal, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "positions", "message"),
    [
        (torch.tensor([1]), torch.arange(3), r"seed must be torch.int64 of shape \(\) .* shape \(1,\)"),
        (torch.tensor(1.0), torch.arange(3), r"seed must be torch.int64 of shape \(\) .* got torch.float32"),
        (torch.tensor(1), torch.arange(4), r"positions must be torch.int64 of shape \(3,\) .* of shape \(4,\)"),
        (torch.tensor(1), torch.tensor(0.0), r"positions must be torch.int64 of shape \(3,\) .* got torch.float32"),
    ],
)
def test_wrong_seeds(seed: Tensor, positions: Tensor, message: str) -> None:
    latents, _, _, _, marginal = make_case(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        diffuse(latents, marginal, seed=seed, positions=positions)


@pytest.mark.parametrize("seeded", [False, True])
def test_opcheck(device: torch.device, seeded: bool) -> None:
    latents, noise, _, _, marginal = make_case(device)
    source = (None, *seeded_arguments(device, 3)) if seeded else (noise, None, None)
    torch.library.opcheck(torch.ops.fastsp.diffuse.default, (latents, *source, marginal, True, torch.bfloat16, 1))


def seeded_step(latents: Tensor, marginal: Tensor, seed: Tensor, first: Tensor) -> Tensor:
    noisy, target = diffuse(latents, marginal, seed=seed, positions=first)
    return (noisy + target).sum(dim=(1, 2, 3))


def test_one_compilation_for_all_batch_sizes(device: torch.device) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(seeded_step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (6, 7, 8, 9):  # no other size of the inputs, which the compiler would take for the batch
        latents, t = torch.randn(batch, 4, 5, 3, device=device), torch.arange(batch, device=device)
        seed, positions = seeded_arguments(device, batch)
        given = (latents, make_tables().marginal(t), seed, positions[0])
        torch.testing.assert_close(compiled(*given), seeded_step(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_break(device: torch.device, backend: str) -> None:
    latents, _, _, _, marginal = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    given = (latents, marginal, seed, positions[0])
    compiled = torch.compile(seeded_step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*given), seeded_step(*given))

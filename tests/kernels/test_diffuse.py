"""diffuse and diffuse_seeded against float64, as reference, interpreted and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from fastsp_kernels import Stream, diffuse, diffuse_seeded, random_integers
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


def make_case(device: torch.device, shape: tuple[int, ...] = (3, 4, 7, 6), dtype: torch.dtype = torch.float32) -> Any:
    """(latents, noise, timesteps, tables), with t at both ends of the table."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    timesteps = torch.tensor([49, 0, 20], device=device)[: shape[0]]
    return latents, noise, timesteps, make_tables(device)


def seeded_arguments(device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """A seed, and positions on both sides of 2^32."""
    return torch.tensor(SEED, device=device), torch.arange(2**32 - 1, 2**32 - 1 + batch, device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64(device: torch.device, shape: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    latents, noise, timesteps, tables = make_case(device, shape, dtype)
    noisy, target = diffuse(latents, noise, timesteps, *tables.levels, target="v_prediction", memory_format=layout)
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
    latents, noise, timesteps, tables = make_case(device, SHAPES[2])
    actual = diffuse(latents, noise, timesteps, *tables.levels, target=prediction_type, memory_format=layout)
    arguments = [tensor.cpu() for tensor in (latents, noise, timesteps)]
    levels = [table.cpu() for table in tables.levels]
    code = PREDICTION_TYPES.index(prediction_type)
    expected = _diffuse_reference(*arguments, None, None, *levels, code, torch.float32, LAYOUTS.index(layout))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once_to_nearest(
    device: torch.device, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.bfloat16 and request.node.callspec.params["device"] == "interpreter":
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    latents, noise, timesteps, tables = make_case(device, SHAPES[2])
    exact, _ = diffuse(latents, noise, timesteps, *tables.levels)
    rounded, _ = diffuse(latents, noise, timesteps, *tables.levels, dtype=dtype)
    assert torch.equal(rounded, exact.to(dtype)) and not torch.equal(rounded.float(), exact)


def test_samples_further_apart_than_32_bits(device: torch.device) -> None:
    """Offsets are 64 bits wide: the last sample starts 3 * 2^30 elements behind the first."""
    if device.type == "cuda":
        pytest.skip("six gigabytes of memory that a CPU never touches")
    behind = 1 << 30
    memory = torch.from_numpy(np.zeros(3 * behind + 6, np.float16))  # given by the system when it is written
    values, timesteps = torch.randn(4, 1, 2, 3).half(), torch.arange(4)
    latents = memory.as_strided((4, 1, 2, 3), (behind, 6, 3, 1)).copy_(values)
    tables, noise = make_tables(device), torch.randn(4, 1, 2, 3)
    actual, _ = diffuse(latents, noise, timesteps, *tables.levels, dtype=torch.float32)
    assert torch.equal(actual, diffuse(values, noise, timesteps, *tables.levels, dtype=torch.float32)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_dtype_is_chosen(device: torch.device, layout: torch.memory_format) -> None:
    latents, noise, timesteps, tables = make_case(device)
    noisy, target = diffuse(
        latents, noise.bfloat16(), timesteps, *tables.levels, dtype=torch.float16, memory_format=layout
    )
    assert noisy.dtype == torch.float16 and target is None
    assert_rounded(noisy, diffuse64(latents, noise.bfloat16(), timesteps, tables)[0], ATOL)


def test_strides_do_not_matter(device: torch.device) -> None:
    latents, noise, timesteps, tables = make_case(device)
    expected = diffuse(latents, noise, timesteps, *tables.levels, target="v_prediction")
    views = (latents.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), noise.repeat_interleave(2, 3)[..., ::2])
    assert not any(view.is_contiguous() for view in views)
    actual = diffuse(*views, timesteps, *tables.levels, target="v_prediction")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_timesteps_do_not_matter(device: torch.device, view: str) -> None:
    latents, noise, timesteps, tables = make_case(device)
    timesteps = per_sample_view(timesteps, view)
    actual = diffuse(latents, noise, timesteps, *tables.levels, target="v_prediction")
    expected = diffuse(latents, noise, timesteps.clone(), *tables.levels, target="v_prediction")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_positions_do_not_matter(device: torch.device, view: str) -> None:
    latents, _, _, tables = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    positions = per_sample_view(positions, view)
    actual = diffuse_seeded(latents, seed, positions, *tables.levels, target="v_prediction")
    expected = diffuse_seeded(latents, seed, positions.clone(), *tables.levels, target="v_prediction")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_ends_of_a_zero_terminal_snr_table(device: torch.device) -> None:
    latents, noise, _, tables = make_case(device)
    last = torch.full((3,), 49, device=device)
    noisy, target = diffuse(latents, noise, last, *tables.levels, target="v_prediction")
    assert torch.equal(noisy, noise) and torch.equal(target, -latents)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_is_given_with_the_reference_draws(
    device: torch.device, prediction_type: str, layout: torch.memory_format
) -> None:
    shape = SHAPES[2]
    latents, _, _, tables = make_case(device, shape)
    seed, positions = seeded_arguments(device, shape[0])
    noisy, target, timesteps = diffuse_seeded(
        latents, seed, positions, *tables.levels, target=prediction_type, memory_format=layout
    )
    noise = stream_noise(SEED, positions, shape[1:])
    assert timesteps.tolist() == random_integers(SEED, Stream.TIMESTEP, positions.cpu(), 50).tolist()
    oracle_noisy, oracle_velocity = diffuse64(latents, noise, timesteps, tables)
    oracle = {"v_prediction": oracle_velocity, "epsilon": noise.double(), "sample": latents.cpu().double()}
    assert_rounded(noisy, oracle_noisy, 3e-6)
    assert_rounded(target, oracle[prediction_type], 3e-6)
    assert noisy.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SEEDED_SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_noise_at_odd_sizes(device: torch.device, shape: tuple, layout: torch.memory_format) -> None:
    latents, _, _, tables = make_case(device, shape)
    seed, positions = seeded_arguments(device, shape[0])
    options = {"target": "epsilon", "memory_format": layout}
    noisy, target, timesteps = diffuse_seeded(latents, seed, positions, *tables.levels, **options)
    noise = stream_noise(SEED, positions, shape[1:])
    assert_rounded(target, noise.double(), 3e-6)
    assert_rounded(noisy, diffuse64(latents, noise, timesteps, tables)[0], 3e-6)


@pytest.mark.parametrize("shape", SEEDED_SHAPES)
@pytest.mark.usefixtures("interpreter")
def test_block_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    latents, _, _, tables = make_case(torch.device("cpu"), shape)
    arguments = (latents, *seeded_arguments(latents.device, shape[0]), *tables.levels)
    expected = diffuse_seeded(*arguments, target="epsilon")
    for block in BLOCKS:
        monkeypatch.setattr(_diffuse_kernel, "block", block)
        actual = diffuse_seeded(*arguments, target="epsilon")
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_split_batch_draws_the_same(device: torch.device) -> None:
    latents, _, _, tables = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    whole = diffuse_seeded(latents, seed, positions, *tables.levels, target="epsilon")
    parts = [
        diffuse_seeded(latents[some], seed, positions[some], *tables.levels, target="epsilon")
        for some in (slice(0, 1), slice(1, 3))
    ]
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(whole, zip(*parts, strict=True), strict=True))


def test_first_position_stands_for_all(device: torch.device) -> None:
    latents, _, _, tables = make_case(device)
    seed, positions = seeded_arguments(device, 3)
    expected = diffuse_seeded(latents, seed, positions, *tables.levels)
    actual = diffuse_seeded(latents, seed, positions[0], *tables.levels)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])


def test_one_sample_of_a_strided_batch(device: torch.device) -> None:
    """A batch of one, whose batch stride means nothing."""
    latents, noise, timesteps, tables = make_case(device)
    noisy, _ = diffuse(latents[1::3], noise[1::3], timesteps[1::3], *tables.levels)
    assert torch.equal(noisy, diffuse(latents, noise, timesteps, *tables.levels)[0][1:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(0, 4, 7, 6)}, r"latents must be a non-empty \(B, C, H, W\) tensor"),
        ({"latents": torch.zeros(3, 4, 7)}, r"latents must be a non-empty \(B, C, H, W\) tensor"),
        ({"latents": torch.zeros(3, 4, 7, 6).double()}, "dtype of latents must be float32"),
        ({"noise": torch.zeros(3, 4, 6, 7)}, "noise must have the latents' shape"),
        ({"noise": torch.zeros(3, 4, 7, 6).int()}, "dtype of noise must be float32"),
        ({"noise": torch.zeros(3, 4, 7, 6, device="meta")}, "noise must be on cpu"),
        ({"timesteps": torch.zeros(2, dtype=torch.int64)}, "timesteps must be int64 of shape"),
        ({"timesteps": torch.zeros(3)}, "timesteps must be int64 of shape"),
        ({"timesteps": torch.tensor([0, 49, 50])}, "timesteps must be from 0 to 49, got 50"),
        ({"timesteps": torch.tensor([0, -1, 49])}, "timesteps must be from 0 to 49, got -1"),
        ({"noise": None}, "noise must be a tensor, got NoneType"),
        ({"signal": torch.zeros(100)[::2]}, r"signal must be .*, contiguous, got .* and strides \(2,\)"),
        ({"signal": torch.zeros(50).double()}, "signal must be torch.float32"),
        ({"noise_level": torch.zeros(49)}, "noise_level must be torch.float32"),
        ({"target": "velocity"}, "'velocity' is not one of v_prediction, epsilon, sample"),
        ({"dtype": torch.int32}, "dtype must be float32"),
        ({"memory_format": torch.preserve_format}, "memory_format must be"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    latents, noise, timesteps, tables = make_case(torch.device("cpu"))
    arguments = {"latents": latents, "noise": noise, "timesteps": timesteps}
    arguments |= {"signal": tables.signal, "noise_level": tables.noise_level, **change}
    with pytest.raises(ValueError, match=message) as caught:
        diffuse(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "positions", "message"),
    [
        (torch.tensor([1]), torch.arange(3), "seed must be a 0-d int64 tensor"),
        (torch.tensor(1.0), torch.arange(3), "seed must be a 0-d int64 tensor"),
        (torch.tensor(1), torch.arange(4), "positions must be int64 of shape"),
        (torch.tensor(1), torch.tensor(0.0), "positions must be int64 of shape"),
    ],
)
def test_wrong_seeds(seed: Tensor, positions: Tensor, message: str) -> None:
    latents, _, _, tables = make_case(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        diffuse_seeded(latents, seed, positions, *tables.levels)


@pytest.mark.parametrize("seeded", [False, True])
def test_opcheck(device: torch.device, seeded: bool) -> None:
    latents, noise, timesteps, tables = make_case(device)
    given = (None, None, *seeded_arguments(device, 3)) if seeded else (noise, timesteps, None, None)
    torch.library.opcheck(torch.ops.fastsp.diffuse.default, (latents, *given, *tables.levels, 0, torch.bfloat16, 1))


def test_one_compilation_for_all_batch_sizes(device: torch.device) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    tables = make_tables(device)

    def step(latents: Tensor, seed: Tensor, first: Tensor) -> Tensor:
        noisy, target, timesteps = diffuse_seeded(latents, seed, first, *tables.levels, target="v_prediction")
        return (noisy + target).sum(dim=(1, 2, 3)) + timesteps

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 4, 5):
        latents = torch.randn(batch, 4, 5, 3, device=device)
        seed, positions = seeded_arguments(device, batch)
        torch.testing.assert_close(compiled(latents, seed, positions[0]), step(latents, seed, positions[0]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_break(device: torch.device, backend: str) -> None:
    latents, _, _, tables = make_case(device)
    seed, positions = seeded_arguments(device, 3)

    def step(latents: Tensor, seed: Tensor, first: Tensor) -> Tensor:
        noisy, target, timesteps = diffuse_seeded(latents, seed, first, *tables.levels, target="v_prediction")
        return (noisy + target).sum(dim=(1, 2, 3)) + timesteps

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(latents, seed, positions[0]), step(latents, seed, positions[0]))

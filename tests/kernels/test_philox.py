"""The random numbers: bits against Python integers and the published vectors, distributions against theory."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from fastsp_kernels import Stream, philox_4x32_10, random_integers, random_normals, random_uniforms, random_words
from fastsp_kernels._triton import jit, tl, uses_triton
from fastsp_kernels.philox import (
    MASK,
    _random_words_reference,
    box_muller,
    box_muller_device,
    philox_words_device,
    random_normals_device,
)
from kernel_oracles import VIEWS, normals, per_sample_view, philox_words
from torch import Tensor


@pytest.fixture
def stats():
    """Of a package that a machine with a GPU may lack."""
    return pytest.importorskip("scipy.stats")


# Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1234, -7, 2**63 - 1, -(2**63)]
POSITIONS = [0, 3, 2**32 - 1, 2**32, 2**32 + 3, 2**62 + 1]


@jit
def _words_kernel(output_ptr, seed_ptr, position_ptr, blocks_ptr, STREAM: tl.constexpr):
    lane = tl.arange(0, 4)
    w0, w1, w2, w3 = philox_words_device(tl.load(seed_ptr), STREAM, tl.load(position_ptr), tl.load(blocks_ptr + lane))
    tl.store(output_ptr + 4 * lane, w0.to(tl.int64))
    tl.store(output_ptr + 4 * lane + 1, w1.to(tl.int64))
    tl.store(output_ptr + 4 * lane + 2, w2.to(tl.int64))
    tl.store(output_ptr + 4 * lane + 3, w3.to(tl.int64))


@jit
def _normals_kernel(normals_ptr, seed_ptr, position_ptr, STREAM: tl.constexpr):
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    tl.store(normals_ptr + tl.arange(0, 16), random_normals_device(seed, STREAM, position, 1, 16))


@jit
def _box_muller_kernel(output_ptr, words_ptr):
    lane = tl.arange(0, 4)
    z0, z1 = box_muller_device(tl.load(words_ptr + lane).to(tl.uint32), tl.load(words_ptr + 4 + lane).to(tl.uint32))
    tl.store(output_ptr + lane, z0)
    tl.store(output_ptr + 4 + lane, z1)


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(device: torch.device, counter: tuple[int, ...], key: tuple[int, ...], expected: tuple) -> None:
    seed = torch.tensor(signed(key[0] | key[1] << 32), device=device)
    position = torch.tensor(signed(counter[2] | counter[3] << 32), device=device)
    if uses_triton(seed):
        words = torch.empty(4, 4, dtype=torch.int64, device=device)
        blocks = torch.full((4,), counter[0], device=device)
        _words_kernel[(1,)](words, seed, position, blocks, STREAM=counter[1])
        assert words.tolist() == [list(expected)] * 4
    else:
        words = philox_4x32_10(*(torch.tensor(word) for word in (*key, *counter)))
        assert [word.item() for word in words] == list(expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("count", [1, 11, 257])
def test_words_match_python_integers(device: torch.device, seed: int, as_tensor: bool, count: int) -> None:
    positions = torch.tensor(POSITIONS, device=device)
    words = random_words(torch.tensor(seed, device=device) if as_tensor else seed, Stream.NOISE, positions, count)
    assert words.dtype == torch.int64 and words.is_contiguous()
    assert words.tolist() == [philox_words(seed, 2, position, count) for position in POSITIONS]


class Elsewhere(torch.Tensor):
    """A tensor that is not on a CPU, as far as the reference can tell."""

    is_cpu = False  # type: ignore[assignment]


@pytest.mark.parametrize("count", [1, 11, 257])
def test_the_reference_draws_the_same_where_numpy_does_not_reach(count: int) -> None:
    positions, seed = torch.tensor(POSITIONS), torch.tensor(SEEDS[-1])
    elsewhere = _random_words_reference(seed, positions.as_subclass(Elsewhere), 2, count)
    assert isinstance(elsewhere, Elsewhere) and elsewhere.is_contiguous()
    assert elsewhere.tolist() == _random_words_reference(seed, positions, 2, count).tolist()


def test_an_int_seed_counts_by_its_64_bits() -> None:
    positions = torch.tensor(POSITIONS)
    assert torch.equal(random_words(2**64 - 7, 2, positions, 5), random_words(-7, 2, positions, 5))


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_positions_do_not_matter(device: torch.device, view: str) -> None:
    positions = per_sample_view(torch.tensor(POSITIONS, device=device), view)
    assert torch.equal(random_words(5, 1, positions, 9), random_words(5, 1, positions.clone(), 9))
    assert torch.equal(random_normals(5, 1, positions, (9,)), random_normals(5, 1, positions.clone(), (9,)))


def test_no_positions(device: torch.device) -> None:
    positions = torch.empty(0, dtype=torch.int64, device=device)
    assert random_words(5, 1, positions, 9).shape == (0, 9)
    assert random_normals(5, 1, positions, (3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4, 8, 9)])
def test_normals_match_python(device: torch.device, shape: tuple[int, ...]) -> None:
    """Odd numbers of them too, and of more than one Triton program a sample."""
    positions = torch.tensor(POSITIONS, device=device)
    drawn = random_normals(-7, Stream.NOISE, positions, shape)
    count = math.prod(shape)
    expected = [normals(philox_words(-7, 2, position, count + count % 2))[:count] for position in POSITIONS]
    assert drawn.dtype == torch.float32 and drawn.shape == (len(POSITIONS), *shape) and drawn.is_contiguous()
    drawn = drawn.cpu().double().view(len(POSITIONS), count)
    assert (drawn - torch.tensor(expected, dtype=torch.float64)).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    seed, positions = torch.tensor(-7, device=device), torch.tensor(POSITIONS, device=device)
    torch.library.opcheck(torch.ops.fastsp.random.default, (seed, positions, int(Stream.NOISE), 11, dtype))


def test_one_compilation_for_all_batch_sizes(device: torch.device) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def draw(positions: Tensor) -> Tensor:
        return random_words(3, 1, positions, 7) + random_normals(3, 1, positions, (7,))

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 4, 5):
        positions = torch.arange(batch, device=device)
        assert torch.equal(compiled(positions), draw(positions))
    assert counter.frame_count == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiled_words_are_the_same(as_tensor: bool) -> None:
    """Also where the compiler takes an int seed for a symbol, which it does from the second one on."""
    positions = torch.tensor(POSITIONS)
    compiled = torch.compile(random_words, fullgraph=True)
    for seed in SEEDS:
        given = torch.tensor(seed) if as_tensor else seed
        assert torch.equal(compiled(given, 2, positions, 257), random_words(seed, 2, positions, 257))


@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_blocks_are_the_same(seed: int) -> None:
    """Inductor's own code for the reference, where somebody calls that himself."""
    key = torch.tensor(seed)
    position = torch.tensor(POSITIONS)[:, None]
    halves = (key & MASK, key >> 32 & MASK, torch.arange(65)[None], 2, position & MASK, position >> 32 & MASK)
    drawn = torch.stack(torch.compile(philox_4x32_10, fullgraph=True)(*halves), dim=-1).flatten(1)
    assert torch.equal(drawn, random_words(seed, 2, torch.tensor(POSITIONS), 4 * 65))


@pytest.mark.parametrize("position", [5, 2**32 + 5])
def test_device_draws_match_python(device: torch.device, position: int) -> None:
    seed, positions = torch.tensor(-7, device=device), torch.tensor([position], device=device)
    integer = random_integers(seed, Stream.EVALUATION, positions, 1000)
    if uses_triton(seed):
        drawn = torch.empty(16, device=device)
        _normals_kernel[(1,)](drawn, seed, positions, STREAM=int(Stream.EVALUATION))
    else:
        drawn = random_normals(seed, Stream.EVALUATION, positions, (20,))[0, 4:]
    words = philox_words(-7, 7, position, 20)
    assert integer.item() == words[0] * 1000 >> 32
    assert (drawn.cpu().double() - torch.tensor(normals(words), dtype=torch.float64)[4:]).abs().max() < 3e-6


def test_box_muller_is_finite_at_the_ends(device: torch.device) -> None:
    """Words 0 and 2^32 - 1 for either uniform: the logarithm of 2^-24, that of 1, and angles 0 and almost 2 pi."""
    words = torch.tensor([0, 0, 2**32 - 1, 2**32 - 1, 0, 2**32 - 1, 0, 2**32 - 1], device=device)
    if uses_triton(words):
        drawn = torch.empty(8, device=device)
        _box_muller_kernel[(1,)](drawn, words)
    else:
        drawn = torch.cat(box_muller(words[:4], words[4:]))
    pairs = words.view(2, 4).T.flatten().tolist()
    expected = torch.tensor(normals(pairs), dtype=torch.float64).view(4, 2).T.flatten()
    assert (drawn.cpu().double() - expected).abs().max() < 3e-6
    assert drawn[:2].cpu().tolist() == pytest.approx([5.768, 5.768], abs=1e-3)


def test_streams_and_positions_are_distinct() -> None:
    positions = torch.tensor([0, 1, 2**32, 2**33])
    words = torch.cat([random_words(0, stream, positions, 4) for stream in Stream])
    assert len(words.flatten().unique()) == words.numel()


def test_a_split_batch_draws_the_same() -> None:
    positions = torch.arange(2**32 - 3, 2**32 + 3)
    whole = random_normals(9, Stream.NOISE, positions, (4, 5, 3))
    assert torch.equal(
        whole, torch.cat([random_normals(9, Stream.NOISE, part, (4, 5, 3)) for part in positions.split(2)])
    )


def test_count_only_adds_words() -> None:
    positions = torch.tensor([7])
    assert torch.equal(random_words(1, 0, positions, 3), random_words(1, 0, positions, 9)[:, :3])
    assert torch.equal(
        random_normals(1, 0, positions, (3,)), random_normals(1, 0, positions, (8,))[:, :3]
    )  # an odd number of normals: half a pair is dropped


def test_streams_are_those_of_every_run_so_far() -> None:
    """Another number would change what a run draws, and so what a resumed one goes on with."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "TIMESTEP": 0,
        "PERCEPTUAL_TIMESTEP": 1,
        "NOISE": 2,
        "CAPTION_DROPOUT": 3,
        "SHUFFLE": 4,
        "CROP_AND_FLIP": 5,
        "VAE_POSTERIOR": 6,
        "EVALUATION": 7,
        "CAPTION": 8,
    }


def test_uniforms_are_the_upper_24_bits_of_a_word(device: torch.device) -> None:
    drawn = random_uniforms(-7, 3, torch.tensor([2**32 + 3], device=device), 5)
    assert drawn.tolist() == [[(word >> 8) / 2**24 for word in philox_words(-7, 3, 2**32 + 3, 5)]]


def test_integers_are_uniform(stats) -> None:
    drawn = random_integers(42, Stream.TIMESTEP, torch.arange(50_000), 1000)
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert stats.chisquare(torch.bincount(drawn, minlength=1000).numpy()).pvalue > 1e-3


def test_bits_are_uniform(stats) -> None:
    words = random_words(42, Stream.NOISE, torch.arange(4), 16384)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((words >> shift) & 255).flatten(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_uniforms_and_normals_follow_their_distributions(stats) -> None:
    uniforms = random_uniforms(42, Stream.CAPTION_DROPOUT, torch.arange(20_000), 1).flatten()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 1e-3
    drawn = random_normals(42, Stream.NOISE, torch.arange(8), (4, 32, 32)).double().flatten()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    correlation = (drawn[0::2] * drawn[1::2]).mean()  # of the two normals of a pair
    assert abs(correlation) < 4 / len(drawn[0::2]) ** 0.5


@pytest.mark.gpu
def test_reference_draws_the_same_words_on_a_gpu() -> None:
    """The reference itself on CUDA tensors."""
    arguments = (torch.tensor(-7), torch.tensor(POSITIONS), 2, 33)
    on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in arguments]
    assert torch.equal(_random_words_reference(*on_gpu).cpu(), _random_words_reference(*arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_words(0, 0, torch.zeros(2, 2, dtype=torch.int64), 4), "positions must be a 1-D int64 tensor"),
        (lambda: random_words(0, 0, torch.zeros(2), 4), "positions must be torch.int64 .* got torch.float32"),
        (lambda: random_words(0, 0, torch.arange(2), 0), "count must be"),
        (lambda: random_words(0, 0, 3, 1), "positions must be a tensor, got int"),
        (lambda: random_words(1.5, 0, torch.arange(2), 4), "seed must be an int or a 0-d int64 tensor, got float"),
        (lambda: random_words(torch.tensor([0]), 0, torch.arange(2), 4), r"seed must be torch.int64 of shape \(\)"),
        (
            lambda: random_words(torch.tensor(0, device="meta"), 0, torch.arange(2), 4),
            "seed must be .* on cpu, got .* on meta",
        ),
        (lambda: random_integers(0, 0, torch.arange(2), 0), "bound must be"),
        (lambda: random_integers(0, 0, torch.arange(2), 2**31), "bound must be"),
    ],
)
def test_wrong_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_largest_bound() -> None:
    bound = 2**31 - 1
    drawn: Tensor = random_integers(3, 0, torch.arange(64), bound)
    assert drawn.tolist() == [philox_words(3, 0, position, 1)[0] * bound >> 32 for position in range(64)]

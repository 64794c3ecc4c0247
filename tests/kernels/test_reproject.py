"""reproject against the paper's equations 7 to 10 in float64, as reference, interpreted and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import triton
from fastsp_kernels import diffuse, reproject
from fastsp_kernels.reproject import _reproject_kernel, _reproject_reference
from kernel_oracles import (
    BLOCKS,
    DTYPES,
    LAYOUTS,
    PREDICTION_TYPES,
    SEEDED_SHAPES,
    SHAPES,
    VIEWS,
    Tables,
    assert_rounded,
    levels64,
    make_tables,
    per_sample_view,
    reproject64,
    stream_noise,
)
from torch import Tensor

ATOL = 3e-6  # of float32 arithmetic on values of about 5
CONVERTED_ATOL = 4e-5  # the same after a division by a_t or s_t, which are at least 0.1 in these tables


class Case:
    """Inputs of one call, with t and t' at both ends of the table."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, ...] = (3, 4, 7, 6),
        dtype: torch.dtype = torch.float32,
        last: float = 0.01,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model_pred, self.latents, self.noise, self.weight, other = (
            torch.randn(shape, generator=generator).to(device, dtype) for _ in range(5)
        )
        self.weight = torch.cat((self.weight, other))
        self.t = torch.tensor([49, 0, 20], device=device)[: shape[0]]
        self.t2 = torch.tensor([0, 49, 21], device=device)[: shape[0]]
        self.tables: Tables = make_tables(last=last)

    def coefficients(self, prediction_type: str = "v_prediction", **times: Tensor) -> dict[str, Tensor]:
        """The arguments `marginal` and `transition`."""
        t, t2 = times.get("t", self.t), times.get("t2", self.t2)
        transition = self.tables.transition(t, t2, prediction_type)
        return {"marginal": self.tables.marginal(t, prediction_type), "transition": transition}

    def run(self, prediction_type: str = "v_prediction", **changes: Any) -> Tensor:
        times = {name: changes.pop(name) for name in ("t", "t2") if name in changes}
        images = {"model_pred": self.model_pred, "latents": self.latents, "noise": self.noise}
        return reproject(**{**images, **self.coefficients(prediction_type, **times), **changes})

    def oracle(self, prediction_type: str, model_pred: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        model_pred = self.model_pred.cpu().double() if model_pred is None else model_pred
        noise = self.noise if noise is None else noise
        return reproject64(model_pred, self.latents, noise, self.t, self.t2, self.tables, prediction_type)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64(device: torch.device, shape: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    case = Case(device, shape, dtype, last=0.0)
    pair = case.run(memory_format=layout)
    assert_rounded(pair, case.oracle("v_prediction"), ATOL)
    assert pair.dtype == dtype and pair.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("given_x_t", [False, True])
def test_prediction_types(device: torch.device, prediction_type: str, given_x_t: bool) -> None:
    case = Case(device)
    given = diffuse(case.latents, case.tables.marginal(case.t), noise=case.noise)[0] if given_x_t else None
    pair = case.run(prediction_type=prediction_type, noisy_latents=given, dtype=torch.float32)
    assert_rounded(pair, case.oracle(prediction_type), CONVERTED_ATOL)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_noise_agrees_with_the_reference_to_the_last_bit(
    device: torch.device, prediction_type: str, layout: torch.memory_format
) -> None:
    """On a GPU as well: a product and a sum are all that is computed."""
    case = Case(device, SHAPES[2])
    pair = case.run(prediction_type, memory_format=layout)
    images = [tensor.cpu() for tensor in (case.model_pred, case.latents, case.noise)]
    coefficients = [tensor.cpu() for tensor in case.coefficients(prediction_type).values()]
    expected = torch.empty(pair.shape, memory_format=layout)
    _reproject_reference(expected, *images[:2], None, images[2], None, None, *coefficients)
    assert torch.equal(pair.cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_strides_mix(device: torch.device, layout: torch.memory_format) -> None:
    """Every input in a dtype and with strides of its own gives, bit for bit, what contiguous float32 copies give."""
    case = Case(device)
    inputs = {
        "model_pred": case.model_pred.bfloat16().to(memory_format=torch.channels_last),
        "latents": case.latents.half().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "noise": case.noise.repeat_interleave(2, 3)[..., ::2],
        "noisy_latents": case.noise.bfloat16()[:1].expand(3, -1, -1, -1),
    }
    copies = {name: tensor.float().contiguous() for name, tensor in inputs.items()}
    actual = case.run(**inputs, dtype=torch.float32, memory_format=layout)
    assert torch.equal(actual, case.run(**copies, dtype=torch.float32))
    assert actual.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_coefficients_and_positions_do_not_matter(device: torch.device, view: str) -> None:
    """Forward and backward; `clone` lays the same values side by side."""
    case = Case(device)
    case.model_pred.requires_grad_()
    values = {**case.coefficients("epsilon"), "positions": torch.arange(2**32 - 1, 2**32 + 2, device=device)}
    views = {name: per_sample_view(tensor, view) for name, tensor in values.items()}
    assert not any(tensor.is_contiguous() for tensor in views.values())
    results = []
    for given in (views, {name: tensor.clone() for name, tensor in views.items()}):
        pair = case.run(**given, noise=None, seed=torch.tensor(-99, device=device))
        results.append((pair, *torch.autograd.grad(pair, case.model_pred, case.weight)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_equal_where_the_timesteps_are(
    device: torch.device, prediction_type: str, dtype: torch.dtype
) -> None:
    case = Case(device)
    predicted, real = case.run(t2=case.t, prediction_type=prediction_type, dtype=dtype).chunk(2)
    assert torch.equal(predicted, real)
    predicted, real = case.run(prediction_type=prediction_type, dtype=dtype).chunk(2)
    assert not torch.equal(predicted, real)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("given_x_t", [False, True])
def test_halves_are_equal_where_the_answer_is_the_target(
    device: torch.device, prediction_type: str, given_x_t: bool
) -> None:
    case = Case(device, SHAPES[2])
    noisy, target = diffuse(case.latents, case.tables.marginal(case.t, prediction_type), noise=case.noise)
    given = noisy.bfloat16() if given_x_t else None
    predicted, real = case.run(model_pred=target, prediction_type=prediction_type, noisy_latents=given).chunk(2)
    assert torch.equal(predicted, real)


def test_neighbouring_timesteps_keep_their_digits(device: torch.device) -> None:
    """With x_t = 0 the result is sin(d) v^; from float32 angles it would be off by 1e-5 and more."""
    case = Case(device, last=0.0)
    t = torch.tensor([0, 200, 998], device=device)
    case.tables = make_tables(length=1000)
    pair = case.run(t=t, t2=t + 1, noisy_latents=torch.zeros_like(case.latents))
    angle, next_angle = (torch.atan2(s, a) for a, s in (levels64(case.tables, time) for time in (t, t + 1)))
    sine = (next_angle - angle).sin()
    relative = (pair[:3].cpu().double() / (sine * case.model_pred.cpu().double()) - 1).abs().max()
    assert relative < 3e-7


def test_zero_terminal_snr_is_safe_at_every_pair_of_timesteps(device: torch.device) -> None:
    """At alpha_bar = 1 as well: v divides by nothing."""
    case = Case(device, (4, 4, 3, 3))
    case.tables = make_tables(first=1.0, last=0.0)
    case.t, case.t2 = (torch.tensor(ends, device=device) for ends in ([0, 0, 49, 49], [0, 49, 0, 49]))
    model_pred = case.model_pred.clone().requires_grad_()
    pair = case.run(model_pred=model_pred)
    assert_rounded(pair, case.oracle("v_prediction"), ATOL)
    pair.sum().backward()
    assert model_pred.grad is not None and bool(model_pred.grad.isfinite().all())


@pytest.mark.parametrize("shape", [SHAPES[2], *SEEDED_SHAPES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_noise_is_that_of_the_stream(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    case = Case(device, shape)
    positions = torch.tensor([2**32 + 7, 3, 5], device=device)[: shape[0]]
    seed = torch.tensor(-99, device=device)
    pair = case.run(noise=None, seed=seed, positions=positions, memory_format=layout)
    noise = stream_noise(-99, positions, shape[1:])
    assert_rounded(pair, case.oracle("v_prediction", noise=noise), 5e-6)
    first = case.run(noise=None, seed=seed, positions=positions[0])
    assert torch.equal(first[:: shape[0]], pair[:: shape[0]])  # the first sample of either half


@pytest.mark.parametrize("shape", SEEDED_SHAPES)
@pytest.mark.usefixtures("interpreter")
def test_block_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Forward and backward."""
    case = Case(torch.device("cpu"), shape)
    case.model_pred.requires_grad_()
    seeded = {"noise": None, "seed": torch.tensor(-99), "positions": torch.arange(shape[0])}

    def run() -> tuple[Tensor, ...]:
        pair = case.run(**seeded)
        return pair, *torch.autograd.grad(pair, case.model_pred, case.weight)

    expected = run()
    for block in BLOCKS:
        monkeypatch.setattr(_reproject_kernel, "configs", [triton.Config({"BLOCK": block})])
        assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_matches_float64(
    device: torch.device, prediction_type: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    case = Case(device, SHAPES[2], dtype)
    model_pred = case.model_pred.clone(memory_format=layout).requires_grad_()
    pair = case.run(model_pred=model_pred, prediction_type=prediction_type, dtype=torch.float32)
    weight = case.weight.float().contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(pair, model_pred, weight)  # as the op returns it: .grad would be laid out anew
    oracle = case.model_pred.detach().cpu().double().requires_grad_()
    case.oracle(prediction_type, oracle).backward(weight.cpu().double())
    assert oracle.grad is not None
    assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=layout)
    assert_rounded(gradient, oracle.grad, CONVERTED_ATOL)


def test_gradient_takes_any_strides_and_the_first_half_alone(device: torch.device) -> None:
    case = Case(device, SHAPES[2])
    model_pred = case.model_pred.requires_grad_()
    pair = case.run()
    weight = case.weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).clone(memory_format=torch.preserve_format)
    assert not weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(pair, model_pred, weight.contiguous(), retain_graph=True)
    weight[2:] = float("nan")
    (actual,) = torch.autograd.grad(pair, model_pred, weight)
    assert torch.equal(actual, expected)


def test_backward_saves_the_coefficients_alone(device: torch.device) -> None:
    case = Case(device)
    case.model_pred.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        case.run()
    assert len(saved) == 1 and torch.equal(saved[0], case.coefficients()["transition"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(0, 4, 7, 6)}, "latents must be a non-empty"),
        (
            {"model_pred": torch.zeros(3, 4, 7, 5)},
            r"model_pred must be .* of shape \(3, 4, 7, 6\) on cpu, got .* of shape \(3, 4, 7, 5\)",
        ),
        (
            {"noisy_latents": torch.zeros(1, 4, 7, 6)},
            r"noisy_latents must be .* of shape \(3, 4, 7, 6\) on cpu, got .* of shape \(1, 4, 7, 6\)",
        ),
        (
            {"noise": torch.zeros(2, 4, 7, 6)},
            r"noise must be .* of shape \(3, 4, 7, 6\) on cpu, got .* of shape \(2, 4, 7, 6\)",
        ),
        ({"noise": None}, "either noise, or both seed and positions"),
        ({"seed": torch.tensor(1)}, "either noise, or both seed and positions"),
        ({"noise": None, "seed": torch.tensor(1)}, "either noise, or both seed and positions"),
        ({"marginal": torch.zeros(4, 1)}, r"marginal must be torch.float32 of shape \(4, 3\)"),
        ({"marginal": 0}, "marginal must be a tensor, got int"),
        (
            {"transition": torch.zeros(2, 3).double()},
            r"transition must be torch.float32 of shape \(2, 3\) on cpu, got torch.float64",
        ),
        ({"transition": torch.zeros(2, 3, device="meta")}, "transition must be .* on cpu, got .* on meta"),
        ({"noise": None, "seed": 1, "positions": torch.arange(3)}, "seed must be a tensor, got int"),
        ({"noise": None, "seed": torch.tensor(1), "positions": 0}, "positions must be a tensor, got int"),
        ({"dtype": torch.float64}, "dtype must be torch.float32 or .* got torch.float64"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Case(torch.device("cpu")).run(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeded", [False, True])
def test_opcheck(device: torch.device, seeded: bool) -> None:
    case = Case(device)
    seed, positions = torch.tensor(3, device=device), torch.arange(3, device=device)
    source = (None, None, seed, positions) if seeded else (case.latents, case.noise, None, None)
    model_pred = case.model_pred.to(memory_format=torch.channels_last).requires_grad_()
    arguments = (model_pred, case.latents, *source, *case.coefficients("epsilon").values(), torch.float32, 1)
    torch.library.opcheck(torch.ops.fastsp.reproject.default, arguments)


def test_one_compilation_for_all_batch_sizes(device: torch.device) -> None:
    """Forward and backward."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(model_pred: Tensor, latents: Tensor, marginal: Tensor, transition: Tensor, *source: Tensor) -> Tensor:
        seed, positions = source
        pair = reproject(model_pred, latents, marginal, transition, seed=seed, positions=positions)
        return pair.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch in (6, 7, 8, 9):  # no other size of the inputs, which the compiler would take for the batch
        latents, t = torch.randn(batch, 4, 5, 3, device=device), torch.arange(batch, device=device)
        model_pred = torch.randn_like(latents).requires_grad_()
        coefficients = make_tables().marginal(t), make_tables().transition(t, t.flip(0))
        source = torch.tensor(3, device=device), torch.tensor(5, device=device)
        given = (model_pred, latents, *coefficients, *source)
        (actual,) = torch.autograd.grad(compiled(*given), model_pred)
        (expected,) = torch.autograd.grad(loss(*given), model_pred)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_compiles_without_a_break(device: torch.device) -> None:
    case = Case(device)
    model_pred = case.model_pred.requires_grad_()

    def loss(model_pred: Tensor) -> Tensor:
        predicted, real = case.run(model_pred=2 * model_pred).chunk(2)
        return (predicted - real).square().mean()

    (expected,) = torch.autograd.grad(loss(model_pred), model_pred)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(model_pred), model_pred)
    torch.testing.assert_close(actual, expected)

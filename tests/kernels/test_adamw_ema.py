"""adamw_ema against torch.optim.AdamW and float64, as reference, interpreted and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastsp_kernels import _tensor_lists, adamw_ema, global_norm
from fastsp_kernels._tensor_lists import CHUNK, SPARES, AddressTables, chunk_table
from kernel_oracles import assert_rounded
from torch import Tensor

# A scalar, odd sizes, nothing at all, exactly one chunk, and one chunk and a bit.
SHAPES = [(), (17,), (3, 5), (0, 4), (8, 4, 3, 3), (CHUNK,), (CHUNK + 3,)]
HYPERPARAMETERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Model:
    """The lists and the device scalars of one optimizer."""

    def __init__(
        self,
        device: torch.device,
        gradient: torch.dtype = torch.float32,
        first: torch.dtype = torch.float32,
        second: torch.dtype = torch.float32,
        copy: torch.dtype | None = None,
        shapes: list[tuple[int, ...]] = SHAPES,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.gradient = device, gradient
        self.masters = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        self.masters[4:5] = [master.to(memory_format=torch.channels_last) for master in self.masters[4:5]]
        self.exp_avgs = [torch.zeros_like(master, dtype=first) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master, dtype=second) for master in self.masters]
        self.emas = [master.clone() for master in self.masters]
        self.copies = [master.to(copy) for master in self.masters] if copy else []
        self.learning_rate = torch.tensor(1e-2, device=device)
        self.ema_decay = torch.tensor(0.9, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def gradients(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + number)
        values = [torch.randn(master.shape, generator=generator) for master in self.masters]
        pairs = zip(values, self.masters, strict=True)
        return [torch.empty_like(master, dtype=self.gradient).copy_(value) for value, master in pairs]

    def lists(self, gradients: list[Tensor]) -> tuple[list[Tensor], ...]:
        return self.masters, gradients, self.exp_avgs, self.exp_avg_sqs, self.emas, self.copies

    def scalars(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        names = ("learning_rate", "ema_decay", "step", "skipped")
        return {"gradient_norm": global_norm(gradients)} | {name: getattr(self, name) for name in names}

    def update(self, gradients: list[Tensor], **changes: Any) -> None:
        adamw_ema(*self.lists(gradients), **{**self.scalars(gradients), **HYPERPARAMETERS, **changes})

    def state(self) -> list[Tensor]:
        return [*self.masters, *self.exp_avgs, *self.exp_avg_sqs, *self.emas, *self.copies, self.step]


def largest_difference(ones: list[Tensor], others: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ones, others, strict=True) if one.numel())


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_matches_torch_adamw(device: torch.device, max_norm: float) -> None:
    model = Model(device)
    weights = [master.clone().requires_grad_() for master in model.masters]
    emas = [master.clone() for master in model.masters]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, **HYPERPARAMETERS)
    for number in range(5):
        gradients = model.gradients(number)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(weights, max_norm)
        optimizer.step()
        torch._foreach_lerp_(emas, [weight.detach() for weight in weights], 0.1)
        model.update(gradients, max_norm=max_norm)
    assert model.step.item() == 5 and model.skipped.item() == 0
    assert largest_difference(model.masters, [weight.detach() for weight in weights]) < 1e-6
    assert largest_difference(model.emas, emas) < 1e-6
    assert largest_difference(model.exp_avgs, [optimizer.state[weight]["exp_avg"] for weight in weights]) < 3e-7
    assert largest_difference(model.exp_avg_sqs, [optimizer.state[weight]["exp_avg_sq"] for weight in weights]) < 3e-7


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
def test_one_step_from_given_state_matches_float64(
    device: torch.device, gradient: torch.dtype, moments: torch.dtype, copy: torch.dtype | None
) -> None:
    model = Model(device, gradient, moments, moments, copy)
    for first, second in zip(model.exp_avgs, model.exp_avg_sqs, strict=True):
        first.fill_(0.25)
        second.fill_(0.5)
    model.step += 7
    gradients = model.gradients(0)
    masters = [master.cpu().double() for master in model.masters]
    model.update(gradients, max_norm=50.0)
    clip = min(1.0, 50.0 / (math.sqrt(sum(g.double().square().sum().item() for g in gradients)) + 1e-6))
    assert clip < 1
    for index, master in enumerate(masters):
        g = clip * gradients[index].cpu().double()
        first, second = 0.9 * 0.25 + 0.1 * g, 0.95 * 0.5 + 0.05 * g * g
        rate = 1e-2 / (1 - 0.9**8)
        weight = (1 - 1e-2 * 0.1) * master - rate * first / (second.sqrt() / math.sqrt(1 - 0.95**8) + 1e-8)
        assert_rounded(model.exp_avgs[index], first, 1e-6)
        assert_rounded(model.exp_avg_sqs[index], second, 1e-6)
        assert_rounded(model.masters[index], weight, 1e-6)
        assert_rounded(model.emas[index], 0.9 * master + 0.1 * weight, 1e-6)
        if copy:
            assert_rounded(model.copies[index], weight, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_norm_is_skipped_and_counted(device: torch.device, bad: float) -> None:
    model = Model(device, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    model.update(model.gradients(0))
    before = [tensor.clone() for tensor in model.state()]
    gradients = model.gradients(1)
    gradients[2][1, 1] = bad
    model.update(gradients, max_norm=1.0)
    assert all(torch.equal(one, other) for one, other in zip(model.state(), before, strict=True))
    assert model.skipped.item() == 1 and model.step.item() == 1
    model.update(model.gradients(2))
    assert model.skipped.item() == 1 and model.step.item() == 2
    assert not torch.equal(model.masters[1], before[1])


def test_the_first_step_may_be_skipped(device: torch.device) -> None:
    model = Model(device)
    model.update(model.gradients(0), gradient_norm=torch.tensor(math.nan, device=device))
    model.update(model.gradients(1))
    other = Model(device)
    other.update(other.gradients(1))
    assert all(torch.equal(one, two) for one, two in zip(model.state(), other.state(), strict=True))


def test_scalars_are_read_from_tensors(device: torch.device) -> None:
    model = Model(device)
    model.learning_rate.zero_()
    model.ema_decay.zero_()
    before = [master.clone() for master in model.masters]
    model.update(model.gradients(0))
    assert all(torch.equal(one, other) for one, other in zip(model.masters, before, strict=True))
    model.learning_rate.fill_(0.5)
    model.update(model.gradients(1))
    assert not torch.equal(model.masters[1], before[1])
    assert all(torch.equal(ema, master) for ema, master in zip(model.emas, model.masters, strict=True))


def test_float32_step_counter(device: torch.device) -> None:
    model, other = Model(device), Model(device)
    other.step = other.step.float()
    for number in range(2):
        model.update(model.gradients(number))
        other.update(other.gradients(number))
    assert all(torch.equal(one, two) for one, two in zip(model.masters, other.masters, strict=True))
    assert other.step.item() == 2


def test_repeats_bit_for_bit(device: torch.device) -> None:
    states = []
    for _ in range(2):
        model = Model(device, torch.bfloat16, copy=torch.bfloat16)
        for number in range(3):
            model.update(model.gradients(number))
        states.append(model.state())
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_tensors_off_the_allocators_alignment(device: torch.device) -> None:
    """Slices of one flat buffer, as sharded training holds them."""
    model = Model(device, shapes=[(101,), (77,)])
    expected = Model(device, shapes=[(101,), (77,)])
    for name in ("masters", "exp_avgs", "exp_avg_sqs", "emas"):
        flat = torch.cat([torch.zeros(1, device=device), *getattr(model, name), torch.zeros(1, device=device)])
        setattr(model, name, list(flat[1:-1].split([101, 77])))
    model.update(model.gradients(0))
    expected.update(expected.gradients(0))
    assert all(torch.equal(one, other) for one, other in zip(model.state(), expected.state(), strict=True))
    assert all(tensor._base[0] == 0 and tensor._base[-1] == 0 for tensor in model.exp_avg_sqs)  # nothing beyond


def test_global_norm(device: torch.device) -> None:
    gradients = Model(device, torch.bfloat16).gradients(0)
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    norm = global_norm(gradients)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="must not be empty"):
        global_norm([])


def test_chunks_cover_every_element_once() -> None:
    sizes = (5, 0, CHUNK, 2 * CHUNK + 1)
    rows = chunk_table(sizes, torch.device("cpu")).tolist()
    assert rows == [[0, 0, 5], [2, 0, CHUNK], [3, 0, CHUNK], [3, CHUNK, CHUNK], [3, 2 * CHUNK, 1]]


def test_address_tables_forget_old_addresses_alone() -> None:
    tables, kept = AddressTables(), [torch.zeros(2), torch.zeros(3)]
    first = tables.find([kept])
    assert first.tolist() == [[tensor.data_ptr() for tensor in kept]]
    others = [[torch.zeros(2), torch.zeros(3)] for _ in range(15)]
    for other in others:
        assert tables.find([other]).tolist() == [[tensor.data_ptr() for tensor in other]]
    assert tables.find([kept]).data_ptr() == first.data_ptr()
    tables.find([[torch.zeros(2), torch.zeros(3)]])
    assert tables.find([kept]).data_ptr() == first.data_ptr()  # used since others[0], which made room


def test_address_tables_in_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known table is used again. An unknown one takes some of the spare memory that a plain call left: enough for a
    capture of every shape of the data, all in one step."""
    tables, known, unknown = AddressTables(), [torch.zeros(2)], [torch.zeros(2)]
    plain = tables.find([known])
    for _ in range(2):
        tables._keep_spares(1)  # where there is a GPU, `find` does it, pinned
    monkeypatch.setattr(_tensor_lists, "_is_capturing", lambda device: True)
    assert tables.find([known]).data_ptr() == plain.data_ptr()
    found = [tables.find([unknown]) for _ in range(SPARES)]
    assert all(table.tolist() == [[unknown[0].data_ptr()]] for table in found)
    assert len({table.data_ptr() for table in found}) == SPARES, "each graph fills its own"
    with pytest.raises(RuntimeError, match="call adamw_ema once with these parameters outside"):
        tables.find([unknown])  # the first one's table is filled by the replay: nobody else may read it
    monkeypatch.undo()
    assert tables.find([unknown]).tolist() == [[unknown[0].data_ptr()]]


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("masters", [], "masters must not be empty"),
        ("masters", [torch.zeros(4)[::2], torch.zeros(4)], r"masters\[0\] of shape \(2,\) has gaps"),
        ("masters", [torch.zeros(1).expand(2), torch.zeros(4)], r"masters\[0\] of shape \(2,\) has gaps"),
        ("masters", [torch.zeros(2).half(), torch.zeros(3).half()], "masters must be torch.float32"),
        ("emas", [torch.zeros(2)], "emas must hold 2 tensors"),
        ("emas", [], "emas must hold 2 tensors"),
        ("copies", [torch.zeros(2).half()], "copies must hold 2 tensors"),
        ("copies", [torch.zeros(2), torch.zeros(2, 3, 4, 5)], "copies must be torch.bfloat16 or torch.float16"),
        ("gradients", [torch.zeros(2).half(), torch.zeros(2, 3, 4, 5).half()], "gradients must be torch.float32 or"),
        (
            "gradients",
            [torch.zeros(2), torch.zeros(2, 3, 4, 5).bfloat16()],
            r"gradients\[1\] must be torch.float32 with",
        ),
        ("exp_avgs", [torch.zeros(3), torch.zeros(2, 3, 4, 5)], r"exp_avgs\[0\] must be torch.float32 with the shape"),
        (
            "gradients",
            [torch.zeros(2), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)],
            r"gradients\[1\] must be torch.float32 with the shape, strides",
        ),
        ("gradients", [torch.zeros(2, device="meta"), torch.zeros(2, 3, 4, 5)], r"gradients\[0\] must be .* device"),
    ],
)
def test_wrong_lists(name: str, tensors: list[Tensor], message: str) -> None:
    model = Model(torch.device("cpu"), shapes=[(2,), (2, 3, 4, 5)])
    gradients = model.gradients(0)
    scalars = model.scalars(gradients)
    names = ("masters", "gradients", "exp_avgs", "exp_avg_sqs", "emas", "copies")
    lists = dict(zip(names, model.lists(gradients), strict=True)) | {name: tensors}
    with pytest.raises(ValueError, match=message) as caught:
        adamw_ema(*lists.values(), **scalars)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["learning_rate", "ema_decay", "gradient_norm", "step", "skipped"])
def test_wrong_scalars(name: str) -> None:
    model = Model(torch.device("cpu"))
    for value, message in (
        (torch.zeros(1), r".* of shape \(\) on cpu, got .* of shape \(1,\)"),
        (0.5, "a tensor, got float"),
        (torch.zeros((), dtype=torch.bfloat16), r"torch\.(float32|int64).*, got torch\.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {message}"):
            model.update(model.gradients(0), **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be from 0 to less than 1, got 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] must be from 0 to less than 1, got -0.1"),
        ({"max_norm": math.nan}, "max_norm must be greater than 0"),
        ({"max_norm": -1.0}, "max_norm must be greater than 0"),
        ({"max_norm": None}, "max_norm must be greater than 0"),
        ({"eps": -1e-8}, "eps must be 0 or greater"),
        ({"weight_decay": math.inf}, "weight_decay must be 0 or greater"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    """They would make all weights NaN, or go uphill, with a gradient that is finite."""
    model = Model(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        model.update(model.gradients(0), **options)


def test_what_is_no_list_of_tensors() -> None:
    model = Model(torch.device("cpu"))
    gradients = model.gradients(0)
    scalars = model.scalars(gradients)
    masters, *others = model.lists(gradients)
    with pytest.raises(ValueError, match="masters must be a list of tensors, got generator"):
        adamw_ema((master for master in masters), *others, **scalars)
    with pytest.raises(ValueError, match=r"gradients\[1\] must be a tensor, got NoneType"):  # of an unused parameter
        adamw_ema(masters, [gradients[0], None, *gradients[2:]], *others[1:], **scalars)


def test_strides_of_single_elements_mean_nothing() -> None:
    """A convolution of 1 x 1 is contiguous and channels_last at once; PyTorch may say either of its gradient."""
    shape, strides = (8, 4, 1, 1), ((4, 1, 1, 1), (4, 1, 4, 4))
    results = []
    for stride in strides:
        model = Model(torch.device("cpu"), shapes=[shape])
        gradients = [gradient.as_strided(shape, stride) for gradient in model.gradients(0)]
        model.update(gradients)
        results.append(model.masters[0])
    assert torch.equal(*results)


def test_a_first_call_inside_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsp_kernels._tensor_lists._is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call adamw_ema once with these parameters outside before capturing"):
        chunk_table((12_345,), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    """Float32 gradients are clipped in place on a CPU: see `mutates_args`."""
    model = Model(device, dtype, copy=torch.bfloat16, shapes=[(3, 5), (17,)])
    gradients = model.gradients(0)
    scalars = [model.learning_rate, model.ema_decay, global_norm(gradients), model.step, model.skipped]
    arguments = (*model.lists(gradients), *scalars, 0.1 * scalars[2].item(), 0.9, 0.999, 1e-8, 0.01)
    torch.library.opcheck(torch.ops.fastsp.adamw_ema.default, arguments)


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_compiles_without_a_break(device: torch.device, max_norm: float) -> None:
    model, expected = Model(device), Model(device)
    compiled = torch.compile(model.update, fullgraph=True, backend="aot_eager")
    for number in range(2):
        compiled(model.gradients(number), max_norm=max_norm)
        expected.update(expected.gradients(number), max_norm=max_norm)
    assert largest_difference(model.masters, expected.masters) < 1e-6
    assert model.step.item() == 2


@pytest.mark.gpu
def test_gpu_never_waits_for_the_host() -> None:
    model = Model(torch.device("cuda"))
    gradients = model.gradients(0)
    model.update(gradients)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.update(gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("fresh", [False, True])
def test_gpu_graph_capture(fresh: bool) -> None:
    """Replays go on as plain calls would; also where the gradients are first allocated inside the capture."""
    device = torch.device("cuda")
    model, expected = Model(device, copy=torch.bfloat16), Model(device, copy=torch.bfloat16)
    static = model.gradients(0)
    model.update(static)
    expected.update(expected.gradients(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.update([2 * gradient for gradient in static] if fresh else static)
    for number in range(1, 4):
        for buffer, gradient in zip(static, model.gradients(number), strict=True):
            buffer.copy_(gradient)
        graph.replay()
        gradients = expected.gradients(number)
        expected.update([2 * gradient for gradient in gradients] if fresh else gradients)
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(model.state(), expected.state(), strict=True))

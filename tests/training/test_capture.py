"""The captured step: the numbers of the uncaptured one, from copies of the batch, recorded once for every shape.

Without a GPU the replays are the recorded functions themselves, which read and write the same tensors as a graph does.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench.workloads import tiny_workload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsp.bench.fastsp_step import FastspStep, build_training_step
from fastsp.config import LoRAConfig, ModelConfig
from fastsp.data.batch import Batch
from fastsp.errors import UserError
from fastsp.models.int8 import Int8Linear
from fastsp.objectives import CriticConfig
from fastsp.training.capture import WARM_UP_STEPS, CapturedStep, captured
from fastsp.training.step import TrainingStep
from fastsp.utils.cuda_graphs import record_cuda_graphs

STEPS, BATCH_SIZE = 20, 4


def make(
    device: str,
    objective: str = "self_perceptual",
    teacher: str = "split",
    microbatch: int | None = None,
    precision: str = "fp32",
    kind: str = "adamw",
    **settings,
) -> TrainingStep:
    workload = tiny_workload(BATCH_SIZE, precision, teacher, device).with_settings(**settings)
    data = workload.config.data.model_copy(update={"microbatch": microbatch, "caption_dropout": 0.3})
    optimizer = workload.config.optimizer.model_copy(update={"warmup_steps": 7, "kind": kind})
    workload = replace(workload, config=workload.config.model_copy(update={"data": data, "optimizer": optimizer}))
    if objective != "critic":
        return build_training_step(workload, objective)
    critic = CriticConfig(weight=0.5, heads=8, warmup_steps=4)
    return build_training_step(workload, "self_perceptual", critic=critic)


def batch(number: int, device: str, size: int = BATCH_SIZE, side: int = 8) -> Batch:
    """Another one every step, one of its samples rejected; positions stay on the CPU, as the sources leave them."""
    generator = torch.Generator().manual_seed(number)
    return Batch(
        positions=torch.arange(size) + number * size,
        weights=(torch.arange(size) != number % size).float(),
        captions=("",) * size,
        pixel_values=torch.randn(size, 4, side, side, generator=generator),
        text_features=torch.randn(size, 5, 16, generator=generator),
    ).to(device)


def run(step: TrainingStep, take_step, steps: int = STEPS) -> list[tuple[float, ...]]:
    device = str(step.seed.device)
    results = (take_step(batch(number, device), number) for number in range(1, steps + 1))
    return [(float(result.loss), float(result.grad_norm), result.learning_rate, *critic(result)) for result in results]


def critic(result) -> list[float]:
    return [] if result.critic is None else result.critic.tolist()


def assert_same(one: TrainingStep, other: TrainingStep) -> None:
    ours, theirs = one.state, other.state
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    weights = zip(one.network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in weights)


NAMES = ("objective", "teacher", "microbatch", "precision")
CASES = [
    ("mse", "split", None, "fp32"),
    ("self_perceptual", "split", 2, "bf16"),
    ("critic", "split", 2, "fp32"),
    ("critic", "batched", None, "bf16"),
    ("self_perceptual", "batched", 2, "fp32"),
    ("self_perceptual", "batched", None, "bf16"),
]
ON_CPU = [case if case[1] == "split" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(NAMES, ON_CPU)
def test_captured_steps_equal_uncaptured_ones(objective, teacher, microbatch, precision):
    expected, ours = (make("cpu", objective, teacher, microbatch, precision) for _ in range(2))
    take_step = CapturedStep(ours, record=list)
    rows = run(ours, take_step, 6)
    assert rows == run(expected, expected, 6)
    assert_same(ours, expected)
    assert len({row[0] for row in rows}) == 6 and rows[0][2] < rows[1][2], "every step is another one"
    assert take_step.recording is not None
    assert len(take_step.recording.replays) == (1 if microbatch is None else 2)


def test_a_graph_s_inputs_stay_where_they_are():
    step = make("cpu", "mse")
    take_step = CapturedStep(step, record=list)
    run(step, take_step, WARM_UP_STEPS + 1)
    inputs = take_step.recording.inputs.tensors()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in inputs.items()}
    other = batch(98, "cpu")
    take_step(other, 98)
    assert before.keys() == {"positions", "weights", "pixel_values", "text_features"}
    for name, (address, old) in before.items():
        assert inputs[name].data_ptr() == address and not torch.equal(inputs[name], old)
        assert torch.equal(inputs[name], other.tensors()[name]) and other.tensors()[name].data_ptr() != address


class HostTensors(TorchDispatchMode):
    """Writes down what meets a tensor of the host: a recording can neither read nor copy one. (One without elements,
    which checkpointing keeps as a marker, is neither read nor copied.)"""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cpu and leaf.numel() for leaf in leaves):
            self.operators.append(str(func))
        return result


class HostNumbers(TorchFunctionMode):
    """Writes down tensors made of Python's numbers, which are copied to the device below what the other mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.functions.append(func.__name__)
        return func(*args, **(kwargs or {}))


def met_on_the_host(step: TrainingStep, given: Batch | None = None) -> list[list[str]]:
    """What each recording of a step on the meta device does with tensors of the host; the last two are planted."""
    seen = []

    def record(works):
        def replay(work):
            with HostTensors() as tensors, HostNumbers() as numbers:
                work()
            seen.append(tensors.operators + numbers.functions)

        return [partial(replay, work) for work in works]

    take_step = CapturedStep(step, record=record)
    for number in range(1, WARM_UP_STEPS + 3):
        take_step(batch(number, "meta") if given is None else given, number)
    for replay in record([lambda: torch.zeros(()).to("meta"), lambda: torch.tensor(1.0, device="meta")]):
        replay()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(NAMES, ON_CPU)
def test_what_is_recorded_meets_no_tensor_of_the_host(objective, teacher, microbatch, precision, checkpointing):
    """On the meta device, which refuses what a recording does: mixed devices, and values that are read back."""
    step = make("meta", objective, teacher, microbatch, precision, gradient_checkpointing=checkpointing)
    *seen, copied, made = met_on_the_host(step)
    assert seen == [[]] * (2 if microbatch is None else 4)
    assert copied[-1] == "aten._to_copy.default" and made == ["tensor"], "what is planted is noticed"


def in_8_bits() -> dict[str, ModelConfig]:
    """The setting of :func:`make` for adapters on such a base."""
    pytest.importorskip("torchao")
    lora = LoRAConfig(rank=2, base_precision="int8")
    return {"model": tiny_workload().config.model.model_copy(update={"lora": lora})}


@pytest.mark.parametrize("teacher", ["split", pytest.param("batched", marks=pytest.mark.slow)])
def test_nor_does_a_base_in_8_bits(teacher):
    step = make("meta", "self_perceptual", teacher, None, "bf16", gradient_checkpointing=True, **in_8_bits())
    assert sum(isinstance(module, Int8Linear) for module in step.network.modules()) > 10
    *seen, _, _ = met_on_the_host(step)
    assert seen == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_nor_does_a_transformer(network):
    """A flow's times, the patches' places and the guidance are made on the device."""
    made = FastspStep(tiny_workload(BATCH_SIZE, "bf16", "batched", "meta", network))
    *seen, _, _ = met_on_the_host(made.training_step, made.batch)
    assert seen == [[], []]


def test_it_records_once_for_every_shape_and_keeps_the_recordings():
    step, recordings = make("cpu", "mse"), []

    def record(works):
        recordings.append(len(works))
        return list(works)

    take_step, seen = CapturedStep(step, record=record), []
    for number, side in enumerate([8, 8, 8, 8, 16, 16, 16, 16, 8], start=1):
        take_step(batch(number, "cpu", side=side), number)
        seen.append(len(recordings))
    assert seen == [0, 0, 1, 1, 1, 1, 2, 2, 2], "two steps warm up; a recording is kept for its shape"
    assert int(step.optimizer.step_count) == 9
    assert len(take_step.recordings) == 2


def mixed(number: int, device: str, sides: tuple[int, ...]) -> Batch:
    """Two samples of each side, in parts; one of each rejected now and then."""
    parts = [batch(10 * number + index, device, size=2, side=side) for index, side in enumerate(sides)]
    positions = torch.arange(2 * len(sides)) + 2 * len(sides) * number
    parts = [replace(part, positions=own) for part, own in zip(parts, positions.split(2), strict=True)]
    return Batch(positions, torch.cat([part.weights for part in parts]), ("",) * len(positions), parts=tuple(parts))


@pytest.mark.parametrize("objective", ["mse", "self_perceptual", "critic"])
def test_shapes_within_and_between_steps_have_a_recording_each(objective):
    """One that is kept: coming back to a shape records nothing. The numbers are those of the uncaptured step."""
    expected, ours = (make("cpu", objective, microbatch=2) for _ in range(2))
    recorded = []
    take_step = CapturedStep(ours, record=lambda works: recorded.append(len(works)) or list(works))
    sides = [(8, 8), (8, 16), (16, 8), (8, 16), (16, 16), (8, 12), (8, 8), (12, 8), (16, 12), (8, 12)]
    captured_steps = []
    for number, pair in enumerate(sides, start=1):
        one, other = take_step(mixed(number, "cpu", pair), number), expected(mixed(number, "cpu", pair), number)
        captured_steps.append(take_step.recording is not None)
        assert torch.equal(one.loss, other.loss) and torch.equal(one.grad_norm, other.grad_norm)
    assert_same(ours, expected)
    assert captured_steps == [number not in (1, 2, 3, 6, 8) for number in range(1, 11)], "two steps warm a shape up"
    assert recorded == [2, 2, 2] and len(take_step.recordings) == 3, "one a shape, for a microbatch and for the last"
    recordings = list(take_step.recordings.values())
    assert len({id(each.totals) for each in recordings}) == 1, "they add to the same totals"
    assert {each.inputs.pixel_values.shape[-1] for each in recordings} == {8, 12, 16}


@pytest.mark.gpu
def test_gpu_recordings_of_several_shapes_share_their_memory_and_change_nothing():
    """In any order: what a replay leaves in the shared memory, the next one does not read."""
    settings = {"compile": False, "cuda_graph": True}
    expected, ours = (make("cuda", microbatch=2, **settings) for _ in range(2))
    take_step = captured(ours)
    sides = [(8, 8), (8, 16), (16, 8), (8, 16), (16, 16), (8, 8), (16, 8), (8, 16), (16, 16), (16, 8), (8, 8)]
    for number, pair in enumerate(sides, start=1):
        one, other = take_step(mixed(number, "cuda", pair), number), expected(mixed(number, "cuda", pair), number)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(one.grad_norm, other.grad_norm, rtol=1e-3, atol=0)
    assert isinstance(take_step, CapturedStep) and len(take_step.recordings) == 2


def test_a_recording_that_fails(caplog):
    def fail(works):
        try:
            works[0]()  # as far as the end of the backward, say
            raise RuntimeError("planted\nsecond line")
        finally:
            raise RuntimeError("the recording had failed before")

    with pytest.raises(RuntimeError, match="had failed"):
        step = make("cpu", "mse")
        run(step, CapturedStep(step, record=fail))
    step, expected = make("cpu", "mse", microbatch=2), make("cpu", "mse", microbatch=2)
    with caplog.at_level(logging.WARNING, "fastsp"):
        rows = run(step, CapturedStep(step, required=False, record=fail), 5)
    assert rows == run(expected, expected, 5)
    assert_same(step, expected)
    assert [r.getMessage() for r in caplog.records] == ["cuda_graph: auto continues without a CUDA graph: planted"]


def test_what_the_configuration_asks_for():
    step = make("cpu", "mse")
    assert captured(step) is step, "auto: not on a CPU"
    step.config = step.config.model_copy(update={"cuda_graph": True})
    with pytest.raises(UserError, match="cuda_graph: true needs a CUDA device, and this run is on the cpu"):
        captured(step)
    for setting, expected in ((True, True), ("auto", True), (False, False)):
        config = step.config.model_copy(update={"cuda_graph": setting})
        assert config.captures_on(torch.device("cuda")) is expected


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    (*NAMES, "compile"), [*((*case, False) for case in CASES), *((*case, True) for case in (CASES[1], *CASES[-2:]))]
)
def test_gpu_twenty_steps_bit_for_bit(deterministic, objective, teacher, microbatch, precision, compile):
    assert_replays_equal(objective, teacher, microbatch, precision, compile=compile)


def assert_replays_equal(objective: str, teacher: str, microbatch: int | None, precision: str, **settings) -> None:
    """Steps in a CUDA graph and outside of one."""
    settings |= {"cuda_graph": True}
    expected, ours = (make("cuda", objective, teacher, microbatch, precision, **settings) for _ in range(2))
    take_step = captured(ours)
    rows = run(ours, take_step)
    assert isinstance(take_step, CapturedStep) and take_step.recording is not None
    criterion = ours.objective.self_perceptual
    assert criterion is None or criterion.teacher == teacher, "it did not go on as split"
    assert rows == run(expected, expected)
    assert_same(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_gpu_twenty_steps_on_a_base_in_8_bits(deterministic, compile):
    assert_replays_equal("self_perceptual", "batched", None, "bf16", compile=compile, **in_8_bits())


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["self_perceptual", "critic"])
@pytest.mark.parametrize(("teacher", "microbatch", "compile"), [("split", None, False), ("batched", 2, True)])
def test_gpu_replays_never_wait_for_the_host(objective, teacher, microbatch, compile):
    step = make("cuda", objective, teacher, microbatch, compile=compile, cuda_graph=True)
    take_step = captured(step)
    run(step, take_step, WARM_UP_STEPS + 1)
    following = [batch(number, "cuda") for number in range(50, 53)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, data in enumerate(following, start=50):
            take_step(data, number)
            step(data, number)  # nor does the uncaptured one
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_another_shape_is_recorded_anew():
    step, expected = (make("cuda", compile=False, cuda_graph=True) for _ in range(2))
    take_step = captured(step)
    for number in range(1, 13):
        data = batch(number, "cuda", side=8 if number % 8 < 4 else 16)
        result, plain = take_step(data, number), expected(data, number)
        torch.testing.assert_close(result.loss, plain.loss, rtol=1e-4, atol=0)
    assert take_step.recording is not None


@pytest.mark.gpu
def test_gpu_recording_computes_nothing():
    total = torch.zeros((), device="cuda")

    def work():
        total.add_(1)

    replays = record_cuda_graphs([work, work])
    assert float(total) == 0
    for replay in replays:
        replay()
    assert float(total) == 2


@pytest.mark.gpu
def test_gpu_after_a_recording_that_fails():
    """The stream is the caller's again, and memory and random numbers are to be had."""
    total, before = torch.zeros((), device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        record_cuda_graphs([lambda: total.add_(1).item()])
    assert torch.cuda.current_stream() == before
    assert float(total + torch.rand(1 << 20, device="cuda").mean()) > 0
    active, image = torch.cuda.memory_stats()["active_bytes.all.current"], torch.empty(1 << 20, device="cuda")
    image.record_stream(torch.cuda.Stream())
    del image
    torch.cuda.synchronize()
    assert torch.empty(1, device="cuda").numel(), "asked for memory, the allocator looks at what others have read"
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < active + (1 << 20)


def test_an_optimizer_that_reads_back_runs_without_a_graph(caplog, monkeypatch):
    """As on a GPU, where `cuda_graph: auto` asks for one."""
    step = make("cpu", "mse", kind="prodigy")
    monkeypatch.setattr(type(step.config), "captures_on", lambda self, device: True)
    with caplog.at_level(logging.WARNING, "fastsp"):
        assert captured(step) is step
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "cuda_graph: auto runs without a CUDA graph: the optimizer reads values or the host's memory"

"""Options of the step that change its cost and not its numbers: checkpointing, compiling, precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.workloads import tiny_workload
from torch._dynamo.utils import counters
from torch._inductor import list_mode_options
from torch.utils.flop_counter import FlopCounterMode

from fastsp.bench.fastsp_step import FastspStep
from fastsp.families.channels_last import ChannelsLastGroupNorm
from fastsp.training.capture import WARM_UP_STEPS
from fastsp.training.compilation import compile_options, keep_compiled_code

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """By default cuDNN rounds what convolutions read to TensorFloat-32, of 11 bits: more than compiling may change."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loss_and_gradients(step: FastspStep) -> tuple[torch.Tensor, torch.Tensor]:
    loss = step.loss()
    loss.backward()
    gradients = [p.grad for p in step.training_step.network.parameters()]
    return loss.detach(), torch.cat([gradient.flatten().float() for gradient in gradients])


def every_gradient(step: FastspStep) -> dict[str, torch.Tensor]:
    step.loss().backward()
    return {name: p.grad.float() for name, p in step.training_step.network.named_parameters()}


def assert_close(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm()


def test_gradient_checkpointing_gives_the_same_gradients_for_another_forward():
    flops, results = {}, {}
    for checkpointed in (False, True):
        step = FastspStep(tiny_workload().with_settings(gradient_checkpointing=checkpointed))
        with FlopCounterMode(display=False) as counter:
            results[checkpointed] = loss_and_gradients(step)
        flops[checkpointed] = counter.get_total_flops()
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
    assert flops[True] > 1.1 * flops[False], "checkpointing took part"


@pytest.mark.parametrize("objective", ["mse", "self_perceptual"])
def test_bfloat16_is_close_to_float32(objective):
    """bfloat16 keeps 8 bits: one rounding is 4e-3. Seen at batch 32: 1.4e-2 of the gradient's norm. A single sample
    whose t' is close to t is worse: the difference of its features is a small one of large numbers."""
    exact, ours = (loss_and_gradients(FastspStep(tiny_workload(32, precision=p), objective)) for p in ("fp32", "bf16"))
    assert_close(ours, exact, 3e-2)
    assert (ours[1] - exact[1]).norm() > 1e-3 * exact[1].norm(), "it was computed in bfloat16"
    assert ours[0].dtype == torch.float32, "the loss is float32"


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_group_norm_of_bfloat16_takes_its_statistics_in_float32(device):
    """A mean of 8 and a deviation of 1: sums of squares in bfloat16 would leave little of the variance."""
    values = (torch.randn(2, 32, 64, 64, generator=torch.Generator().manual_seed(0)) + 8.0).to(device, torch.bfloat16)
    norm = torch.nn.GroupNorm(8, 32).to(device)
    exact = norm(values.float())
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = norm.bfloat16()(values.contiguous(memory_format=layout))
        assert (ours.float() - exact).abs().max() < 1e-2 * exact.abs().max()
        norm.float()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
@pytest.mark.parametrize(
    ("teacher", "layers", "checkpointing"),
    [("split", "mid", False), ("batched", "mid", False), ("batched", "encoder", False), ("split", "mid", True)],
)
def test_compiled_equals_eager(teacher, layers, checkpointing, device):
    """The loss, and the gradient of every parameter (of the small ones: relative to a thousandth of all)."""
    workload = tiny_workload(teacher=teacher, device=device)
    stages = [stage.model_copy(update={"layers": layers}) for stage in workload.config.stages]
    workload = workload.with_settings(stages=stages, gradient_checkpointing=checkpointing)
    before = counters["stats"]["unique_graphs"]
    eager, compiled = (FastspStep(workload.with_settings(compile=compiles)) for compiles in (False, True))
    torch.testing.assert_close(compiled.loss(), eager.loss(), rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] > before, "something was compiled"
    ours, theirs = every_gradient(compiled), every_gradient(eager)
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm().clamp(min=1e-3 * whole), name


@pytest.mark.parametrize("teacher", ["split", "batched"])
def test_online_network_and_teacher_are_handed_to_the_compiler(teacher):
    """What is compiled where the configuration says so; nothing is run."""
    for compiles in (False, True):
        workload = tiny_workload(teacher=teacher, device="meta").with_settings(compile=compiles, cuda_graph=False)
        step = FastspStep(workload).training_step
        criterion = step.objective.self_perceptual
        assert (step.network._compiled_call_impl is not None) == compiles
        network, half_backward = criterion.perceptual_network, criterion.metric._half_backward
        assert (network._compiled_call_impl is not None) == (half_backward.compile_options is not None) == compiles


def test_networks_are_placed_as_the_step_computes():
    """Both in the compute dtype with channels_last weights; compiled for a GPU, their images stay so by themselves."""
    for compiles in (False, True):
        workload = tiny_workload(precision="bf16", device="meta").with_settings(compile=compiles, cuda_graph=False)
        step = FastspStep(workload).training_step
        for network in (step.network, step.objective.self_perceptual.perceptual_network):
            parameters = list(network.parameters())
            assert {p.dtype for p in parameters} == {torch.bfloat16}
            convolutions = [p for p in parameters if p.ndim == 4 and min(p.shape[1:]) > 1]
            assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
            norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
            assert norms and all(isinstance(norm, ChannelsLastGroupNorm) == compiles for norm in norms)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
def test_compiled_bfloat16_is_close_to_float32(device):
    """Compiled code rounds less than eager code: it keeps float32 between the operators that it fuses."""
    workloads = [tiny_workload(32, precision, "batched", device) for precision in ("fp32", "bf16")]
    exact, ours = (
        loss_and_gradients(FastspStep(workload.with_settings(compile=compiles)))
        for workload, compiles in zip(workloads, (False, True), strict=True)
    )
    assert_close(ours, exact, 3e-2)
    assert (ours[1] - exact[1]).norm() > 1e-3 * exact[1].norm(), "it was computed in bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash", "efficient"])  # they save other tensors
def test_gpu_nothing_is_compiled_after_the_first_step(attention):
    """While a CUDA graph is recorded, what is compiled anew would be tuned in its midst."""
    workload = tiny_workload(4, "bf16", "batched", "cuda")
    step = FastspStep(workload.with_settings(compile=True, cuda_graph=True, attention=attention))
    compiled = []
    for _ in range(WARM_UP_STEPS + 2):
        step.step()
        compiled.append(counters["stats"]["unique_graphs"])
    assert len(set(compiled)) == 1 and compiled[0] > 0
    assert step.take_step.recording is not None
    assert step.training_step.objective.self_perceptual.teacher == "batched", "it did not go on as split"


def test_batched_equals_split():
    batched, split = (loss_and_gradients(FastspStep(tiny_workload(teacher=name))) for name in ("batched", "split"))
    assert_close(batched, split, 1e-5)


def test_compiled_code_outlives_tmp(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path))
    assert keep_compiled_code() == tmp_path / "inductor" == Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert keep_compiled_code() == tmp_path / "elsewhere"


WHERE_COMPILED_CODE_GOES = """
import fastsp.training.trainer  # which imports the compiler, which sets the variable to a folder in /tmp
from fastsp.training.compilation import keep_compiled_code
print(keep_compiled_code())
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())
"""


def test_compiled_code_outlives_tmp_in_a_fresh_process(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment["FASTSP_CACHE"] = str(tmp_path)
    command = [sys.executable, "-c", WHERE_COMPILED_CODE_GOES]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [str(tmp_path / "inductor")] * 2


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_mode_brings_cuda_graphs_of_its_own(device, channels_last):
    config = tiny_workload().config
    for tuned in (False, True):
        chosen = config.model_copy(update={"compile_mode": "max-autotune"}) if tuned else config
        options = compile_options(chosen, device, channels_last)
        settings = options.get("options") or list_mode_options(options["mode"])
        assert not settings.get("triton.cudagraphs") and bool(settings.get("max_autotune")) == tuned


def test_kernels_are_called_from_cpp_on_a_cpu():
    """A small step spends its time in Python otherwise. On a GPU it would be compiled for nothing."""
    config = tiny_workload().config
    assert compile_options(config, torch.device("cpu"))["options"]["cpp_wrapper"]
    assert compile_options(config, torch.device("cuda")) == {"mode": "default"}


def test_a_network_that_keeps_its_layout_is_given_no_other():
    ours = compile_options(tiny_workload().config, torch.device("cuda"), channels_last=True)["options"]
    assert ours["layout_optimization"] is False


NOBODY = """
import os, pwd
def missing(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = missing  # a container's user without a passwd entry
from pathlib import Path
from fastsp.utils.cache import cache_folder
from fastsp.training.compilation import keep_compiled_code
folder = keep_compiled_code()
(folder / "code").mkdir(parents=True)
Path(os.environ.get("TRITON_CACHE_DIR", "/none"), "kernel").mkdir(parents=True)
print(cache_folder())
print(folder)
"""


@pytest.mark.parametrize("home", [None, "/proc/nobody"])
def test_a_user_without_a_home_compiles_into_a_temporary_folder(tmp_path, home):
    """A home that is missing, or that nothing can be written to, is nothing to end a run for."""
    unset = {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME"}
    environment = {key: value for key, value in os.environ.items() if key not in unset and "CACHE" not in key}
    environment |= {"TMPDIR": str(tmp_path)} | ({} if home is None else {"HOME": home})
    command = [sys.executable, "-c", NOBODY]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    own = tmp_path / f"fastsp-{os.getuid()}"
    assert said.stdout.splitlines() == [str(own), str(own / "inductor")] and not (tmp_path / "~").exists()
    assert own.stat().st_mode & 0o777 == 0o700 and (own / "inductor" / "triton" / "kernel").is_dir()

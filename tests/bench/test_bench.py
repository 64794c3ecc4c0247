"""`fastsp bench`: the providers compute the same loss, the figures are what they say, and the files are written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.workloads import tiny_workload
from fastsp_kernels import Stream, random_integers, random_normals

from fastsp import draws
from fastsp.__main__ import main
from fastsp.bench import run as bench_run
from fastsp.bench.baselines import Algorithm1, DiffusersMSE, Split
from fastsp.bench.cost import count_phases, count_step
from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.measure import Entry, prepare, ratios, take_turns
from fastsp.bench.need import missing
from fastsp.bench.operators import group_of
from fastsp.bench.phases import PHASES, time_phases
from fastsp.bench.providers import PROVIDERS
from fastsp.bench.report import operator_lines, phase_lines, verdict
from fastsp.bench.run import Plan, groups, run
from fastsp.bench.timing import datasheet_flops_per_s, quantiles, seconds_per_call
from fastsp.bench.workload import SD21_BASE_UNET, SD21_TEXT_SHAPE, default_workload
from fastsp.config import load_config
from fastsp.errors import UserError

CPU = torch.device("cpu")
EAGER = tuple(name for name, provider in PROVIDERS.items() if not provider.compiled)
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
CONTRACT = {"name", "samples_per_s", "ms_p20", "ms_p50", "ms_p80", "peak_memory_gb", "gflop_per_sample", "mfu"}


def philox_draws(step: FastspStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """noise, t and t' as fastsp's step draws them for its first positions."""
    seed, positions = step.training_step.seed, step.batch.positions
    t = random_integers(seed, Stream.TIMESTEP, positions, 1000)
    noise = random_normals(seed, Stream.NOISE, positions, (4, 8, 8))
    return noise, t, draws.perceptual_timesteps(seed, positions, t, 1000)


def gradient(unet) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in unet.parameters()])


@pytest.mark.parametrize("teacher", ["split", "batched"])
def test_all_self_perceptual_steps_have_the_same_loss_and_gradient(teacher):
    workload = tiny_workload(teacher=teacher)
    ours, printed, split = FastspStep(workload), Algorithm1(workload), Split(workload)
    noise, t, t_prime = philox_draws(ours)
    losses = [ours.loss(), printed.loss(noise, t, t_prime), split.loss(noise, t, t_prime)]
    for loss in losses:
        loss.backward()
    gradients = [gradient(unet) for unet in (ours.training_step.unet, printed.unet, split.unet)]
    assert losses[1] > 1e-6
    for loss, grad in zip(losses[::2], gradients[::2], strict=True):
        torch.testing.assert_close(loss, losses[1], rtol=1e-4, atol=0)
        assert (grad - gradients[1]).norm() < 1e-3 * gradients[1].norm()
    other = printed.loss(noise, t, (t_prime + 300) % 1000)
    assert abs(other - losses[1]) > 1e-3 * losses[1], "another t' is another loss"


def test_both_mse_steps_have_the_same_loss():
    ours, theirs = FastspStep(tiny_workload(), "mse"), DiffusersMSE(tiny_workload())
    noise, t, _ = philox_draws(ours)
    torch.testing.assert_close(ours.loss(), theirs.loss(noise, t), rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EAGER)
def test_a_step_trains(name, precision):
    """Weights and their average change, and stay finite."""
    torch.manual_seed(0)
    steps = PROVIDERS[name].build(tiny_workload(precision=precision).with_settings(compile=False))
    unet = steps.training_step.unet if isinstance(steps, FastspStep) else steps.unet
    before = [p.detach().clone() for p in unet.parameters()]
    for _ in range(2):
        steps.step()
    after = list(unet.parameters())
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.5 * len(after)
    assert all(p.grad is None for p in after), "gradients do not outlive a step"


def test_baseline_average_follows_the_weights():
    steps = Algorithm1(tiny_workload(precision="bf16"))
    start = [ema.clone() for ema in steps.update.emas]
    steps.step()
    decay = steps.update.ema_decay
    for ema, first, master in zip(steps.update.emas, start, steps.update.masters, strict=True):
        torch.testing.assert_close(ema, decay * first + (1 - decay) * master.detach())
    assert all(
        torch.equal(p, master.bfloat16()) for p, master in zip(steps.update.params, steps.update.masters, strict=True)
    )


def test_counted_operations_of_sd21():
    """The figures of one forward, from its architecture alone: nothing of 866 M parameters is held."""
    workload = replace(
        tiny_workload(batch_size=2), unet_config=SD21_BASE_UNET, latent_shape=(4, 64, 64), text_shape=SD21_TEXT_SHAPE
    )
    mse = count_step(PROVIDERS["diffusers_mse"], workload).flops
    assert mse == pytest.approx(2409e9, rel=0.002)


def test_counted_operations():
    """A truncated teacher does less than a whole one, and the batched one as much as two calls."""
    workload = tiny_workload(batch_size=2, teacher="batched")
    counts = {name: count_step(provider, workload) for name, provider in PROVIDERS.items()}
    flops = {name: cost.flops for name, cost in counts.items()}
    assert flops["algorithm1_eager"] == flops["algorithm1_compiled"] > 1.05 * flops["split_compiled"]
    assert flops["fastsp_sp"] == flops["split_compiled"], "fused attention's forward is not repeated in the backward"
    assert flops["fastsp_sp"] > 1.2 * flops["fastsp_mse"] == pytest.approx(1.2 * flops["diffusers_mse"])
    assert all(cost.bytes > 0 for cost in counts.values())


def test_phases_add_up_to_the_step():
    workload = tiny_workload(batch_size=2)
    phases = count_phases(workload)
    assert tuple(phases) == PHASES == tuple(time_phases(FastspStep(workload), rounds=2))
    total = sum(phase.flops for phase in phases.values())
    assert total == count_step(PROVIDERS["fastsp_sp"], workload).flops
    assert phases["update"].flops == phases["reprojection"].flops == 0 < phases["teacher"].flops
    parameters = sum(p.numel() for p in workload.unet().parameters())
    assert phases["update"].bytes * 2 > 32 * parameters, "weights, moments and average are read and written"


def test_a_turn_adds_one_time_to_each():
    entries = {name: prepare(name, PROVIDERS[name], tiny_workload(), print) for name in ("fastsp_sp", "fastsp_mse")}
    take_turns(entries, CPU, rounds=3)
    assert [len(entry.seconds) for entry in entries.values()] == [3, 3]
    assert entries["fastsp_sp"].peak_bytes is None
    p20, p50, p80 = quantiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (p20, p50, p80) == pytest.approx((1.8, 3.0, 4.2))


def test_speeds_are_times_the_reference_s(monkeypatch):
    """Round by round: what is slower than the reference has a speed below 1, a turn is the mean of its steps."""
    reference, slower = (Entry(name, None, 0.0, {}, None) for name in ("fastsp_sp", "algorithm1_eager"))
    reference.seconds, slower.seconds = [9.0, 1.0, 2.0], [2.0, 8.0]
    assert ratios(slower, reference, start=1) == [0.5, 0.25]
    clock = iter([10.0, 18.0])
    monkeypatch.setattr("fastsp.bench.timing.time.perf_counter", lambda: next(clock))
    assert seconds_per_call(lambda: None, CPU, calls=4) == 2.0


def test_other_batch_sizes_of_the_reference():
    (row,) = run(tiny_workload(4), Plan(("fastsp_sp",), rounds=1, sweep=True, phases=False), print)
    sweep = {point["batch_size"]: point["samples_per_s"] for point in row["batch_sweep"]}
    assert list(sweep) == [8, 16, 32, 2, 1]
    assert sweep[32] > 2 * sweep[1], "samples, not steps"


def test_checkpointing_changes_nothing_that_is_counted(monkeypatch, capsys):
    plain, checkpointed = (tiny_workload().with_settings(gradient_checkpointing=on) for on in (False, True))
    assert count_step(PROVIDERS["fastsp_sp"], plain) == count_step(PROVIDERS["fastsp_sp"], checkpointed)
    assert count_phases(plain) == count_phases(checkpointed)
    (row,) = run(checkpointed, Plan(("fastsp_sp",), rounds=1), print)
    assert row["samples_per_s"] > 0


def test_a_stage_is_measured_as_it_is_configured():
    said: list[str] = []
    of_paper = tiny_workload()
    stages = [stage.model_copy(update={"layers": "encoder", "mse_weight": 0.5}) for stage in of_paper.config.stages]
    workload = of_paper.with_settings(stages=stages)
    assert of_paper.unlike_the_paper() == {} and workload.unlike_the_paper() == {"layers": "encoder", "mse_weight": 0.5}
    assert workload.stage("self_perceptual").learning_rate == stages[1].learning_rate
    step = FastspStep(workload)
    assert step.training_step.objective.mse_weight == 0.5
    flops = [count_step(PROVIDERS["fastsp_sp"], each).flops for each in (workload, of_paper)]
    assert flops[0] < flops[1], "the mid block is not run"
    run(workload, Plan(("fastsp_sp",), rounds=1, phases=False), said.append)
    assert "fastsp's self-perceptual steps have layers encoder, mse_weight 0.5; Algorithm 1 stays as printed" in said


def test_the_first_step_of_what_meets_compiled_code_is_no_measurement(monkeypatch):
    graphs = iter([3, 4, 4, 4, 4, 4])  # before and after the first step of each
    monkeypatch.setattr("fastsp.bench.measure._graphs_compiled", lambda: next(graphs))
    workload, said = tiny_workload().with_settings(compile=False), []
    compiled = replace(PROVIDERS["fastsp_sp"], compiled=True)
    assert prepare("fastsp_sp", compiled, workload, said.append).first_step_s > 0
    assert prepare("fastsp_sp_split", compiled, workload, said.append).first_step_s is None
    assert said[1].endswith("its code had been compiled for a provider before it")
    assert prepare("fastsp_mse", PROVIDERS["fastsp_mse"], workload, said.append).first_step_s > 0, "eager"


def test_overrides_without_a_file():
    workload = default_workload(CPU, ["data.batch_size=32", "data.microbatch=8", "stages.1.layers=encoder"])
    assert workload.batch_size == 8 and workload.config.data.microbatch is None, "all take the same batch at once"
    assert workload.unlike_the_paper() == {"layers": "encoder"}
    with pytest.raises(UserError, match=r"model\.pretrained=/nowhere: without --config .* give a run's file"):
        default_workload(CPU, ["model.pretrained=/nowhere"])


@pytest.mark.gpu
def test_gpu_a_captured_step_s_memory_is_counted():
    """Its replays allocate nothing: what they work in was taken by the recording."""
    workload = tiny_workload(batch_size=32, device="cuda")
    peaks = []
    for cuda_graph in (False, True):
        entry = prepare("fastsp_sp", PROVIDERS["fastsp_sp"], workload.with_settings(cuda_graph=cuda_graph), print)
        peaks.append(entry.peak_bytes)
        entry.release()
    assert 0 < peaks[0] <= 1.1 * peaks[1] and peaks[1] < 2 * peaks[0]


def test_rows_have_the_contract_s_keys():
    kept: list[int] = []
    names = ("algorithm1_eager", "fastsp_sp")
    rows = run(tiny_workload(), Plan(names, rounds=2), print, lambda rows: kept.append(len(rows)))
    assert tuple(row["name"] for row in rows) == names
    for row in rows:
        assert row.keys() >= CONTRACT
        assert row["mfu"] is None and row["peak_memory_gb"] is None and row["mfu_of_measured_matmul"] > 0
        assert row["samples_per_s"] == pytest.approx(3e3 / row["ms_p50"])
    assert [name for name, row in zip(names, rows, strict=True) if "phases" in row] == ["fastsp_sp"]
    assert len(phase_lines(rows)) == 1 + len(PHASES)
    assert kept[0] == len(names)
    assert (rows[1]["cuda_graph"], rows[1]["teacher"]) == (False, "split") and "teacher" not in rows[0]
    operators = rows[1]["operators"]
    assert sum(row["share"] for row in operators) == pytest.approx(1.0)
    assert {"convolutions", "matrix products", "fastsp's kernels"} <= {row["group"] for row in operators}
    assert len(operator_lines(rows)) == 1 + len(operators)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, ...>", "layout conversions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(...)", "attention"),
        ("triton_red_fused_native_group_norm_silu_12", "compiled kernels"),
        ("_adamw_ema_kernel", "fastsp's kernels"),
        ("_reproject_kernel", "fastsp's kernels"),
        ("sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
    ],
)
def test_operators_are_told_apart_by_their_names(name, group):
    assert group_of(name) == group


def test_the_time_limit_names_what_is_left_out():
    said: list[str] = []
    assert run(tiny_workload(), Plan(EAGER, 1, time_limit_s=0.0), said.append) == []
    assert sum("time limit" in line for line in said) == len(EAGER)


def test_large_models_are_compared_two_by_two(monkeypatch):
    workload = default_workload(CPU)
    parameters = sum(p.numel() for p in workload.unet().parameters())
    assert groups(EAGER, workload) == [EAGER]
    memory = type("Properties", (), {"total_memory": 0})()
    monkeypatch.setattr(bench_run.torch.cuda, "get_device_properties", lambda _device: memory)
    on_gpu = workload.on("cuda")
    memory.total_memory = 1000 * parameters
    assert groups(EAGER, on_gpu) == [EAGER]
    memory.total_memory = 50 * parameters
    assert groups(EAGER, on_gpu) == [("fastsp_sp", name) for name in EAGER if name != "fastsp_sp"]


def test_verdict_in_words():
    def row(name: str, speed: float, gflop: float) -> dict:
        row = {"name": name, "speed_relative_to_fastsp_sp": speed, "gflop_per_sample": gflop}
        return row | {"compiled": name.endswith("_compiled")}

    rows = [row("algorithm1_eager", 0.5, 4.0), row("fastsp_sp", 1.0, 3.0), row("fastsp_mse", 1.4, 2.0)]
    first, second = verdict(rows)
    assert "2.00 times as fast as algorithm1_eager" in first and "1.33 times the operations" in first
    assert "takes 1.40 times as long" in second and "1.50 times its operations" in second
    rows[0]["speed_relative_to_fastsp_sp"] = 1.25
    assert "slower (0.80 x) than algorithm1_eager" in verdict(rows)[0]
    unlike = "fastsp's steps are not compiled here, and others are: --compile compares like with like."
    assert verdict([row("split_compiled", 0.5, 4.0), *rows[1:]])[0] == unlike
    assert verdict(rows[:1]) == verdict(rows[1:2]) == []


def test_the_default_on_a_cpu_is_the_quickstart():
    ours, theirs = default_workload(CPU).config, load_config(QUICKSTART)
    assert ours.data.batch_size == theirs.data.batch_size and ours.data.resolution == theirs.data.resolution
    assert ours.precision == theirs.precision and ours.model == theirs.model
    assert datasheet_flops_per_s(CPU, torch.float32) is None


def test_what_is_not_installed_is_named():
    assert missing(["torch", "no_such_package"]) == ["no_such_package"]


def test_what_is_not_to_be_compiled_is_not(monkeypatch, tmp_path):
    file = tmp_path / "bench.json"
    command = ["fastsp", "bench", "--only", "fastsp_mse", "--rounds", "1", "--json", str(file), "compile=false"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    (row,) = json.loads(file.read_text())
    assert row["compiled"] is False


def test_command_writes_json_and_picture(monkeypatch, capsys, tmp_path):
    files = [tmp_path / "bench.json", tmp_path / "roofline.png"]
    arguments = ["--only", "diffusers_mse", "--only", "fastsp_mse", "--batch-size", "2", "--rounds", "1"]
    command = ["fastsp", "bench", *arguments, "--no-compile", "--json", str(files[0]), "--png", str(files[1])]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    rows = json.loads(files[0].read_text())
    assert [row["name"] for row in rows] == ["fastsp_mse", "diffusers_mse"] and rows[0]["batch_size"] == 2
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "diffusers_mse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "magic"], "--only 'magic' is unknown: use one of algorithm1_eager"),
        (["--only", "split_compiled", "--no-compile"], "--only split_compiled is compiled by its nature"),
        (["--png", "picture.gif"], "--png picture.gif must end in .png"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--config", "missing.yaml"], "missing.yaml does not exist"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["fastsp", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    complaint = capsys.readouterr().err
    assert exit_.value.code == 2 and complaint.count("\n") == 1 and message in complaint


@pytest.mark.slow
def test_compiled_step_has_the_same_loss():
    """Of the split step alone: compiling Algorithm 1's whole teacher takes minutes on two cores."""
    torch.manual_seed(0)
    workload = tiny_workload()
    eager, compiled = Split(workload), Split(workload, compiled=True)
    given = eager.draws()
    torch.testing.assert_close(compiled.loss(*given), eager.loss(*given), rtol=1e-4, atol=0)
    compiled.step()

"""`fastsp bench`: the providers compute the same loss, the figures are what they say, and the files are written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from bench.workloads import PIPELINES, tiny_workload
from fastsp_kernels import Stream, random_normals
from tiny import tiny_flow_pipeline

from fastsp.__main__ import main
from fastsp.bench.baselines import Algorithm1
from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.measure import (
    Entry,
    flops_per_sample,
    mfu,
    prepare,
    quantiles,
    relative_speed,
    seconds_per_call,
)
from fastsp.bench.networks import NETWORKS, parts_of
from fastsp.bench.providers import PROVIDERS
from fastsp.bench.run import run
from fastsp.bench.workload import batch_size, default_workload, named_workload, workload_of
from fastsp.config import load_config
from fastsp.diffusion.draws import Seeded
from fastsp.errors import UserError
from fastsp.models.schedulers import ddim_scheduler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # of the latter only the sizes are used
SLOW = pytest.mark.slow
EAGER = tuple(name for name, provider in PROVIDERS.items() if not provider.compiled)
MANY = ("fastsp_sp", "algorithm1_eager", "fastsp_mse")
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
CONTRACT = {"name", "samples_per_s", "ms_p20", "ms_p50", "ms_p80", "peak_memory_gb", "gflop_per_sample", "mfu"}


def philox_draws(step: FastspStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """noise, t and t' as fastsp's step draws them for its first positions."""
    seed, positions, process = step.training_step.seed, step.batch.positions, step.training_step.process
    t = process.draw(Seeded(seed, Stream.TIMESTEP, positions))
    noise = random_normals(seed, Stream.NOISE, positions, (4, 8, 8))
    return noise, t, process.draw_perceptual(Seeded(seed, Stream.PERCEPTUAL_TIMESTEP, positions), t)


def gradient(network) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])


@pytest.mark.parametrize("teacher", ["split", "batched"])
@pytest.mark.parametrize("network", PIPELINES)
def test_both_self_perceptual_steps_have_the_same_loss_and_gradient(network, teacher):
    workload = tiny_workload(teacher=teacher, network=network)
    ours, printed = FastspStep(workload), Algorithm1(workload)
    noise, t, t_prime = philox_draws(ours)
    loss, expected = ours.loss(), printed.loss(noise, t, t_prime)
    for each in (loss, expected):
        each.backward()
    actual, wanted = gradient(ours.training_step.network), gradient(printed.network)
    assert expected > 1e-6
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert (actual - wanted).norm() < 1e-3 * wanted.norm()
    last = ours.training_step.process.last
    other = printed.loss(noise, t, last - t_prime)
    assert abs(other - expected) > 1e-3 * expected, "another t' is another loss"


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_algorithm_1_of_other_predictions(prediction_type):
    scheduler = ddim_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=False)
    workload = replace(tiny_workload(), scheduler=scheduler)
    ours, printed = FastspStep(workload), Algorithm1(workload)
    torch.testing.assert_close(ours.loss(), printed.loss(*philox_draws(ours)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EAGER)
def test_a_step_trains(name, precision):
    """Weights and their average change, and stay finite."""
    torch.manual_seed(0)
    steps = PROVIDERS[name].build(tiny_workload(precision=precision).with_settings(compile=False))
    network = steps.training_step.network if isinstance(steps, FastspStep) else steps.network
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(2):
        steps.step()
    after = list(network.parameters())
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
    """From the architecture alone: nothing of 866 M parameters is held."""
    workload = named_workload("sd21", CUDA, ["data.batch_size=2"])
    assert flops_per_sample(PROVIDERS["fastsp_mse"], workload) == pytest.approx(2409e9, rel=0.002)


@pytest.mark.parametrize("layers", ["mid", *(pytest.param(name, marks=SLOW) for name in ("encoder+mid", "decoder"))])
def test_a_critic_adds_at_most_one_percent_to_the_operations_of_sd21(layers):
    workload = named_workload("sd21", CUDA, ["data.batch_size=2", f"stages.1.layers={layers}"])
    without, with_it = (flops_per_sample(PROVIDERS[name], workload) for name in ("fastsp_sp", "fastsp_sp_critic"))
    assert without < with_it < 1.01 * without


def test_counted_operations():
    """A truncated teacher does less than a whole one, and the batched one as much as two calls."""
    workload = tiny_workload(batch_size=2, teacher="batched")
    flops = {name: flops_per_sample(provider, workload) for name, provider in PROVIDERS.items()}
    assert flops["algorithm1_eager"] == flops["algorithm1_compiled"] > 1.05 * flops["fastsp_sp_split"]
    assert flops["fastsp_sp"] == flops["fastsp_sp_split"], "the frozen half costs no backward"
    assert flops["fastsp_sp"] == flops["fastsp_sp_no_graph"] > 1.2 * flops["fastsp_mse"]


def test_checkpointing_changes_nothing_that_is_counted():
    plain, checkpointed = (tiny_workload().with_settings(gradient_checkpointing=on) for on in (False, True))
    counts = [flops_per_sample(PROVIDERS["fastsp_sp"], workload) for workload in (plain, checkpointed)]
    assert counts[0] == counts[1]
    (row,) = run(checkpointed, ("fastsp_sp",), 1, print)
    assert row["samples_per_s"] > 0


def test_a_stage_is_measured_as_it_is_configured():
    of_paper = tiny_workload()
    mse, sp = of_paper.config.stages
    stages = [mse, sp.model_copy(update={"layers": "encoder", "mse_weight": 0.5})]
    workload = of_paper.with_settings(stages=stages)
    assert workload.stage("self_perceptual").learning_rate == stages[1].learning_rate
    assert FastspStep(workload).training_step.objective.mse_weight == 0.5
    flops = [flops_per_sample(PROVIDERS["fastsp_sp"], each) for each in (workload, of_paper)]
    assert flops[0] < flops[1], "the mid block is not run"


def test_quantiles_and_the_clock(monkeypatch):
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    clock = iter([10.0, 18.0])
    monkeypatch.setattr("fastsp.bench.measure.time.perf_counter", lambda: next(clock))
    assert seconds_per_call(lambda: None, CPU, calls=4) == 2.0


def test_a_ratio_is_that_of_the_rounds_taken_together():
    """What is slower than the reference has a speed below 1; the reference's earlier rounds do not count."""
    reference, slower = (Entry(name, None, 1.0, 0.0, {}, None) for name in ("fastsp_sp", "algorithm1_eager"))
    reference.seconds, slower.seconds = [9.0, 1.0, 2.0, 3.0], [2.0, 8.0, 9.0]
    assert relative_speed(slower, reference) == pytest.approx(1 / 3)


def test_utilisation():
    assert mfu(494.5e12, "NVIDIA H200", torch.bfloat16) == 0.5
    assert mfu(378e12, "NVIDIA H100 PCIe", torch.bfloat16) == 0.5, "not that of the H100 with more power"
    assert mfu(1e12, "the CPU (2 threads)", torch.bfloat16) is None and mfu(1e12, "H200", torch.float32) is None


def test_overrides_without_a_file():
    workload = default_workload(CPU, ["data.batch_size=32", "data.microbatch=8", "stages.1.layers=encoder"])
    assert workload.batch_size == 8 and workload.config.data.microbatch is None, "all take the same batch at once"
    assert workload.stage("self_perceptual").layers == "encoder"
    with pytest.raises(UserError, match=r"model\.pretrained=/nowhere: without --config .* give a run's file"):
        default_workload(CPU, ["model.pretrained=/nowhere"])


@pytest.mark.gpu
def test_gpu_a_captured_step_s_memory_is_counted():
    """Its replays allocate nothing: what they work in was taken by the recording. The batch is large beside cuBLAS's
    workspaces: 32 MiB for each stream and thread, of which a recording has its own."""
    workload = tiny_workload(batch_size=2048, device="cuda")
    peaks = []
    for cuda_graph in (False, True):
        entry = prepare("fastsp_sp", PROVIDERS["fastsp_sp"], workload.with_settings(cuda_graph=cuda_graph))
        peaks.append(entry.peak_bytes)
        entry.release()
    assert 0 < peaks[0] <= 1.1 * peaks[1] and peaks[1] < 2 * peaks[0]


def test_rows_have_the_contract_s_keys():
    kept: list[list[str]] = []
    workload = tiny_workload()
    rows = run(workload, MANY, 2, print, keep=lambda rows: kept.append([row["name"] for row in rows]))
    assert tuple(row["name"] for row in rows) == MANY and kept == [list(MANY[:2]), list(MANY)]
    for row in rows:
        assert row.keys() >= CONTRACT | {"environment", "date", "model", "batch_size"}
        assert row["mfu"] is None and row["peak_memory_gb"] is None
        assert row["samples_per_s"] == pytest.approx(3e3 / row["ms_p50"]) and row["first_step_s"] > 0
    assert [row["rounds"] for row in rows] == [4, 2, 2], "the reference takes turns with each of the others"
    ours, eager, mse = rows
    assert ours["speed_relative_to_fastsp_sp"] == 1.0 and eager["speed_relative_to_fastsp_sp"] > 0
    assert (ours["cuda_graph"], ours["teacher"], mse["teacher"]) == (False, "split", None) and "teacher" not in eager


def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    """With the reference gone, the others are measured without a ratio."""

    class TooLarge(FastspStep):
        def step(self) -> None:
            raise torch.OutOfMemoryError

    said: list[str] = []
    monkeypatch.setitem(PROVIDERS, "fastsp_sp", PROVIDERS["fastsp_sp"]._replace(build=TooLarge))
    (row,) = run(tiny_workload(), ("fastsp_sp", "fastsp_mse"), 1, said.append)
    assert row["name"] == "fastsp_mse" and row["speed_relative_to_fastsp_sp"] is None
    assert any("fastsp_sp: skipped, batch 3 does not fit" in line for line in said)


def test_the_default_on_a_cpu_is_the_quickstart():
    ours, theirs = default_workload(CPU).config, load_config(QUICKSTART)
    assert ours.data.batch_size == theirs.data.batch_size and ours.data.resolution == theirs.data.resolution
    assert ours.precision == theirs.precision and ours.model == theirs.model


@pytest.mark.parametrize(
    ("name", "class_name", "latents", "text"),
    [
        ("sd21", "UNet2DConditionModel", (4, 64, 64), (77, 1024)),
        ("sdxl", "UNet2DConditionModel", (4, 128, 128), (77, 2048)),
        ("sd35-medium", "SD3Transformer2DModel", (16, 128, 128), (333, 4096)),
        ("flux", "FluxTransformer2DModel", (16, 128, 128), (512, 4096)),
        ("pixart", "PixArtTransformer2DModel", (4, 128, 128), (300, 4096)),
    ],
)
def test_published_networks_have_their_sizes_on_a_gpu(name, class_name, latents, text):
    workload = named_workload(name, CUDA, ["data.batch_size=1"])
    assert workload.network_config["_class_name"] == class_name
    assert (workload.latent_shape, workload.text_shape) == (latents, text)
    assert workload.dtype == torch.bfloat16 and (workload.config.model.lora is None) == (name in ("sd21", "pixart"))
    half = named_workload(name, CUDA, ["data.batch_size=1", "data.resolution=512", "model.lora=null"])
    assert half.latent_shape[1:] == (64, 64) and half.config.model.lora is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW) if name in ("sd21", "sdxl") else name for name in NETWORKS]
)
def test_published_networks_are_small_on_a_cpu(name):
    """Every network takes a step by each of the providers."""
    workload = named_workload(name, CPU, ["stages.1.teacher=split"])
    assert workload.name.split(",")[1] == " small"
    rows = run(workload, MANY, 1, print)
    assert [row["name"] for row in rows] == list(MANY) and all(row["model"] == workload.name for row in rows)
    ours, eager, mse = (row["gflop_per_sample"] for row in rows)
    assert mse < ours < eager


def test_adapters_alone_are_trained():
    workload = named_workload("sd35-medium", CPU, ["stages.1.teacher=split", "model.lora.rank=4"])
    for steps in (FastspStep(workload), Algorithm1(workload)):
        network = steps.training_step.network if isinstance(steps, FastspStep) else steps.network
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        steps.step()
        changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all(".lora_" in name for name in changed)
        assert next(p for name, p in before.items() if "lora_A" in name).shape[0] == 4


def test_the_batch_fits_beside_two_providers_state():
    network, sizes = NETWORKS["flux"], named_workload("flux", CUDA, ["data.batch_size=1"])
    model = parts_of(network, small=False)
    of_h200 = batch_size(network, sizes.config, model, 150 * 10**9)
    smaller = sizes.config.data.model_copy(update={"resolution": 512})
    assert 1 <= of_h200 < batch_size(network, sizes.config.model_copy(update={"data": smaller}), model, 150 * 10**9)
    everything = sizes.config.model_copy(update={"model": sizes.config.model.model_copy(update={"lora": None})})
    with pytest.raises(UserError, match=r"FLUX\.1-dev does not fit: two steps to compare hold 532 GiB .* has 140; use"):
        batch_size(network, everything, model, 150 * 10**9)


def test_a_file_of_adapters_on_a_flow_is_measured(tmp_path):
    """Its model, of which only the sizes count, its adapters, and its microbatch."""
    tree = yaml.safe_load((QUICKSTART.parent / "flux-lora.yaml").read_text())
    tree["model"]["pretrained"] = str(tiny_flow_pipeline(tmp_path / "flux", "flux"))
    tree["data"] |= {"resolution": 16, "batch_size": 4, "microbatch": 2, "path": str(tmp_path)}
    tree["precision"] = "fp32"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    workload = workload_of(file, CPU, ["stages.1.teacher=split"])
    assert workload.batch_size == 2 and workload.config.model.lora.rank == tree["model"]["lora"]["rank"]
    names = ("fastsp_sp", "algorithm1_eager")
    assert tuple(row["name"] for row in run(workload, names, 1, print)) == names


def bench(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fastsp", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code or 0


def test_command_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    file = tmp_path / "bench.json"
    only = ["--only", "fastsp_sp", "--only", "fastsp_mse", "--rounds", "1", "--json", str(file)]
    assert bench(monkeypatch, *only, "data.batch_size=2", "compile=false", "stages.1.teacher=split") == 0
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["fastsp_sp", "fastsp_mse"]
    assert all(row["batch_size"] == 2 and row["compiled"] is False for row in rows)
    assert "fastsp_mse" in capsys.readouterr().out
    assert bench(monkeypatch, *only) == 2 and "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "magic"], "--only 'magic' is unknown: use one of fastsp_sp, algorithm1_eager"),
        (["--only", "algorithm1_compiled", "compile=false"], "--only algorithm1_compiled needs torch.compile"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--config", "missing.yaml"], "missing.yaml does not exist"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--network", "sd4"], "--network 'sd4' is unknown: use one of sd21, sdxl, sd35-medium, flux, pixart"),
        (["--network", "flux", "--config", "run.yaml"], "--network flux: --config names a model already"),
        (["--network", "flux", "model.pretrained=x"], "model.pretrained=x: without --config fastsp bench uses its own"),
        (["--network", "flux", "data.resolution=100"], "resolution 100 must be a multiple of 8"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    code = bench(monkeypatch, *arguments)
    complaint = capsys.readouterr().err
    assert code == 2 and complaint.count("\n") == 1 and message in complaint


@pytest.mark.slow
def test_compiled_step_has_the_same_loss():
    torch.manual_seed(0)
    workload = tiny_workload()
    eager, compiled = Algorithm1(workload), Algorithm1(workload, compiled=True)
    given = eager.draws()
    torch.testing.assert_close(compiled.loss(*given), eager.loss(*given), rtol=1e-4, atol=0)
    compiled.step()

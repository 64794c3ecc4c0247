"""Stable Diffusion 3.5 and FLUX on pictures of several shapes: each is trained at the times at which it is sampled."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fastsp_kernels import Stream
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_flow_pipeline
from training.test_buckets import picture_members
from training.test_distributed import job, launch, rewound
from training.test_flows import PROMPTS, assert_equal, loaded, rows, theirs

pytest.importorskip("nvidia.dali")

import fastsp.loss as loss_module
from fastsp.cli.encode import encode
from fastsp.config import load_config
from fastsp.diffusion.draws import Seeded
from fastsp.diffusion.process import FLOW_RANGE
from fastsp.diffusion.sampling import Guidance
from fastsp.generation.generate import load_trained
from fastsp.perceptual.metric import CALIBRATION_SAMPLES, ChannelScale
from fastsp.training import step as step_module
from fastsp.training.trainer import METRIC, train
from fastsp.training.validation import FIRST_POSITION, SEED, Stratified

CONFIG = """
run_dir: {folder}/run_{kind}
model: {{pretrained: {folder}/{kind}}}
data: {{source: images, path: {folder}/pictures, resolution: 32, buckets: 4, batch_size: 6, microbatch: 2,
  crop: center}}
stages:
  - {{name: mse, objective: mse, steps: 3, learning_rate: 1.0e-3}}
  - {{name: sp, objective: self_perceptual, steps: 3, learning_rate: 1.0e-4, timestep_sampling: same, teacher: split}}
optimizer: {{warmup_steps: 2}}
checkpoint: {{every: 2, keep: 9}}
validation: {{every: 3, path: {folder}/pictures, samples: 7, batch_size: 2}}
samples: {{every: 0, count: 2, steps: 2}}
log: {{every: 1}}
"""
KINDS = ("sd35", "flux")
Seen = list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]]  # shape of latents, positions, sigma


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "pictures").mkdir()
    for name, content in picture_members():
        (folder / "pictures" / name).write_bytes(content)
    for kind in KINDS:
        tiny_flow_pipeline(folder / kind, kind)
        (folder / f"{kind}.yaml").write_text(CONFIG.format(folder=folder, kind=kind))
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, dict[str, Any]]:
    """One of each kind, and what it saw: latents at t, at t', and features in the calibration."""
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patched:
        diffuse, reproject, calibrate = step_module.diffuse, loss_module.reproject, ChannelScale._calibrate
        for kind in KINDS:
            noisy: Seen = []
            perceptual: Seen = []
            features: list[torch.Tensor] = []

            def diffused(latents, marginal, *, positions, noisy=noisy, **more):
                noisy.append((tuple(latents.shape), positions.clone(), marginal[1].clone()))
                return diffuse(latents, marginal, positions=positions, **more)

            def reprojected(pred, latents, marginal, transition, *, positions, perceptual=perceptual, **more):
                perceptual.append((tuple(latents.shape), positions.clone(), marginal[1] + transition[1]))
                return reproject(pred, latents, marginal, transition, positions=positions, **more)

            def calibrated(self, real, features=features):
                features.append(real)
                return calibrate(self, real)

            patched.setattr(step_module, "diffuse", diffused)
            patched.setattr(loss_module, "reproject", reprojected)
            patched.setattr(ChannelScale, "_calibrate", calibrated)
            said = StringIO()
            train(load_config(folder / f"{kind}.yaml"), console=Console(file=said, width=500))
            found[kind] = {"noisy": noisy, "perceptual": perceptual, "features": features, "said": said.getvalue()}
    return found


def shifted(kind: str, u: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of times, where diffusers' pipeline has them for such latents."""
    if kind == "sd35":
        return 3 * u / (1 + 2 * u)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(shape[2] // 2 * shape[3] // 2, 4, 64)
    return torch.from_numpy(scheduler.time_shift(mu, 1.0, u.double().numpy()))


@pytest.mark.parametrize("kind", KINDS)
def test_each_shape_has_the_times_of_its_pipeline(runs, kind):
    stratified, seeds = runs[kind]["noisy"], set()
    for shape, positions, sigma in stratified:
        if is_validation := int(positions[0]) >= FIRST_POSITION:
            normals = Stratified(Stream.TIMESTEP, positions - FIRST_POSITION, 7).normals()
        else:
            normals = Seeded(torch.tensor(0), Stream.TIMESTEP, positions).normals()
        torch.testing.assert_close(sigma.double(), shifted(kind, normals.sigmoid(), shape).double(), rtol=0, atol=1e-6)
        seeds.add((is_validation, shape[2:]))
    assert len({shape for is_validation, shape in seeds if is_validation}) >= 3
    assert len({shape for is_validation, shape in seeds if not is_validation}) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_so_has_t_prime_where_it_is_drawn_as_t(runs, kind):
    low, high = FLOW_RANGE
    for shape, positions, sigma in runs[kind]["perceptual"]:
        if int(positions[0]) >= FIRST_POSITION:
            normals = Stratified(Stream.PERCEPTUAL_TIMESTEP, positions - FIRST_POSITION, 7).normals()
        else:
            normals = Seeded(torch.tensor(0), Stream.PERCEPTUAL_TIMESTEP, positions).normals()
        drawn = shifted(kind, normals.sigmoid(), shape).double()
        drawn = torch.where(drawn < low, 2 * low - drawn, torch.where(drawn > high, 2 * high - drawn, drawn))
        torch.testing.assert_close(sigma.double(), drawn, rtol=0, atol=2e-6)
    assert len({shape[2:] for shape, _, _ in runs[kind]["perceptual"]}) >= 3 and SEED == 0


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_scaled_by_the_samples_of_all_shapes(folder, runs, kind):
    features = runs[kind]["features"]
    assert len({real.shape[1] for real in features}) >= 3 and sum(map(len, features)) == CALIBRATION_SAMPLES
    samples = [sample.double() for real in features for sample in real]
    mean = torch.stack([sample.mean(0) for sample in samples]).mean(0)
    square = torch.stack([sample.square().mean(0) for sample in samples]).mean(0)
    found = load_file(folder / f"run_{kind}" / "stages/sp" / METRIC)["scales.0.variance"]
    torch.testing.assert_close(found.double(), square - mean.square(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stopped_goes_on_bit_for_bit(folder, runs, kind):
    again = folder / f"again_{kind}"
    rewound(folder / f"run_{kind}", 5, again)
    train(load_config(folder / f"{kind}.yaml", [f"run_dir={again}"]), resume=True, console=Console(quiet=True))
    assert_equal(again, folder / f"run_{kind}")
    measured = [rows(run, "validation_self_perceptual") for run in (again, folder / f"run_{kind}")]
    assert measured[0] == measured[1] and len(measured[1]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_any_shape_are_those_of_diffusers_pipeline(folder, runs, kind):
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    ours = load_trained(str(folder / f"run_{kind}" / "final")).generate(PROMPTS, noise, 4, Guidance(3.0))
    pipeline = loaded(folder / f"run_{kind}" / "final", kind)
    expected = theirs(pipeline, kind, noise, 4, 3.0, height=16, width=24).clamp(-1, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert ours.shape == (2, 3, 16, 24) and float(ours.std()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_latents_of_many_shapes_train_alike(folder, runs, kind, capsys):
    file, out = folder / f"{kind}.yaml", folder / f"latents_{kind}"
    encode(file, out, ["data.crop=center"], text_features=True, dtype="float32", batch_size=8)
    assert "data.buckets=4" in capsys.readouterr().out
    data = ["data.source=latents", f"data.path={out}", "validation.every=0", "data.crop=center"]
    train(load_config(file, [f"run_dir={folder / kind}_encoded", *data]), console=Console(quiet=True))
    torch.testing.assert_close(rows(folder / f"{kind}_encoded"), rows(folder / f"run_{kind}"), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_perceptual_network_for_each_shape(folder, runs, kind):
    run, again = folder / f"batched_{kind}", folder / f"batched_again_{kind}"
    more = ["stages.1.teacher=batched"]
    train(load_config(folder / f"{kind}.yaml", [f"run_dir={run}", *more]), console=Console(quiet=True))
    torch.testing.assert_close(rows(run), rows(folder / f"run_{kind}"), rtol=1e-4, atol=0)
    rewound(run, 5, again)
    train(load_config(folder / f"{kind}.yaml", [f"run_dir={again}", *more]), resume=True, console=Console(quiet=True))
    assert_equal(again, run)


@pytest.mark.slow
def test_two_processes_are_as_one(folder):
    """Of FLUX: what else Stable Diffusion 3 does has no part in it."""
    data = f"data={{source: images, path: {folder / 'pictures'}, resolution: 32, buckets: 4, batch_size: 12}}"
    words = [f"model={{pretrained: {folder / 'flux'}}}", data, "data.microbatch=3", "stages.1.teacher=split"]
    launch(2, folder, *(job(folder / f"two_{how}", *words, f"distributed={how}") for how in ("ddp", "fsdp")))
    launch(1, folder, job(folder / "one", *words))
    one = json.loads((folder / "one.seen.0").read_text())
    for how in ("ddp", "fsdp"):
        two = [json.loads((folder / f"two_{how}.seen.{rank}").read_text()) for rank in (0, 1)]
        assert two[0] | two[1] == one and len(one) == 12 * 3 + CALIBRATION_SAMPLES
        torch.testing.assert_close(rows(folder / f"two_{how}"), rows(folder / "one"), rtol=2e-4, atol=0)

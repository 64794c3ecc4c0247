"""Pictures in batches: the same whatever the batch, the start and, nearly, the device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("nvidia.dali")

from export import pipelines
from export.test_export import finished_run

from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.generation.generate import (
    Sampling,
    check_for_sampling,
    frame_steps,
    generate,
    generate_pictures,
    load_for_sampling,
    num_batches,
)
from fastsp.models import TextToImageModel, load_pipeline

PROMPTS = ["a handwritten one", "", "a handwritten two", "three", "a handwritten four"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipelines.pipeline("sd1").save_pretrained(folder)
    return folder


def pictures(model: TextToImageModel, sampling: Sampling, first: int = 0) -> torch.Tensor:
    return torch.cat([images for _, images in generate(model, PROMPTS, sampling, first)])


def test_neither_the_batch_nor_the_start_matters(folder: Path) -> None:
    model = load_for_sampling(str(folder))
    for guidance in (Guidance(), Guidance(4.0, 0.7)):
        whole = pictures(model, Sampling(3, guidance, batch_size=5))
        parts = pictures(model, Sampling(3, guidance, batch_size=2))
        assert whole.shape == (5, 3, 16, 16)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
        rest = pictures(model, Sampling(3, guidance, batch_size=2), first=2)
        assert torch.equal(rest, parts[2:])
    assert num_batches(5, 2) == 3 and num_batches(0, 2) == 0


def test_a_step_counts_once_for_a_batch(folder: Path) -> None:
    steps: list[int] = []
    model = load_for_sampling(str(folder))
    sampling = Sampling(4, batch_size=3)
    frames = list(generate(model, PROMPTS, sampling, after_step=lambda: steps.append(1), frames=9))
    assert len(steps) == 4 * 2 and [indices for indices, _ in frames] == [range(3)] * 4 + [range(3, 5)] * 4
    assert torch.equal(torch.cat([frames[3][1], frames[7][1]]), pictures(model, sampling)), "the last frame is the end"
    assert frame_steps(4, 9) == [1, 2, 3, 4] and frame_steps(100, 4) == [25, 50, 75, 100] and frame_steps(25, 1) == [25]


def test_memory_does_not_grow_with_the_number_of_pictures(folder: Path) -> None:
    """What the UNet and the VAE's decoder see at once, and what is kept of the pictures."""
    model = load_for_sampling(str(folder))
    seen: dict[str, list[int]] = {"unet": [], "decoder": []}
    for name, module in (("unet", model.network), ("decoder", model.vae.decoder)):
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(len(args[0])))
    full: list[int] = []
    kept = generate_pictures(
        model,
        [str(number) for number in range(11)],
        Sampling(2, Guidance(4.0), batch_size=3),
        side=5,
        frames=2,
        each=lambda index, picture: full.append(picture.width),
    )
    assert max(seen["unet"]) == 2 * 3 and set(seen["decoder"]) == {1} and len(seen["decoder"]) == 22
    assert {picture.size for picture in kept} == {(5, 5)} and full == [16] * 22


def test_a_stage_is_sampled_while_the_run_trains_on(folder: Path, tmp_path: Path) -> None:
    """Until there is a final/, the other parts are those of the model that the run started from."""
    run = finished_run(tmp_path, "sd1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"preset": None, "pretrained": str(folder)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "checkpoints").mkdir()
    check_for_sampling(str(run / "stages" / "mse"))
    finished = pictures(load_for_sampling(str(run / "stages" / "mse")), Sampling(2))
    shutil.rmtree(run / "final")
    check_for_sampling(str(run / "stages" / "mse"))
    assert torch.equal(pictures(load_for_sampling(str(run / "stages" / "mse")), Sampling(2)), finished)
    shutil.rmtree(run / "stages" / "sp")
    for look in (load_for_sampling, check_for_sampling):
        with pytest.raises(UserError, match=r"stages/sp: the run has not finished that stage; finished: mse, mse_l"):
            look(str(run / "stages" / "sp"))
        with pytest.raises(UserError, match="is a run directory: take the run's final/"):
            look(str(run))
        (run / "checkpoints" / "step_00000002").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match="is a checkpoint without a manifest: take the run's final/"):
            look(str(run / "checkpoints" / "step_00000002"))
    another = shutil.copytree(folder, tmp_path / "another")
    shutil.rmtree(another / "text_encoder")
    config["model"]["pretrained"] = str(another)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="another lacks text_encoder"):
        check_for_sampling(str(run / "stages" / "mse"))


def test_too_many_steps(folder: Path) -> None:
    with pytest.raises(UserError, match="--steps 1001: the model knows 1000 timesteps"):
        pictures(load_for_sampling(str(folder)), Sampling(1001))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_pictures_in_bfloat16(folder: Path) -> None:
    on_gpu, on_cpu = load_for_sampling(str(folder)), load_pipeline(str(folder))
    assert on_gpu.network.dtype == torch.bfloat16 and on_gpu.vae.dtype == torch.float32
    ours, exact = pictures(on_gpu, Sampling(10)), pictures(on_cpu, Sampling(10))
    assert ours.device.type == "cpu"
    assert (ours - exact).abs().mean() < 0.05 * exact.std()

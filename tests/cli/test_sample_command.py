"""`fastsp sample`: equal noise over models and batch sizes, layout, metadata, and nothing overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from export import pipelines
from export.test_export import finished_run
from PIL import Image
from tiny import tiny_stable_diffusion

from fastsp.cli.sample import short_names
from fastsp.diffusion import draws
from fastsp.generation.grids import to_pil
from fastsp.models import digits_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of Stable Diffusion 1's classes: stages mse, sp, mse_longer; 16x16 pictures."""
    return finished_run(tmp_path_factory.mktemp("run"), "sd1")


def pixels(file: Path) -> torch.Tensor:
    picture = Image.open(file).convert("RGB")
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).int()


def test_single_pictures_with_their_parameters(command, run: Path, tmp_path: Path) -> None:
    """They are the pictures that diffusers draws from the noise that the metadata name."""
    texts = ("a handwritten two", "日本語")
    prompts = [part for text in texts for part in ("--prompt", text)]
    singles = tmp_path / "singles"
    arguments = ("--model", run / "final", "--steps", 5, "--seed", 3, "--singles", singles)
    command("sample", *arguments, *prompts, "--count", 2, "--out", tmp_path / "grid.png")
    files = sorted(singles.iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    noise = draws.evaluation_noise(3, torch.arange(4), (4, 4, 4))
    pipeline = StableDiffusionPipeline.from_pretrained(run / "final")
    size = {"num_inference_steps": 5, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    prompts = [text for text in texts for _ in range(2)]
    expected = to_pil(pipeline(prompts, latents=noise, **size).images * 2 - 1)
    for index, (file, theirs) in enumerate(zip(files, expected, strict=True)):
        ours = Image.open(file)
        assert ours.text["prompt"] == prompts[index] and ours.text["index"] == str(index)
        assert ours.text["parameters"].startswith(f"{prompts[index]}\nSteps: 5, Sampler: DDIM, ")
        assert "CFG scale: 1, Seed: 3, Size: 16x16" in ours.text["parameters"]
        difference = torch.frombuffer(bytearray(ours.tobytes()), dtype=torch.uint8).int() - torch.frombuffer(
            bytearray(theirs.tobytes()), dtype=torch.uint8
        )
        assert difference.abs().max() <= 1


def test_equal_noise_over_stages_is_a_row_each(command, run: Path, tmp_path: Path) -> None:
    """Figure 1: the second model alone draws the same pictures as in the second row."""
    stages = [run / "stages" / name for name in ("mse", "sp")]
    common = ("sample", "--prompt", "a handwritten one", "--count", 3, "--steps", 3)
    both, single = tmp_path / "both", tmp_path / "single"
    models = [part for stage in stages for part in ("--model", stage)]
    command(*common, *models, "--out", tmp_path / "compared.png", "--singles", both)
    command(*common, "--model", run / "final", "--out", tmp_path / "one.png", "--singles", single, "--batch-size", 2)
    for index in range(3):
        name = f"{index:05d}.png"
        assert (pixels(both / "sp" / name) - pixels(single / name)).abs().max() <= 1, "whatever the batch size"
        assert (pixels(both / "mse" / name) - pixels(single / name)).abs().max() > 20
    compared = Image.open(tmp_path / "compared.png")
    assert compared.text["model"].splitlines() == [str(stage) for stage in stages]
    assert compared.width > 3 * 128 and compared.height > 2 * 128


def test_the_trajectory_ends_in_the_picture(command, run: Path, tmp_path: Path) -> None:
    common = ("sample", "--model", run / "final", "--prompt", "a handwritten one", "--count", 2, "--steps", 4)
    command(*common, "--out", tmp_path / "way.png", "--trajectory")
    command(*common, "--out", tmp_path / "end.png", "--singles", tmp_path / "singles")
    way = pixels(tmp_path / "way.png")
    last = way[-50:-2, -50:-2]  # the last cell: 16 px, enlarged three times
    assert torch.equal(last[::3, ::3], pixels(tmp_path / "singles" / "00001.png"))


def test_raw_weights_on_request(command, fails, run: Path, tmp_path: Path) -> None:
    """Of a stage, and of final/, which is the stage sp; another model or stage has none."""
    torch.manual_seed(7)
    pipelines.unet("sd1").save_pretrained(run / "stages" / "sp" / "raw")
    arguments = ("sample", "--prompt", "a", "--steps", 2, "--out")
    for name, model, weights in (
        ("average", "stages/sp", "average"),
        ("stage", "stages/sp", "raw"),
        ("final", "final", "raw"),
        ("named", "stages/sp/raw", "average"),
    ):
        command(*arguments, tmp_path / f"{name}.png", "--model", run / model, "--weights", weights)
    average, *raw = (pixels(tmp_path / f"{name}.png") for name in ("average", "stage", "final", "named"))
    assert all(torch.equal(raw[0], other) for other in raw[1:]) and (raw[0] - average).abs().max() > 20
    assert Image.open(tmp_path / "final.png").text["model"] == str(run / "stages" / "sp" / "raw")
    more = ("--weights", "raw", "--model")
    assert "stages/mse has none: they lie in the raw/ of" in fails(
        *arguments, tmp_path / "x.png", *more, run / "stages/mse"
    )
    assert "/model has none" in fails(*arguments, tmp_path / "x.png", *more, tmp_path / "model")
    assert "'rw' is not one of 'average', 'raw'" in fails(
        *arguments, tmp_path / "x.png", "--model", "m", "--weights", "rw"
    )


def test_guidance_and_resolution(command, run: Path, tmp_path: Path) -> None:
    common = ("sample", "--model", run / "final", "--prompt", "a handwritten one", "--steps", 3)
    for name, more in {
        "plain": (),
        "guided": ("--guidance", 5),
        "rescaled": ("--guidance", 5, "--rescale", 0.7),
        "negative": ("--guidance", 5, "--negative-prompt", "blank"),
        "large": ("--resolution", 32),
        "wide": ("--resolution", "32x16"),
    }.items():
        command(*common, *more, "--out", tmp_path / f"{name}.png", "--singles", tmp_path / name)
    plain, guided, rescaled, large = (
        pixels(tmp_path / name / "00000.png") for name in ("plain", "guided", "rescaled", "large")
    )
    assert not torch.equal(plain, guided) and not torch.equal(guided, rescaled)
    assert large.shape == (32, 32, 3) and pixels(tmp_path / "wide" / "00000.png").shape == (16, 32, 3)
    assert not torch.equal(guided, pixels(tmp_path / "negative" / "00000.png"))
    negative = Image.open(tmp_path / "negative" / "00000.png").text["parameters"]
    assert negative.startswith("a handwritten one\nNegative prompt: blank\nSteps: 3,")
    assert "CFG scale: 5," in Image.open(tmp_path / "guided" / "00000.png").text["parameters"]


def test_an_xl_pipeline(command, tmp_path: Path) -> None:
    folder = tiny_stable_diffusion(tmp_path / "xl", "sdxl")
    out = tmp_path / "xl.png"
    assert f"{out}: 1 picture in 2 DDIM steps" in command(
        "sample", "--model", folder, "--prompt", "a", "--steps", 2, "--guidance", 2, "--out", out
    )


def test_nothing_is_overwritten(command, fails, run: Path, tmp_path: Path) -> None:
    out, singles = tmp_path / "out.png", tmp_path / "singles"
    arguments = ("sample", "--model", run / "final", "--prompt", "a", "--steps", 1)
    out.write_text("precious")
    assert "out.png is there already; --force replaces it" in fails(*arguments, "--out", out)
    assert out.read_text() == "precious"
    command(*arguments, "--out", out, "--singles", singles, "--force")
    assert "00000.png is there already" in fails(*arguments, "--out", tmp_path / "new.png", "--singles", singles)
    assert not (tmp_path / "new.png").exists()


def test_mistakes(fails, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    arguments = ("sample", "--model", run / "final", "--out", out)
    assert "is not UTF-8 text" in fails(*arguments, "--prompts", tmp_path / "binary.txt")
    assert "knows 1000 timesteps" in fails(*arguments, "--prompt", "a", "--steps", 1001)
    assert "must be a multiple of 4" in fails(*arguments, "--prompt", "a", "--resolution", 17)
    assert "resolution 16 x 18 must be a multiple of 4" in fails(*arguments, "--prompt", "a", "--resolution", "16x18")
    for size in ("wide", "32x", "0x16", "0"):
        assert "or WIDTHxHEIGHT such as" in fails(*arguments, "--prompt", "a", "--resolution", size)
    assert "give one of them" in fails(*arguments, "--prompt", "a", "--trajectory", "--singles", tmp_path / "s")
    digits_model(8, 0).save(tmp_path / "digits")
    more = ("--model", tmp_path / "digits", "--prompt", "a", "--steps", 1)
    assert "makes pictures of 8 px, the others of 16: give --resolution" in fails(*arguments, *more)
    assert not out.exists()


def test_a_second_model_that_is_wrong_is_named_before_the_first_is_drawn(
    fails, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        pytest.fail(f"{name} was loaded")

    monkeypatch.setattr("fastsp.generation.generate.load_for_sampling", load)
    out = tmp_path / "out.png"
    arguments = ("sample", "--model", run / "final", "--prompt", "a", "--out", out, "--model")
    assert "no diffusers pipeline folder" in fails(*arguments, tmp_path / "nowhere")
    assert "has not finished that stage; finished: mse, mse_longer, sp" in fails(*arguments, run / "stages" / "spp")
    (tmp_path / "model.safetensors").write_text("hello")
    assert "is no safetensors file" in fails(*arguments, tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_text("hello")
    assert "is a pickle" in fails(*arguments, tmp_path / "model.ckpt")
    spoiled = shutil.copytree(run / "final", tmp_path / "spoiled")
    for file in (spoiled / "vae").glob("*.safetensors"):
        file.unlink()
    assert "vae has no .safetensors file" in fails(*arguments, spoiled)
    shutil.rmtree(spoiled / "vae")
    assert "lacks vae" in fails(*arguments, spoiled)


def test_short_names() -> None:
    assert short_names(["runs/a/final"]) == ["final"]
    assert short_names(["runs/a/final", "/x/runs/b/final"]) == ["a", "b"]
    assert short_names(["a/stages/mse", "a/stages/sp"]) == ["mse", "sp"]
    assert short_names(["x/a", "y/a", "z/a/a"]) == ["x", "y", "a"]
    assert short_names(["hub/model", "hub/model"]) == ["hub/model", "hub/model"]

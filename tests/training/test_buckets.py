"""Training on pictures of several shapes: exact over kills and resumes, and the same in several processes."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import closing
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import torch
from data.helpers import write_tar
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_stable_diffusion
from torch._dynamo.testing import CompileCounter
from training.processes import Run, logged_steps, metrics, start
from training.test_capture import make, mixed
from training.test_distributed import apart, job, launch
from training.test_validation import Half

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.data.source import open_source
from fastsp.errors import UserError
from fastsp.models import load_model
from fastsp.models.attention import AttnProcessorByLength, Choice, use_attention
from fastsp.training import step as step_module
from fastsp.training import trainer as trainer_module
from fastsp.training.build_step import build_step
from fastsp.training.compilation import compiler_settings
from fastsp.training.trainer import train
from fastsp.training.validation import Validation

CONFIG = """
run_dir: {run}
model: {model}
data: {{source: images, path: {pictures}, resolution: 32, buckets: 4, batch_size: 6, microbatch: 2, crop: random}}
stages:
  - {{name: mse, objective: mse, steps: 5, learning_rate: 1e-3}}
  - {{name: sp, objective: self_perceptual, steps: 4, learning_rate: 1e-4}}
checkpoint: {{every: 2, keep: 99}}
log: {{every: 1}}
samples: {{every: 0, count: 2, steps: 2}}
evaluation: {{enabled: false}}
"""
PRESET = "{preset: photographs, unet: {block_out_channels: [32, 32]}}"
SIZES = [(40, 60), (60, 40), (50, 50), (44, 64), (64, 45), (48, 47), (39, 60), (61, 41)]  # height, width


def picture_members() -> list[tuple[str, bytes]]:
    generator, members = torch.Generator().manual_seed(0), []
    for index in range(24):
        height, width = SIZES[index % len(SIZES)]
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        content = BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(content, "PNG")
        members.append((f"{index:03d}.png", content.getvalue()))
        members.append((f"{index:03d}.txt", f"a handwritten {'one' if index % 2 else 'two'}".encode()))
    return members


def write_config(folder: Path, model: str = PRESET) -> Path:
    """A configuration and its pictures, as a folder and as a tar."""
    (folder / "pictures").mkdir()
    for name, content in picture_members():
        (folder / "pictures" / name).write_bytes(content)
    write_tar(folder / "set" / "0.tar", picture_members())
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(run=folder / "run", model=model, pictures=folder / "pictures"))
    return file


def comparable(run: Path) -> list[tuple]:
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in metrics(run) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_run(run: Path, other: Path) -> None:
    assert comparable(run) == comparable(other) and len(comparable(other)) == 9
    for stage in ("mse", "sp"):
        ours, theirs = weights(run / "stages" / stage), weights(other / "stages" / stage)
        assert len(theirs) > 20 and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_microbatches_of_several_shapes_train_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    file, seen, diffuse = write_config(tmp_path), [], step_module.diffuse

    def recorded(latents, *args, **more):
        seen.append(tuple(latents.shape))
        return diffuse(latents, *args, **more)

    monkeypatch.setattr(step_module, "diffuse", recorded)
    said = StringIO()
    validation = ["validation={every: 3, samples: 5, batch_size: 2}", f"validation.path={tmp_path / 'pictures'}"]
    train(load_config(file, validation), console=Console(file=said, width=500))
    run = tmp_path / "run"
    assert "buckets: " in said.getvalue() and "pictures (width x height); " in said.getvalue()
    microbatches = [shape for shape in seen if shape[0] == 2]
    assert len({shape[2:] for shape in microbatches}) >= 3, microbatches
    assert all(loss > 0 for _, _, loss, _ in comparable(run))
    assert sum("validation_mse" in row for row in metrics(run)) >= 4
    assert Image.open(run / "samples" / "sp_final.png").size[0] >= 64

    again = shutil.copytree(run, tmp_path / "again", ignore=shutil.ignore_patterns("final", "sp", ".lock"))
    for folder in (again / "checkpoints").iterdir():
        if int(folder.name[5:]) > 7:
            shutil.rmtree(folder)
    config = load_config(file, [*validation, f"run_dir={again}"])
    train(config, resume=True, console=Console(quiet=True), allow_changes=True)
    assert_same_run(again, run)


def test_other_pictures_of_the_same_names_are_noticed_if_their_shapes_differ(tmp_path):
    file = write_config(tmp_path)
    short = ["stages.0.steps=2", "stages.1.steps=1"]
    train(load_config(file, short), console=Console(quiet=True))
    picture = tmp_path / "pictures" / "003.png"
    image = Image.open(picture)
    image.resize((image.width * 2, image.height * 2)).save(picture)
    train(load_config(file, short), resume=True, console=Console(quiet=True))
    image.resize((40, 90)).save(picture)
    with pytest.raises(UserError, match=r"24 samples before, 24 now, the pictures' shapes \(data.buckets\) changed"):
        train(load_config(file, short), resume=True, console=Console(quiet=True))


def test_validation_in_two_processes_is_that_of_one(tmp_path, monkeypatch):
    """Bit for bit; its batches have one shape each, and figures do not depend on how they are shared."""
    whole, halves, losses = [], [], Validation.losses
    shapes = set()

    def compare(self, step, average):
        whole.append(losses(self, step, average))
        others = []
        for rank in (0, 1):
            ranks = Half(rank, 2)
            object.__setattr__(ranks, "others", others)
            half = Validation(self.config, self.source, ranks)
            figures = losses(half, step, average)
            shapes.update(shape for batch in half._batches.values() for shape in batch.image_shapes())
        halves.append(figures)
        return figures

    monkeypatch.setattr(Validation, "losses", compare)
    validation = ["validation={every: 2, samples: 11, batch_size: 2}", f"validation.path={tmp_path / 'pictures'}"]
    file = write_config(tmp_path)
    train(load_config(file, [*validation, "stages.0.steps=2", "stages.1.steps=1"]), console=Console(quiet=True))
    assert halves == whole and len(whole) == 4 and len(shapes) >= 3


def test_sdxl_is_told_each_picture_s_own_size_crop_and_shape(tmp_path):
    model_folder = tiny_stable_diffusion(tmp_path / "model", "sdxl")
    config = load_config(write_config(tmp_path, f"{{pretrained: {model_folder}}}"), ["data.crop=center"])
    model = load_model(str(model_folder))
    source = open_source(config.data, tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, channels=3, seed=0)
    with closing(source.batches(batch_size=24, last_position=24)) as batches:
        batch = next(batches)
    step, _ = build_step(
        config, config.stages[0], model, model.encode_no_prompt(), initial=model.network, frozen_network=None
    )
    told = set()
    for part in batch.microbatches(2):
        height, width = part.pixel_values.shape[2:]
        times = step.conditioning(step.encoded(part), part.positions).time_ids.int().tolist()
        for (own_height, own_width, top, left, *shape), index in zip(times, source.order(part.positions), strict=True):
            assert (own_height, own_width) == SIZES[int(index) % len(SIZES)] and shape == [height, width]
            scale = max(height / own_height, width / own_width)
            assert (
                abs(top - (own_height * scale - height) / 2) <= 1 and abs(left - (own_width * scale - width) / 2) <= 1
            )
            told.add((height, width))
    assert len(told) >= 3


def test_each_shape_has_the_attention_kernel_that_is_best_for_it(tmp_path, monkeypatch):
    """What a GPU measures is made up here; the processors then choose by the length of the queries."""
    asked: list[tuple[int, ...]] = []

    def choose(wanted, network, latents, text, dtype, device):
        asked.append(latents)
        return Choice("math" if latents[2] > latents[3] else "sdpa", {"sdpa": 1.0, "math": 2.0})

    built, build = [], trainer_module.build_step
    monkeypatch.setattr("fastsp.training.attention_choice.choose_attention", choose)

    def recorded(*args, **more):
        built.append(more["attention"])
        return build(*args, **more)

    monkeypatch.setattr(trainer_module, "build_step", recorded)
    file, said = write_config(tmp_path), StringIO()
    train(load_config(file, ["stages.0.steps=1", "stages.1.steps=1"]), console=Console(file=said, width=500))
    assert len(asked) == len(set(asked)) >= 3 and all(shape[0] == 2 for shape in asked)
    kernel = built[0]
    assert isinstance(kernel, dict) and built[1] == kernel, "once for all stages"
    assert set(kernel.values()) == {"sdpa", "math"}
    assert len(list((tmp_path / "run").glob("attention-*.json"))) == len(asked)
    assert AttnProcessorByLength(kernel).processors.keys() == kernel.keys()


def test_every_shape_is_compiled_once():
    """Online network and both graphs of the teacher; with a kernel for each length, and coming back to a shape."""
    counter = CompileCounter()
    expected, step = (make("cpu", "self_perceptual", "batched", microbatch=2) for _ in range(2))
    use_attention(step.network, {64: "math", 144: "sdpa"})
    step.network.compile(backend=counter, dynamic=False)
    step.objective.self_perceptual.compile_teacher(backend=counter)
    counts = []
    with compiler_settings(shapes=2):
        for number, sides in enumerate([(8, 8), (8, 12), (12, 8), (12, 12), (8, 12)], start=1):
            ours, plain = step(mixed(number, "cpu", sides), number), expected(mixed(number, "cpu", sides), number)
            torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-4, atol=0)
            counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == [3, 6, 6, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "kind"), [("images", None), ("shards", None), ("latents", "sdxl")])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, source, kind):
    model = PRESET if kind is None else f"{{pretrained: {tiny_stable_diffusion(tmp_path / 'model', kind)}}}"
    file = write_config(tmp_path, model)
    overrides = [f"data.source={source}"]
    if source == "shards":
        overrides.append(f"data.path={tmp_path / 'set'}")
    if source == "latents":
        overrides += [f"data.path={tmp_path / 'latents'}", "data.crop=center"]
        encoding = start(
            tmp_path / "said", "encode", "--config", file, "--out", tmp_path / "latents", "data.crop=center"
        )
        assert encoding.wait(300) == 0, encoding.output()

    def begin(name: str, *more: str) -> Run:
        run = tmp_path / name
        return start(run.with_suffix(".out"), "train", "--config", file, f"run_dir={run}", *overrides, *more)

    straight = begin("straight")
    assert straight.wait(300) == 0, straight.output()
    for steps in (3, 7):
        killed = begin("killed", *(["--resume"] if steps > 3 else []))
        killed.until(lambda at=steps: logged_steps(tmp_path / "killed") >= at)
        killed.signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    resumed = begin("killed", "--resume")
    assert resumed.wait(300) == 0, resumed.output()
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_see_what_one_sees(tmp_path):
    write_config(tmp_path)
    data = (
        f"data={{source: images, path: {tmp_path / 'pictures'}, resolution: 32, buckets: 4, batch_size: 12, "
        "microbatch: 3, flip: true, crop: random}"
    )
    more = (f"model={PRESET}", data)
    launch(2, tmp_path, job(tmp_path / "two", *more))
    launch(1, tmp_path, job(tmp_path / "one", *more))
    two = json.loads((tmp_path / "two.seen.0").read_text()), json.loads((tmp_path / "two.seen.1").read_text())
    one = json.loads((tmp_path / "one.seen.0").read_text())
    assert not two[0].keys() & two[1].keys() and two[0] | two[1] == one and len(one) == 12 * 6
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert apart(tmp_path / "two", tmp_path / "one") < 2e-3

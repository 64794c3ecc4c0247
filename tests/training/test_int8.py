"""Whole runs of adapters on a base in 8 bits: what is shared, what is written, that a stopped one goes on exactly."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import picture_folder, tiny_flow_pipeline, tiny_stable_diffusion
from training.processes import ROOT, logged_steps, metrics, start
from training.test_distributed import OVERRIDES, job, launch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchao")

from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.export.export import export_run
from fastsp.generation.generate import load_trained
from fastsp.models import load_pipeline
from fastsp.models.int8 import Int8Linear
from fastsp.models.lora import DIFFUSERS_FILE, adapters, base_of
from fastsp.training import trainer
from fastsp.training.build_step import build_step
from fastsp.training.memory import needs, skeleton_of

LORA = "model.lora={rank: 2, alpha: 4, target_modules: [to_q, to_v]%s}"
INT8, WHOLE = LORA % ", base_precision: int8", LORA % ""
KINDS = ("sd15", "flux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    picture_folder(folder / "pictures")
    tiny_stable_diffusion(folder / "sd15", "sd15")
    tiny_flow_pipeline(folder / "flux", "flux")
    return folder


def overrides(folder: Path, kind: str, name: str, *more: str) -> list[str]:
    """Of the quickstart's configuration."""
    where = [f"model={{pretrained: {folder / kind}, prediction: keep}}"]
    where += [f"data={{source: images, path: {folder / 'pictures'}, resolution: 16, batch_size: 12}}"]
    return [f"run_dir={folder / name}", *OVERRIDES, *where, INT8, *more]


def configured(folder: Path, kind: str, name: str, *more: str) -> Config:
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides(folder, kind, name, *more))


@dataclass
class Finished:
    """A run, and what it held of its last stage."""

    run: Path
    step: Any
    average: Any


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Finished]:
    found = {}
    for kind in KINDS:
        built: list[Any] = []

        def build_and_keep(*arguments: Any, built: list[Any] = built, **keywords: Any) -> Any:
            built.append(build_step(*arguments, **keywords))
            return built[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_step", build_and_keep)
            trainer.train(configured(folder, kind, f"run_{kind}", "precision=bf16"))
        found[kind] = Finished(folder / f"run_{kind}", *built[-1])
    return found


def networks(finished: Finished) -> tuple[Any, Any, Any]:
    """The trained one, its average and the perceptual network."""
    return finished.step.network, finished.average, finished.step.objective.self_perceptual.perceptual_network.truncated


@pytest.mark.parametrize("kind", KINDS)
def test_one_base_in_8_bits_is_shared_by_all(runs, kind):
    student, *others = networks(runs[kind])
    storages = [{p.untyped_storage().data_ptr(): p.nbytes for p in n.parameters()} for n in (student, *others)]
    base = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
    of_adapters = [sum(p.nbytes for p in adapters(network).values()) for network in (student, *others)]
    assert sum({**storages[0], **storages[1], **storages[2]}.values()) == base + sum(of_adapters)
    layers = [module for module in student.modules() if isinstance(module, Int8Linear)]
    before = base + sum(layer.codes.numel() - layer.scale.nbytes for layer in layers)  # two bytes each, no scales
    whole = load_pipeline(str(runs[kind].run.parent / kind)).network
    assert before == 2 * sum(p.numel() for p in whole.parameters())
    assert runs[kind].step.objective.self_perceptual.teacher == "batched"


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_are_written_and_say_what_they_were_trained_on(runs, folder, kind, tmp_path):
    run = runs[kind].run
    for stage in ("mse", "sp"):
        assert all(".lora" in name for name in load_file(run / "stages" / stage / DIFFUSERS_FILE))
    base = base_of(run / "final")
    assert base.precision == "int8" and base.name == str(folder / kind)
    assert "were held in 8 bits" in (run / "final" / "README.md").read_text()
    export_run(run, tmp_path / "whole")
    assert "its linear layers were held in int8" in (tmp_path / "whole" / "README.md").read_text()
    whole, fused = (load_pipeline(str(name)).network.state_dict() for name in (tmp_path / "whole", run / "final"))
    assert whole.keys() == fused.keys() and all(torch.equal(whole[name], fused[name]) for name in fused)
    original = load_pipeline(str(folder / kind)).network.state_dict()
    assert {name for name in original if not torch.equal(original[name], fused[name])} == {
        f"{name.partition('.')[2].partition('.lora_')[0]}.weight" for name in adapters(runs[kind].step.network)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_s_adapters_are_fused_into_the_whole_base(runs, kind):
    """Those of the last step are what `final/` has."""
    run = runs[kind].run
    at_the_end = load_trained(str(run / "checkpoints" / "step_00000006")).network.state_dict()
    final = load_trained(str(run / "final")).network.state_dict()
    assert at_the_end.keys() == final.keys()
    for name, weight in final.items():
        torch.testing.assert_close(at_the_end[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(runs, folder, kind):
    again = folder / f"again_{kind}"
    shutil.copytree(runs[kind].run, again, ignore=shutil.ignore_patterns("final", ".lock", "sp", "step_00000006"))
    (again / "stages").mkdir(exist_ok=True)
    changed = "precision=bf16"
    with pytest.raises(UserError, match=r"base_precision 'int8' -> None .*another rounding of the frozen base"):
        trainer.train(configured(folder, kind, again.name, changed, WHOLE), resume=True)
    trainer.train(configured(folder, kind, again.name, changed), resume=True)
    assert [row["loss"] for row in metrics(again)] == [row["loss"] for row in metrics(runs[kind].run)]
    ours, theirs = (load_file(run / "final" / DIFFUSERS_FILE) for run in (again, runs[kind].run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_given_adapters_are_trained_further_on_either_base(runs, folder):
    given = runs["sd15"].run / "final"
    still = "stages=[{name: sp, objective: mse, steps: 1, learning_rate: 1e-9}]"
    before = load_file(given / DIFFUSERS_FILE)
    for name, lora, precision in (("whole", WHOLE, None), ("held", INT8, "int8")):
        trainer.train(configured(folder, "sd15", f"further_{name}", still, f"model.pretrained={given}", lora))
        after = load_file(folder / f"further_{name}" / "final" / DIFFUSERS_FILE)
        assert all((after[key] - tensor).abs().max() < 1e-6 for key, tensor in before.items())
        assert base_of(folder / f"further_{name}" / "final").precision == precision


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_that_is_counted(folder, kind):
    """On the meta device, of the folder's configurations: the base as it is held, once."""
    config, whole = (configured(folder, kind, "counted", "precision=bf16", lora) for lora in (INT8, WHOLE))
    model = skeleton_of(config)
    layers = [module for module in model.network.modules() if isinstance(module, Int8Linear)]
    ours, theirs = (needs(each, each.stages[0], skeleton_of(each)).held for each in (config, whole))
    saved = sum(layer.codes.numel() - layer.scale.nbytes // 2 for layer in layers)  # float32 before it is cast
    assert theirs.pop("weights") - ours.pop("weights") == saved > 0
    assert ours == theirs


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, tmp_path):
    config = ROOT / "configs" / "quickstart.yaml"
    whole, killed = (overrides(folder, "sd15", name, "checkpoint.every=1") for name in ("unharmed", "killed"))
    trainer.train(load_config(config, whole))
    process = start(tmp_path / "said", "train", "--config", config, *killed)
    process.until(lambda: logged_steps(folder / "killed") >= 4)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    trainer.train(load_config(config, killed), resume=True)
    assert [row["loss"] for row in metrics(folder / "killed")] == [row["loss"] for row in metrics(folder / "unharmed")]
    ours, theirs = (load_file(folder / name / "final" / DIFFUSERS_FILE) for name in ("killed", "unharmed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_as_one(folder, kind, tmp_path):
    jobs = [job(tmp_path / name, *overrides(folder, kind, name)[len(OVERRIDES) + 1 :]) for name in ("one", "two")]
    launch(1, tmp_path, jobs[0])
    launch(2, tmp_path, jobs[1])
    one, two = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "final" / DIFFUSERS_FILE) for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    seen = [json.loads(Path(f"{tmp_path / 'two'}.seen.{rank}").read_text()) for rank in (0, 1)]
    assert {**seen[0], **seen[1]} == json.loads(Path(f"{tmp_path / 'one'}.seen.0").read_text())

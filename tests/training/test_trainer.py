"""What the trainer asks and says around its steps."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import tiny_unet

from fastsp.config import load_config
from fastsp.training.trainer import Trainer, train

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


class Asked(Exception):  # noqa: N818
    """The question has been asked; the rest of the run is of no interest."""


def test_the_kept_attention_kernel_is_for_what_it_was_measured_on(monkeypatch, tmp_path):
    """Another precision, batch or resolution, or a kernel that is not installed any more, is another question."""
    asked = []

    def ask(file, question, make):
        asked.append(question)
        raise Asked

    monkeypatch.setattr("fastsp.training.attention_choice.kept_choice", ask)
    overrides = [[], [], ["precision=bf16"], ["data.microbatch=8"], ["data.batch_size=64"], ["data.resolution=16"]]
    for number, changes in enumerate(overrides):
        with pytest.raises(Asked):
            train(load_config(QUICKSTART, [f"run_dir={tmp_path / str(number)}", *changes]), console=Console(quiet=True))
    monkeypatch.setattr("fastsp.training.attention_choice.available", lambda device: ("sdpa",))
    with pytest.raises(Asked):
        train(load_config(QUICKSTART, [f"run_dir={tmp_path / 'without'}"]), console=Console(quiet=True))
    assert asked[0] == asked[1]
    assert all(question not in asked[:place] for place, question in enumerate(asked) if place > 1)


@pytest.mark.parametrize(("compiles", "first"), [(True, True), (True, False), (False, True)])
def test_a_first_step_says_what_takes_long(monkeypatch, tmp_path, compiles, first):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = load_config(QUICKSTART, [f"compile={str(compiles).lower()}"])
    console = Console(file=StringIO(), width=500)
    facts = {"config": config, "device": torch.device("cpu"), "console": console, "shapes": [(8, 8)]}
    trainer = SimpleNamespace(**facts, model=SimpleNamespace(network=tiny_unet()))
    step = SimpleNamespace(traces=True)
    with Trainer._preparing(trainer, int(first), step):
        so_far = console.file.getvalue()
    said = console.file.getvalue()
    if compiles and first:
        assert so_far == f"compiling UNet and perceptual network (default); kept in {tmp_path}\n"
        assert said.removeprefix(so_far) == "compiled; the first step took 0.0 s\n"
        trainer.shapes = [(8, 8), (4, 16), (16, 4)]
        with Trainer._preparing(trainer, 2, step):
            pass
        assert "perceptual network for 2 of 3 shapes (default)" in console.file.getvalue()
    elif first:
        assert so_far == said == "tracing the perceptual network: the first step takes longer than the others\n"
        with Trainer._preparing(trainer, int(first), SimpleNamespace(traces=False)):
            assert console.file.getvalue() == said
    else:
        assert said == ""


def test_the_first_line_comes_before_torch_is_imported(tmp_path):
    """Which takes ten seconds. Here the import fails, and the line has been printed."""
    overrides = [f"run_dir={tmp_path / 'run'}", "evaluation.enabled=false"]
    program = (
        "import sys; sys.modules['torch'] = None; from fastsp.__main__ import main; "
        f"sys.argv = ['fastsp', 'train', '--config', {str(QUICKSTART)!r}, *{overrides!r}]; main()"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert said.stdout == f"run {tmp_path / 'run'}: loading PyTorch, the model and the data\n", said.stderr


def test_a_stage_is_looked_up_before_a_model_of_its_name(tmp_path):
    """New configurations with such names are refused; a run that began with one goes on with what it trained."""
    tiny_unet(seed=1).save_pretrained(tmp_path / "sd21")
    config = SimpleNamespace(stages=[SimpleNamespace(name="sd21")], model=SimpleNamespace(pretrained="sd21", lora=None))
    run = SimpleNamespace(stage_folder=lambda name: tmp_path / name)
    trainer = SimpleNamespace(config=config, run=run, model=SimpleNamespace(network=tiny_unet(seed=2)))
    found = Trainer._initial_network(trainer, "sd21")
    assert torch.equal(found.conv_in.weight, tiny_unet(seed=1).conv_in.weight)
    assert not torch.equal(found.conv_in.weight, tiny_unet(seed=2).conv_in.weight)

"""A run goes on with the data that it began with: what is gone is named, and nothing is reordered."""

from __future__ import annotations

import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from data.helpers import encode, photo, write_tar
from rich.console import Console
from training.processes import ROOT, Run, logged_steps, start

from fastsp.config import load_config
from fastsp.data.inventory import Inventory, Part
from fastsp.data.readers.folder import FolderReader
from fastsp.data.readers.shards import ShardReader
from fastsp.errors import UserError
from fastsp.training.distributed import Ranks, check_same_data
from fastsp.training.status import run_status
from fastsp.training.trainer import train as run_stages

SHARDS, PER_SHARD, STEPS = 4, 25, 20


def members(shard: int) -> list[tuple[str, bytes]]:
    keys = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
    image = {key: encode(photo(key, 16, 16, 1)) for key in keys}
    return [(f"{key:03d}.{end}", image[key] if end == "jpg" else b"seven") for key in keys for end in ("jpg", "txt")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    for shard in range(SHARDS):
        write_tar(tmp_path / "data" / f"{shard}.tar", members(shard))
    return tmp_path


def train(folder: Path, name: str, *more: str, source: str = "shards") -> Run:
    overrides = [
        f"run_dir={folder / name}",
        f"data={{source: {source}, path: {folder / 'data'}, batch_size: 10, resolution: 16, max_bad_fraction: 0.5}}",
        f"stages=[{{name: mse, objective: mse, steps: {STEPS}, learning_rate: 1e-3}}]",
        "final=mse",
        "log.every=1",
        "checkpoint.every=5",
        "samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}",
        "evaluation.enabled=false",
    ]
    config = ROOT / "configs" / "quickstart.yaml"
    return start(folder / f"{name}.out", "train", "--config", config, *overrides, *more)


def stop(folder: Path, name: str, source: str = "shards") -> None:
    run = train(folder, name, source=source)
    run.until(lambda: logged_steps(folder / name) >= 3)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.output()


def test_after_a_stop_for_bad_data_the_bad_file_is_removed_and_the_run_starts(folder):
    """Before the first checkpoint nothing depends on the data; what the stopped attempt met does not count any more."""
    for name, content in members(0):
        (folder / "data" / name).write_bytes(content)
    bad = folder / "data" / "004.jpg"
    bad.write_bytes(bad.read_bytes()[:40])
    run = train(folder, "run", "data.max_bad_fraction=0.0", source="images")
    assert run.wait() == 2 and "004.jpg" in run.output(), run.output()
    status = run_status(folder / "run")
    assert status.bad_samples == 1 and status.step == 0, "though no step was logged"
    assert "report.html" not in status.next and not (folder / "run" / "report.html").exists()
    bad.unlink()
    run = train(folder, "run", "data.max_bad_fraction=0.0", "--resume", source="images")
    assert run.wait() == 0 and "changed: the data (25 samples before, 24 now, 004.jpg is missing)" in run.output()
    status = run_status(folder / "run")
    assert status.finished and status.bad_samples == 0 and f"look at {folder / 'run' / 'report.html'}" in status.next
    page = (folder / "run" / "report.html").read_text()
    assert "The evaluation is off" in page and "Predicted images over sampling steps" in page
    assert (folder / "run" / "environment.json").is_file() and "There is no environment.json" not in page


def test_a_shard_that_is_gone_is_refused_by_its_name(folder):
    stop(folder, "run")
    (folder / "data" / "0.tar").unlink()
    run = train(folder, "run", "--resume")
    assert run.wait() == 2, run.output()
    message = "began with other data: 100 samples before, 75 now, 0.tar is missing; samples would come again or be left"
    assert message in run.output() and "--allow-changes" in run.output() and "Traceback" not in run.output()
    run = train(folder, "run", "--resume", "--allow-changes")
    assert run.wait() == 0, run.output()
    assert "changed: the data (100 samples before, 75 now, 0.tar is missing)" in run.output()
    assert train(folder, "run", "--resume").wait() == 0, "the new data are now the run's"


def test_a_folder_that_lost_or_got_an_image_is_refused_by_its_name(folder):
    for name, content in members(0):
        (folder / "data" / name).write_bytes(content)
    stop(folder, "run", "images")
    (folder / "data" / "003.jpg").rename(folder / "003.jpg")
    run = train(folder, "run", "--resume", source="images")
    assert run.wait() == 2 and "25 samples before, 24 now, 003.jpg is missing" in run.output()
    (folder / "003.jpg").rename(folder / "data" / "003.jpg")
    (folder / "data" / "new.jpg").write_bytes(b"")
    run = train(folder, "run", "--resume", source="images")
    assert run.wait() == 2 and "25 samples before, 26 now, new.jpg is new" in run.output()
    (folder / "run" / "data.json").unlink()  # as of a run that began before it was kept
    assert train(folder, "run", "--resume", source="images").wait() == 0


def test_an_inventory_is_kept_as_it_is(folder):
    write_tar(folder / "data" / "caf\udce9.tar", [("caf\udce9.jpg", b"x")])
    for inventory in (ShardReader(folder / "data").inventory(), Inventory((Part("", 0, ""),), names=("a", "b"))):
        inventory.save(folder / "data.json")
        assert Inventory.load(folder / "data.json") == inventory
    (folder / "data.json").write_text('{"parts": 3}')
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        Inventory.load(folder / "data.json")


def test_differences_of_shards(folder):
    before = ShardReader(folder / "data").inventory()
    assert before.samples == 100 and before.difference(before) is None
    back = ShardReader([folder / "data" / f"{shard}.tar" for shard in (1, 0, 2, 3)]).inventory()
    assert before.difference(back) == "100 samples before, 100 now, in another order"
    write_tar(folder / "data" / "1.tar", members(1)[2:])
    fewer = ShardReader(folder / "data").inventory()
    assert before.difference(fewer) == "100 samples before, 99 now, 1.tar had 25 and has 24"
    write_tar(folder / "data" / "1.tar", [("x.jpg", b"x"), *members(1)[2:]])
    others = ShardReader(folder / "data").inventory()
    assert before.difference(others) == "100 samples before, 100 now, 1.tar has others of the same number"
    moved = (folder / "data").rename(folder / "moved")
    assert others.difference(ShardReader(moved).inventory()) is None, "the same data in another place"


def test_differences_of_large_folders_name_a_folder(folder, monkeypatch):
    monkeypatch.setattr("fastsp.data.readers.folder.MAX_NAMES", 10)
    for number in range(12):
        (folder / "pictures" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / f"{number % 2}" / f"{number}.jpg").touch()
    before = FolderReader(folder / "pictures").inventory()
    (folder / "pictures" / "1" / "3.jpg").rename(folder / "pictures" / "1" / "13.jpg")
    after = FolderReader(folder / "pictures").inventory()
    assert before.difference(after) == "12 samples before, 12 now, 1 has others of the same number"


@pytest.mark.parametrize(("names", "error"), [("ab", None), ("a", UserError), ("abc", UserError)])
def test_a_process_that_sees_other_data_than_the_first_is_refused(names, error):
    main, mine = (Inventory(tuple(Part(f"{name}.tar", 5, name) for name in each)) for each in ("ab", names))

    class Told(Ranks):
        def __init__(self, told: int) -> None:
            super().__init__(rank=1, world_size=2)
            object.__setattr__(self, "told", told)

        def broadcast(self, value):
            return main

        def exchange(self, values):
            return torch.tensor([[self.told], [int(value) for value in values]])

    if error is None:
        check_same_data(mine, Told(0))
        with pytest.raises(SystemExit):
            check_same_data(mine, Told(1))
    else:
        with pytest.raises(error, match=r"other data than process 0: 10 samples before, (5|15) now, [bc]\.tar is"):
            check_same_data(mine, Told(0))


def test_a_batch_larger_than_the_data_is_told(tmp_path):
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "data={source: digits, resolution: 8, batch_size: 2000}",
        "stages=[{name: mse, objective: mse, steps: 1, learning_rate: 1e-3}]",
        "final=mse",
        "samples.every=0",
    ]
    console = Console(file=StringIO(), width=200)
    run_stages(load_config(ROOT / "configs" / "quickstart.yaml", overrides), console=console)
    assert "data.batch_size 2000: every sample occurs 1.5 times per step" in console.file.getvalue()


def test_what_is_bad_is_counted_and_what_may_surprise_is_told(tmp_path):
    for key in range(9):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{key}.jpg").write_bytes(encode(photo(key, 16, 16, 1)) if key else b"no picture")
        (tmp_path / "data" / f"{key}.txt").write_text("seven")
    for number in range(5):
        (tmp_path / "data" / "b").mkdir(exist_ok=True)
        (tmp_path / "data" / "b" / str(number)).symlink_to("..")
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"data={{source: images, path: {tmp_path / 'data'}, resolution: 8, batch_size: 9, max_bad_fraction: 0.5}}",
        "stages=[{name: mse, objective: mse, steps: 1, learning_rate: 1e-3}]",
        "final=mse",
        "samples.every=0",
    ]
    console = Console(file=StringIO(), width=200)
    run_stages(load_config(ROOT / "configs" / "quickstart.yaml", overrides), console=console)
    said = console.file.getvalue()
    assert f"note: {tmp_path}/data/b/0: a link to a folder that it lies in, not followed" in said
    assert said.count("note: ") == 4 and "note: 2 more about the data; `fastsp data check` has them all" in said
    assert "mse: step 1/1" in said and "samples/s  1 bad" in said

"""`fastsp doctor`: a line for everything, whatever is broken or absent, and never a traceback."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fastsp.cli.doctor import Finding, probe
from fastsp.config import CheckpointConfig
from fastsp.models.published import SD21

doctor = importlib.import_module("fastsp.cli.doctor")  # the package has the command under that name
ROOT = Path(__file__).resolve().parents[2]
GPU = {"name": "Example", "capability": [9, 0], "memory": 80 * doctor.GIB, "free": 79 * doctor.GIB}
BROKEN = {
    "torch": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "xformers": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "triton": "print('no JSON at all'); import sys; sys.exit(0)",
    "nvidia": "raise ValueError",
}


def run_doctor(
    tmp_path: Path, *arguments: str, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "fastsp", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": path},
        check=False,
    )


@pytest.fixture
def broken_machine(tmp_path: Path) -> Path:
    """Every library is there, and none of them can be imported."""
    for name, code in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    return tmp_path


def test_a_machine_where_everything_is_broken(broken_machine: Path) -> None:
    done = run_doctor(broken_machine, "--json")
    assert done.returncode == 1 and done.stderr == ""
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["PyTorch"]["status"] == "missing" and "libcudart.so.13" in findings["PyTorch"]["found"]
    assert findings["DALI"]["status"] == findings["nvImageCodec"]["status"] == "missing"
    assert findings["Triton"]["status"] == "note"
    assert all(finding["advice"] for finding in findings.values() if finding["status"] != "ok")
    text = run_doctor(broken_machine)
    assert text.returncode == 1 and "Traceback" not in text.stdout + text.stderr
    assert "no run works here without: PyTorch, DALI, nvImageCodec" in text.stdout


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    """The tests run here, so a run would."""
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("a run works here\n") and done.stderr == ""


def test_probes() -> None:
    assert probe("print('noise'); print('{\"version\": \"1\"}')") == {"version": "1"}
    assert probe("import time; time.sleep(60)", seconds=0.5) == {"problem": "no answer within 0 s"}
    assert probe("pass") == {"problem": "gave no answer"}
    assert probe("import os; os.abort()") == {"problem": "crashed with signal 6"}
    assert probe("import sys; sys.exit(3)") == {"problem": "failed without a message"}
    assert probe("raise ValueError('x' * 500)")["problem"].endswith("...")


def test_gpus() -> None:
    def gpu(**changes: object) -> Finding:
        return doctor._gpus({"torch": {"devices": [{**GPU, **changes}]}})[0]

    assert gpu() == Finding("GPU 0", "ok", "Example, capability 9.0, 80 GiB, 79 GiB free")
    assert "precision: fp32" in gpu(capability=[7, 5]).advice
    assert "another process" in gpu(free=doctor.GIB).advice
    assert doctor._gpus({"torch": {"problem": "no torch"}})[0].status == "note"


def test_capabilities_are_compared_as_numbers() -> None:
    assert doctor._gpu("GPU 0", {**GPU, "capability": [10, 0]}).status == "ok"


def test_a_driver_without_a_gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert "PyTorch is built for the CPU" in doctor._gpus({"torch": {"cuda": None}})[0].advice
    assert "driver is too old" in doctor._gpus({"torch": {"cuda": "13.0"}})[0].advice


def test_an_exception_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("a device that\nnobody has")

    monkeypatch.setattr("shutil.disk_usage", fails)
    monkeypatch.setattr(doctor, "probe", lambda code: {"problem": "not asked"})
    (disk,) = (finding for finding in doctor.examine() if finding.name == "disk")
    assert disk == Finding("disk", "note", "could not be examined (OSError: a device that nobody has)")


def test_the_compile_cache_is_the_one_that_a_run_would_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def finding(folder: Path) -> Finding:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        return doctor._compile_cache({})[0]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    assert finding(tmp_path / "new" / "code") == Finding("compile cache", "ok", str(tmp_path / "new" / "code"))
    assert not (tmp_path / "new").exists()
    assert finding(tmp_path / "file" / "code").found == str(tmp_path / "cache" / "inductor"), "the run's next choice"
    temporary = finding(tmp_path / "temporary" / "code")
    assert temporary.status == "note" and "FASTSP_CACHE" in temporary.advice


@pytest.mark.slow
def test_a_user_without_a_home_is_told_where_compiled_code_goes(tmp_path: Path) -> None:
    """As in a container whose user has no entry in /etc/passwd."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef no_entry(uid):\n    raise KeyError(uid)\npwd.getpwuid = no_entry\n"
    )
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "FASTSP_CACHE", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = run_doctor(tmp_path, "--json", environment=environment)
    (cache,) = (finding for finding in json.loads(done.stdout) if finding["name"] == "compile cache")
    assert cache["status"] == "note" and "FASTSP_CACHE" in cache["advice"]


def test_the_command_that_installs_xformers_is_named() -> None:
    problem = {"problem": "No module named 'xformers'"}
    (without,) = doctor._xformers({"torch": {"devices": [GPU]}, "xformers": problem})
    assert without.status == "note" and "[train,xformers]'" in without.advice
    (there,) = doctor._xformers({"torch": {"devices": [GPU]}, "xformers": {"version": "0.0.35"}})
    assert there.status == "ok"
    assert doctor._xformers({"torch": {"devices": []}, "xformers": problem}) == [], "it has no CPU operators"


def test_the_floor_is_what_a_run_of_stable_diffusion_takes() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD21["unet"])
    sizes = [4 * p.numel() for p in unet.parameters()]
    keep, copies = CheckpointConfig().keep, 4  # weights, average, two moments
    checkpoints = (keep + 1) * copies * sum(sizes)
    assert checkpoints + 4 * 5.2e9 < doctor.DISK_FOR_A_RUN, "three stages and final/"

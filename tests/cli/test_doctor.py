"""`fastsp doctor`: a line for everything, whatever is broken or absent, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsp import doctor
from fastsp.doctor import Finding, probe

ROOT = Path(__file__).resolve().parents[2]
GPU = {"name": "Example", "capability": "9.0", "memory": 80 * doctor.GIB, "free": 79 * doctor.GIB}
BROKEN = {
    "torch": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "diffusers": "raise RuntimeError('operator torchvision::nms\\n does not exist')",
    "xformers": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "triton": "print('no JSON at all'); import sys; sys.exit(0)",
    "nvidia": "raise ValueError",
    "huggingface_hub": "import sys; sys.exit('\\n')",
}


def run_doctor(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "fastsp", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
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
    assert "does not exist" in findings["models"]["found"] and "torchvision" in findings["models"]["advice"]
    assert findings["DALI"]["status"] == findings["nvImageCodec"]["status"] == "missing"
    assert findings["Triton"]["status"] == "note"
    assert all(finding["advice"] for finding in findings.values() if finding["status"] != "ok")
    text = run_doctor(broken_machine)
    assert text.returncode == 1 and "Traceback" not in text.stdout + text.stderr
    assert "no run works here without: PyTorch, models, DALI, nvImageCodec" in text.stdout


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    """The tests run here, so a run would."""
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("a run works here\n") and done.stderr == ""
    assert "HF_HUB_OFFLINE" in done.stdout


def test_probes() -> None:
    assert probe("print('noise'); print('{\"version\": \"1\"}')") == {"version": "1"}
    assert probe("import time; time.sleep(60)", seconds=0.5) == {"problem": "no answer within 0 s"}
    assert probe("pass") == {"problem": "gave no answer"}
    assert probe("import os; os.abort()") == {"problem": "crashed with signal 6"}
    assert probe("import sys; sys.exit(3)") == {"problem": "it failed without a word"}
    assert probe("raise ValueError('x' * 500)")["problem"].endswith("...")


def test_gpus() -> None:
    def gpu(**changes: object) -> Finding:
        return doctor._gpus({"devices": [{**GPU, **changes}]})[0]

    assert gpu() == Finding("GPU 0", "ok", "Example, capability 9.0, 80 GiB, 79 GiB of it free")
    assert "precision: fp32" in gpu(capability="7.5").advice
    assert "another process" in gpu(free=doctor.GIB).advice
    assert doctor._gpus({"problem": "no torch"})[0].status == "note"


def test_a_driver_without_a_gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert "PyTorch is built for the CPU" in doctor._gpus({"cuda": None})[0].advice
    assert "driver is too old" in doctor._gpus({"cuda": "13.0"})[0].advice


def test_an_exception_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Finding:
        raise OSError("a device that\nnobody has")

    monkeypatch.setattr(doctor, "_disk", fails)
    monkeypatch.setattr(doctor, "probe", lambda code: {"problem": "not asked"})
    (disk,) = (finding for finding in doctor.examine() if finding.name == "disk")
    assert disk == Finding("disk", "note", "could not be examined (OSError: a device that nobody has)")


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert doctor._compile_cache().status == "note" and "cannot be written" in doctor._compile_cache().found
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert doctor._compile_cache().status == "ok" and not (tmp_path / "new").exists()

"""What is installed: the right packages, and no top-level `kernels` in the way of Hugging Face's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_hugging_faces_kernels_stay_importable_from_the_root():
    """transformers and diffusers import `kernels` unguarded where it is installed; ours must not shadow it."""
    code = "import sys; sys.path.insert(0, ''); import kernels, transformers, diffusers; print(kernels.__file__)"
    location = Path(run(code))
    assert "site-packages" in location.parts and ROOT / "kernels" not in location.parents
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_light_import_needs_no_training_extras():
    """`from fastsp.loss import SelfPerceptualLoss` works with torch, diffusers and safetensors alone."""
    blocked = ("nvidia.dali", "pydantic", "yaml", "typer", "rich", "sklearn", "transformers", "tensorboard", "PIL")
    code = f"""
import sys
before = set(sys.modules)
import diffusers.models.unets.unet_2d_condition, diffusers.schedulers.scheduling_ddim
theirs = set(sys.modules)
from fastsp.loss import SelfPerceptualLoss
ours = {{name for name in set(sys.modules) - theirs}}
print([name for name in ours if name.startswith({blocked!r})])
"""
    assert run(code) == "[]"


@pytest.mark.slow
def test_wheel_holds_our_packages_alone(tmp_path):
    source = tmp_path / "source"  # a copy, for building leaves a folder behind
    for package in ("fastsp", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"fastsp", "fastsp_kernels"}
    assert {"fastsp/loss.py", "fastsp/py.typed", "fastsp/cli/train.py", "fastsp_kernels/philox.py"} <= set(names)
    assert {"fastsp/evaluation/report.html.jinja", "fastsp/lora_readme.md"} <= set(names)

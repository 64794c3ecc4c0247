"""What is installed: the right packages, and no top-level `kernels` in the way of Hugging Face's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import diffusers
import pytest
from tiny import scheduler, tiny_unet
from tiny_transformers import tiny_transformer

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


def test_from_pretrained_needs_diffusers_alone(tmp_path):
    """Pipelines with a UNet and with a transformer, where the extra's packages are not there."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name, part, network, own in (
        ("unet", "unet", tiny_unet(), scheduler("epsilon")),
        ("sd3", "transformer", tiny_transformer("SD3Transformer2DModel"), flow),
    ):
        network.save_pretrained(tmp_path / name / part)
        own.save_pretrained(tmp_path / name / "scheduler")
    code = f"""
import sys
sys.modules |= dict.fromkeys(("transformers", "peft", "accelerate", "pydantic"))
from fastsp.loss import SelfPerceptualLoss
for name in ("unet", "sd3"):
    criterion = SelfPerceptualLoss.from_pretrained({str(tmp_path)!r} + "/" + name)
    print(criterion.perceptual_network.truncated.__class__.__name__, criterion.process.__class__.__name__)
"""
    assert run(code) == "UNet2DConditionModel VariancePreserving\nSD3Transformer2DModel RectifiedFlow"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the source, because building leaves a folder behind; its wheel; its editable wheel."""
    top = tmp_path_factory.mktemp("built")
    source = top / "source"
    for folder in ("fastsp", "kernels", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    code = f"from setuptools import build_meta as b; b.build_wheel({str(top)!r}); b.build_editable({str(top)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    editable, wheel = sorted(top.glob("*.whl"))
    return source, wheel, editable


def package_files(source: Path) -> set[str]:
    folders = (source / "fastsp", source / "kernels" / "fastsp_kernels")
    return {str(file.relative_to(folder.parent)) for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_wheel_holds_every_file_of_our_packages_and_nothing_else(built):
    source, wheel, _ = built
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files(source)


def test_editable_install_finds_both_packages_and_nothing_else(built, tmp_path):
    source, _, editable = built
    zipfile.ZipFile(editable).extractall(tmp_path)
    code = f"""
import importlib.util, site
site.addsitedir({str(tmp_path)!r})
for name in ("fastsp", "fastsp_kernels", "kernels", "tests", "benchmarks"):
    spec = importlib.util.find_spec(name)
    print(spec and spec.origin)
"""
    command = [sys.executable, "-I", "-S", "-c", code]  # without the environment's own installation of fastsp
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    initial = [str(source / "fastsp" / "__init__.py"), str(source / "kernels" / "fastsp_kernels" / "__init__.py")]
    assert result.stdout.split() == [*initial, "None", "None", "None"]

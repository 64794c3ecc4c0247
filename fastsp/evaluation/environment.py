"""What a run was made with: versions of what matters for its figures, and the machine."""

import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastsp.utils.files import write_file
from fastsp.utils.versions import installed_version

_PACKAGES = ("fastsp", "torch", "diffusers", "transformers", "scikit-learn", "nvidia-dali-cuda130", "triton")


def environment() -> dict[str, str]:
    """Name -> version or description, of this process."""
    facts = {"python": platform.python_version(), "commit": _commit()}
    facts |= {package: installed_version(package) for package in _PACKAGES}
    facts |= {"device": f"CPU, {os.cpu_count()} cores", "platform": platform.platform(terse=True)}
    if torch.cuda.is_available():
        facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        facts["device"] = torch.cuda.get_device_name()
        facts["device_memory_gb"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f}"
    return facts


def _commit() -> str:
    """Of the checkout that this file lies in; ``FASTSP_COMMIT`` where the files have come without their history."""
    checkout, commit = Path(__file__).parents[2], os.environ.get("FASTSP_COMMIT", "")
    if not commit and (checkout / ".git").exists():  # an installed package may lie inside somebody else's checkout
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return commit or "unknown"


def write_environment(run_dir: Path) -> None:
    """Write `environment.json` into `run_dir`, unless the run began elsewhere and has one."""
    if not (path := run_dir / "environment.json").exists():
        write_file(path, json.dumps(environment(), indent=2) + "\n")

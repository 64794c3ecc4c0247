"""What of this machine a run will use, and what is missing: for `fastsp doctor`.

Every library is examined in a process of its own, so that one that crashes on import, or hangs, becomes a line like any
other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsp.errors import UserError, install_command
from fastsp.utils.cache import can_be_written, compiled_code_folder

GIB = 2**30
PROBE_SECONDS = 90.0

# What a run of Stable Diffusion 2.1 (866 M parameters) takes. A checkpoint, 14 GB, holds float32 weights, their average
# and two moments. On disk lie `checkpoint.keep` (3) of them, one more while it is written, and four pipelines of 5 GB.
# In memory: the pinned copy of a checkpoint, whose tensors are rounded up to powers of two (15.8 GiB), a file of 2 GiB
# that is being written, and the process.
DISK_FOR_A_RUN = 80 * GIB
MEMORY_FOR_A_RUN = 24 * GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was examined.
        status: "ok"; "note": a run works without it, less well; "missing": no run works.
        found: what is there.
        advice: what to do about it; empty if there is nothing to do.
    """

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    advice: str = ""


_VERSION = "import json, {0} as m\n{1}\nprint(json.dumps({{'version': getattr(m, '__version__', 'version unknown')}}))"
PROBES = {
    "torch": """
import json, torch
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p, free = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0]
    devices.append({"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory, "free": free})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}))
""",
    "triton": _VERSION.format("triton", ""),
    "dali": _VERSION.format("nvidia.dali", "from nvidia.dali import fn, pipeline_def"),
    "nvimgcodec": _VERSION.format(
        "nvidia.nvimgcodec",
        "m.Decoder(device_id=m.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1,"
        " backends=[m.Backend(m.BackendKind.CPU_ONLY)])",
    ),
    "xformers": _VERSION.format("xformers", "import xformers.ops"),
}
Answer = dict[str, Any]  # of a probe; {"problem": reason} if it failed


def examine() -> list[Finding]:
    """Examine everything. Raises nothing."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        answers = dict(zip(PROBES, pool.map(probe, PROBES.values()), strict=True))
    findings: list[Finding] = []
    for check in (_torch, _gpus, _xformers, _triton, _decoders, _compile_cache, _disk, _memory):
        try:
            findings += check(answers)
        except Exception as error:  # a machine that nobody thought of
            problem = f"could not be examined ({type(error).__name__}: {_short(error)})"
            findings.append(Finding(check.__name__.strip("_"), "note", problem))
    return findings


def probe(code: str, seconds: float = PROBE_SECONDS) -> Answer:
    """Run Python code in a process of its own. Returns the JSON on the last line it prints, or why there is none."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {seconds:.0f} s"}
    except OSError as error:
        return {"problem": _short(error)}
    if done.returncode < 0:
        return {"problem": f"crashed with signal {-done.returncode}"}
    if done.returncode:
        return {"problem": _short((done.stderr.strip().splitlines() or ["failed without a message"])[-1])}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": "gave no answer"}


def _torch(answers: dict[str, Answer]) -> list[Finding]:
    torch = answers["torch"]
    if "problem" in torch:
        return [Finding("PyTorch", "missing", torch["problem"], "install it from pytorch.org, 2.11 or newer")]
    found = f"{torch['version']}, built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'the CPU'}"
    if [int(part) for part in torch["version"].split("+")[0].split(".")[:2]] < [2, 11]:
        return [Finding("PyTorch", "missing", found, "fastsp needs 2.11 or newer")]
    return [Finding("PyTorch", "ok", found)]


def _gpus(answers: dict[str, Answer]) -> list[Finding]:
    if devices := answers["torch"].get("devices"):
        return [_gpu(f"GPU {index}", device) for index, device in enumerate(devices)]
    advice = "Stable Diffusion needs an NVIDIA GPU, of 24 GiB or more for a full finetuning"
    if shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists():
        advice = "the driver is too old for this PyTorch, or the GPU is hidden (CUDA_VISIBLE_DEVICES)"
        if not answers["torch"].get("cuda"):
            advice = "a driver is there, but PyTorch is built for the CPU: install a CUDA build from pytorch.org"
    return [Finding("GPU", "note", "none: runs use the CPU, which is enough for the digits", advice)]


def _gpu(name: str, device: Answer) -> Finding:
    major, minor = device["capability"]
    memory, free = device["memory"] / GIB, device["free"] / GIB
    found = f"{device['name']}, capability {major}.{minor}, {memory:.0f} GiB, {free:.0f} GiB free"
    if major < 8:
        return Finding(name, "note", found, "it has no bfloat16: use precision: fp32")
    if free < 0.8 * memory:
        return Finding(name, "note", found, "another process holds its memory: see nvidia-smi")
    return Finding(name, "ok", found)


def _xformers(answers: dict[str, Answer]) -> list[Finding]:
    """An attention kernel more. Its wheels have no CPU operators."""
    if not answers["torch"].get("devices"):
        return []
    if problem := answers["xformers"].get("problem"):
        advice = f"optional, one more attention kernel: {install_command('train,xformers')}"
        return [Finding("xformers", "note", problem, advice)]
    return [Finding("xformers", "ok", answers["xformers"]["version"])]


def _triton(answers: dict[str, Answer]) -> list[Finding]:
    triton = answers["triton"]
    if "problem" in triton:
        advice = "kernels fall back to PyTorch: pip install triton (Linux)"
        return [Finding("Triton", "note", triton["problem"], advice)]
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        advice = "torch.compile and Triton need one: apt install gcc, or set compile: false"
        return [Finding("Triton", "note", f"{triton['version']}, but no C compiler", advice)]
    return [Finding("Triton", "ok", f"{triton['version']}, C compiler {compiler}")]


def _decoders(answers: dict[str, Answer]) -> list[Finding]:
    advice = "it decodes pictures: pip install nvidia-dali-cuda130 (or -cuda120, for an older driver); Linux only"
    pairs = (("DALI", answers["dali"]), ("nvImageCodec", answers["nvimgcodec"]))
    return [
        Finding(name, "missing", answer["problem"], advice)
        if "problem" in answer
        else Finding(name, "ok", answer["version"])
        for name, answer in pairs
    ]


def _compile_cache(_answers: dict[str, Answer]) -> list[Finding]:
    """The folder that a run would use, by the run's own rule."""
    name, advice = "compile cache", "to keep compiled code, set FASTSP_CACHE to a folder that can be written"
    try:
        folder = compiled_code_folder(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
    except UserError as error:
        return [Finding(name, "note", str(error), "torch.compile will fail: or set compile: false")]
    if folder.is_relative_to(tempfile.gettempdir()):
        return [Finding(name, "note", f"{folder}, temporary", advice)]
    return [Finding(name, "ok", str(folder))]


def _disk(_answers: dict[str, Answer]) -> list[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / GIB:.0f} GiB free in {here}"
    if not can_be_written(here):
        return [
            Finding("disk", "missing", f"{here} cannot be written", "change into a folder of yours, or set run_dir")
        ]
    if free < DISK_FOR_A_RUN:
        advice = f"a run of Stable Diffusion 2.1 takes {DISK_FOR_A_RUN // GIB} GiB, less with checkpoint.keep: 1"
        return [Finding("disk", "note", found, f"{advice}; SDXL three times as much; digits, a few MB")]
    return [Finding("disk", "ok", found)]


def _memory(_answers: dict[str, Answer]) -> list[Finding]:
    available = _available_memory()
    found = f"{available / GIB:.1f} GiB available"
    if available < MEMORY_FOR_A_RUN:
        advice = f"a run of Stable Diffusion 2.1 takes {MEMORY_FOR_A_RUN // GIB} GiB, most of it pinned for checkpoints"
        return [Finding("memory", "note", found, f"{advice}; SDXL, 56; digits, 2")]
    return [Finding("memory", "ok", found)]


def _available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what its container leaves."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)


def _short(problem: object) -> str:
    """One line of a message, not too long."""
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else text[:197] + "..."

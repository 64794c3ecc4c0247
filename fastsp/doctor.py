"""What of this machine a run will use, and what is missing: for `fastsp doctor`.

Whatever is heavy or may be broken is looked at in a process of its own, so that a library that crashes on import, or
hangs, becomes a line like any other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fastsp.data.cache import cache_folder

Status = Literal["ok", "note", "missing"]
GIB = 2**30
PROBE_SECONDS = 90.0

# Of Stable Diffusion 2.1: float32 weights, EMA and two moments of 866 M parameters, three checkpoints and final/.
ROOM_FOR_A_RUN = 60 * GIB
MEMORY_FOR_A_RUN = 16 * GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: "ok"; "note": a run works without it, less well; "missing": no run works.
        found: what is there.
        advice: what to do about it; empty where nothing has to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
backends = torch.backends.cuda
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "available": cuda,
    "attention": {
        "flash": cuda and backends.is_flash_attention_available(),
        "cudnn": cuda and backends.cudnn_sdp_enabled() and torch.backends.cudnn.is_available(),
        "efficient": cuda and backends.mem_efficient_sdp_enabled(),
        "math": True,
    },
    "devices": [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory,
         "free": torch.cuda.mem_get_info(i)[0]}
        for i in range(torch.cuda.device_count() if cuda else 0) for p in [torch.cuda.get_device_properties(i)]
    ],
}))
"""
_MODELS = """
import json, diffusers, transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
print(json.dumps({"version": f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"}))
"""
_HUB = """
import json, os, urllib.request
from huggingface_hub import constants
if constants.HF_HUB_OFFLINE:
    state = "offline by HF_HUB_OFFLINE"
else:
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
        state = "reachable"
    except Exception as error:
        state = f"not reachable ({type(error).__name__})"
models = [n for n in os.listdir(constants.HF_HUB_CACHE) if n.startswith("models--")] \
    if os.path.isdir(constants.HF_HUB_CACHE) else []
print(json.dumps({"state": state, "endpoint": constants.ENDPOINT, "cache": constants.HF_HUB_CACHE,
                  "models": len(models)}))
"""


_DECODER = """
from nvidia import nvimgcodec as n
n.Decoder(device_id=n.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[n.Backend(n.BackendKind.CPU_ONLY)])
"""


def _version_probe(module: str, also: str = "") -> str:
    return (
        f"import json, {module}\n{also}\n"
        f"print(json.dumps({{'version': getattr({module}, '__version__', 'of unknown version')}}))"
    )


PROBES = {
    "torch": _TORCH,
    "models": _MODELS,
    "triton": _version_probe("triton"),
    "dali": _version_probe("nvidia.dali", "from nvidia.dali import fn, pipeline_def"),
    "nvimgcodec": _version_probe("nvidia.nvimgcodec", _DECODER),
    "xformers": _version_probe("xformers", "import xformers.ops"),
    "hub": _HUB,
}
Answer = dict[str, Any]  # of a probe; {"problem": reason} where it failed


def examine() -> list[Finding]:
    """Look at everything. No exception gets out."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        answers = dict(zip(PROBES, pool.map(probe, PROBES.values()), strict=True))
    torch = answers["torch"]
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", lambda: [_python()]),
        ("packages", _packages),
        ("PyTorch", lambda: [_torch(torch)]),
        ("GPU", lambda: _gpus(torch)),
        ("attention", lambda: [_attention(torch, answers["xformers"])]),
        ("models", lambda: [_models(answers["models"])]),
        ("Triton", lambda: [_triton(answers["triton"])]),
        ("data", lambda: _data(answers["dali"], answers["nvimgcodec"])),
        ("compile cache", lambda: [_compile_cache()]),
        ("disk", lambda: [_disk()]),
        ("memory", lambda: [_memory()]),
        ("cores", lambda: [_cores()]),
        ("hub", lambda: [_hub(answers["hub"])]),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # a machine stranger than all that was thought of
            findings.append(Finding(name, "note", f"could not be examined ({type(error).__name__}: {_short(error)})"))
    return findings


def probe(code: str, seconds: float = PROBE_SECONDS) -> Answer:
    """Run Python code in a process of its own; the JSON on the last line that it prints, or why there is none."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
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
        return {"problem": _short((done.stderr.strip().splitlines() or ["it failed without a word"])[-1])}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": "gave no answer"}


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _packages() -> list[Finding]:
    """What `fastsp[train]` asks for, without importing it; PyTorch, DALI and Triton have lines of their own."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("fastsp") or []]
    except metadata.PackageNotFoundError:
        return [Finding("packages", "note", "fastsp runs from a folder, not installed", "pip install -e '.[train]'")]
    wrong = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        if requirement.name == "torch" or "dali" in requirement.name or requirement.name == "triton":
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return [Finding("packages", "missing", "; ".join(wrong), "pip install -U 'fastsp[train]'")]
    return [Finding("packages", "ok", f"fastsp {metadata.version('fastsp')} and all that fastsp[train] asks for")]


def _torch(torch: Answer) -> Finding:
    if "problem" in torch:
        return Finding("PyTorch", "missing", torch["problem"], "install it from pytorch.org, 2.11 or newer")
    build = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built for the CPU"
    found = f"{torch['version']}, {build}"
    numbers = [int(part) for part in torch["version"].split("+")[0].split(".")[:2]]
    if numbers < [2, 11]:
        return Finding("PyTorch", "missing", found, "fastsp needs 2.11 or newer")
    return Finding("PyTorch", "ok", found)


def _gpus(torch: Answer) -> list[Finding]:
    if devices := torch.get("devices"):
        return [_gpu(index, device) for index, device in enumerate(devices)]
    hardware = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    found = "none: the run takes the CPU, which is enough for the digits"
    if not hardware:
        return [Finding("GPU", "note", found, "Stable Diffusion wants an NVIDIA GPU of 24 GiB or more")]
    advice = "the driver is too old for this PyTorch, or the GPU is hidden (CUDA_VISIBLE_DEVICES)"
    if not torch.get("cuda"):
        advice = "there is a driver, but PyTorch is built for the CPU: install the build for your CUDA from pytorch.org"
    return [Finding("GPU", "note", found, advice)]


def _gpu(index: int, device: Answer) -> Finding:
    memory, free = device["memory"] / GIB, device["free"] / GIB
    found = f"{device['name']}, capability {device['capability']}, {memory:.0f} GiB, {free:.0f} GiB of it free"
    if float(device["capability"]) < 8.0:
        return Finding(f"GPU {index}", "note", found, "it has no bfloat16: use precision: fp32")
    if free < 0.8 * memory:
        return Finding(f"GPU {index}", "note", found, "another process holds its memory: see nvidia-smi")
    return Finding(f"GPU {index}", "ok", found)


def _attention(torch: Answer, xformers: Answer) -> Finding:
    backends = [name for name, there in torch.get("attention", {}).items() if there]
    found = f"PyTorch's {', '.join(backends) or 'none'}; xformers {xformers.get('version', 'is not there')}"
    if torch.get("available") and "problem" in xformers:
        return Finding(
            "attention", "note", found, "nothing has to be done; pip install xformers adds one to choose from"
        )
    return Finding("attention", "ok", found)


def _models(models: Answer) -> Finding:
    if "problem" in models:
        advice = "if a torchvision is named: it does not fit this PyTorch; remove it, fastsp needs none"
        return Finding("models", "missing", models["problem"], advice)
    return Finding("models", "ok", models["version"])


def _triton(triton: Answer) -> Finding:
    if "problem" in triton:
        return Finding("Triton", "note", triton["problem"], "kernels fall back to PyTorch: pip install triton (Linux)")
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        advice = "torch.compile and Triton need one: apt install gcc, or set compile: false"
        return Finding("Triton", "note", f"{triton['version']}, but no C compiler", advice)
    return Finding("Triton", "ok", f"{triton['version']}, C compiler {compiler}")


def _data(dali: Answer, nvimgcodec: Answer) -> list[Finding]:
    findings = []
    for name, answer in (("DALI", dali), ("nvImageCodec", nvimgcodec)):
        if "problem" in answer:
            advice = "it reads the data: pip install nvidia-dali-cuda130 (or -cuda120, by your driver); Linux alone"
            findings.append(Finding(name, "missing", answer["problem"], advice))
        else:
            findings.append(Finding(name, "ok", answer["version"]))
    return findings


def _compile_cache() -> Finding:
    """Where compiled code is kept: see `fastsp.training.compilation`, which is too heavy to import here."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_folder() / "inductor")
    if not _is_writable(Path(folder)):
        advice = "set FASTSP_CACHE or TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        return Finding("compile cache", "note", f"{folder} cannot be written", advice)
    return Finding("compile cache", "ok", folder)


def _disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / GIB:.0f} GiB free in {here}"
    if not _is_writable(here):
        return Finding("disk", "missing", f"{here} cannot be written", "change into a folder of yours, or set run_dir")
    if free < ROOM_FOR_A_RUN:
        advice = (
            f"a Stable Diffusion run wants {ROOM_FOR_A_RUN // GIB} GiB (checkpoint.keep: 1 takes less); digits, few MB"
        )
        return Finding("disk", "note", found, advice)
    return Finding("disk", "ok", found)


def _memory() -> Finding:
    available = _available_memory()
    found = f"{available / GIB:.1f} GiB available"
    if available < MEMORY_FOR_A_RUN:
        return Finding("memory", "note", found, f"Stable Diffusion wants {MEMORY_FOR_A_RUN // GIB} GiB; the digits 2")
    return Finding("memory", "ok", found)


def _available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what its container leaves it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)


def _cores() -> Finding:
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (parts := quota.read_text().split())[0].isdecimal():
        cores = min(cores, int(parts[0]) / int(parts[1]))
    if cores < 4:
        return Finding(
            "cores", "note", f"{cores:g}", "decoding images for a fast GPU wants 8 or more; or fastsp encode"
        )
    return Finding("cores", "ok", f"{cores:g}")


def _hub(hub: Answer) -> Finding:
    if "problem" in hub:
        return Finding("hub", "note", hub["problem"], "models have to be local folders")
    found = f"{hub['endpoint']} {hub['state']}; {hub['models']} models cached in {hub['cache']}"
    if hub["state"] != "reachable":
        return Finding("hub", "note", found, "model.pretrained takes local folders, and what the cache holds")
    return Finding("hub", "ok", found)


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``, or in the first folder above it that there is."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _short(problem: object) -> str:
    """One line of a message, not too long."""
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else text[:197] + "..."

"""`fastsp doctor`: what fastsp will use on this machine, and what is missing.

Each library is imported in a separate process, so that one that crashes or hangs is reported like any other problem.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import typer

from fastsp.errors import UserError, install_command

GIB = 2**30
PROBE_SECONDS = 90.0
# What a run of Stable Diffusion 2.1 (866 M parameters) takes: `checkpoint.keep` (3) checkpoints of 14 GB, which hold
# float32 weights, their average and two moments, one more while it is written, and four pipelines of 5 GB.
DISK_FOR_A_RUN = 80 * GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was examined and found, and what to do about it."""

    name: str
    status: Literal["ok", "note", "missing"]  # note: a run works without it, but less well; missing: no run works
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


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False) -> None:
    """Check PyTorch, GPUs, Triton, decoders, caches and disk, and say how to fix what is missing.

    The exit code is 0 if a run would work here, otherwise 1.

    Example: fastsp doctor
    """
    from rich.console import Console
    from rich.text import Text

    findings = examine()
    missing = ", ".join(finding.name for finding in findings if finding.status == "missing")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        raise typer.Exit(1 if missing else 0)
    console = Console()
    width = max(len(finding.name) for finding in findings)
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        status = (f"{finding.status:8}", colours[finding.status])
        console.print(Text.assemble(status, f"{finding.name:{width}}  ", finding.found), soft_wrap=True)
        if finding.advice:
            console.print(Text(f"{'':{8 + width}}  -> {finding.advice}", "dim"), soft_wrap=True)
    typer.echo(f"no run works here without: {missing}" if missing else "a run works here")
    raise typer.Exit(1 if missing else 0)


def examine() -> list[Finding]:
    """Examine everything. Raises nothing."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        answers = dict(zip(PROBES, pool.map(probe, PROBES.values()), strict=True))
    findings: list[Finding] = []
    for check in (_torch, _gpus, _xformers, _triton, _decoders, _compile_cache, _disk):
        try:
            findings += check(answers)
        except Exception as error:  # a machine that nobody thought of
            problem = shorten(f"could not be examined ({type(error).__name__}: {error})", 200)
            findings.append(Finding(check.__name__.strip("_"), "note", problem))
    return findings


def probe(code: str, seconds: float = PROBE_SECONDS) -> Answer:
    """Run Python code in a separate process. Returns the JSON on the last line that it prints, or why there is none."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {seconds:.0f} s"}
    if done.returncode < 0:
        return {"problem": f"crashed with signal {-done.returncode}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["failed without a message"])[-1]
        return {"problem": shorten(last, 200, placeholder="...")}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": "gave no answer"}


def _library(name: str, answer: Answer, without: Literal["note", "missing"], advice: str) -> Finding:
    """A library by its version, or ``without`` it by its problem and what to do."""
    if "problem" in answer:
        return Finding(name, without, answer["problem"], advice)
    return Finding(name, "ok", answer["version"])


def _torch(answers: dict[str, Answer]) -> list[Finding]:
    torch = answers["torch"]
    if "problem" in torch:
        return [Finding("PyTorch", "missing", torch["problem"], "install it from pytorch.org, 2.11 or newer")]
    built_for = f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU"
    return [Finding("PyTorch", "ok", f"{torch['version']}, built for {built_for}")]


def _gpus(answers: dict[str, Answer]) -> list[Finding]:
    if devices := answers["torch"].get("devices"):
        return [_gpu(f"GPU {index}", device) for index, device in enumerate(devices)]
    advice = "Stable Diffusion needs an NVIDIA GPU, of 24 GiB or more for a full finetuning"
    if shutil.which("nvidia-smi") is not None:
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
    advice = f"optional, one more attention kernel: {install_command('train,xformers')}"
    return [_library("xformers", answers["xformers"], "note", advice)]


def _triton(answers: dict[str, Answer]) -> list[Finding]:
    finding = _library("Triton", answers["triton"], "note", "kernels fall back to PyTorch: pip install triton (Linux)")
    if finding.status == "ok" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        advice = "torch.compile and Triton need one: apt install gcc, or set compile: false"
        return [Finding("Triton", "note", f"{finding.found}, but no C compiler", advice)]
    return [finding]


def _decoders(answers: dict[str, Answer]) -> list[Finding]:
    advice = "it decodes pictures: pip install nvidia-dali-cuda130 (or -cuda120, for an older driver); Linux only"
    pairs = (("DALI", answers["dali"]), ("nvImageCodec", answers["nvimgcodec"]))
    return [_library(name, answer, "missing", advice) for name, answer in pairs]


def _compile_cache(_answers: dict[str, Answer]) -> list[Finding]:
    """The folder that a run would use, by the run's own rule."""
    from fastsp.utils.cache import compiled_code_folder

    name, advice = "compile cache", "to keep compiled code, set FASTSP_CACHE to a folder that can be written"
    try:
        folder = compiled_code_folder(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
    except UserError as error:
        return [Finding(name, "note", str(error), "torch.compile will fail: or set compile: false")]
    if folder.is_relative_to(tempfile.gettempdir()):
        return [Finding(name, "note", f"{folder}, temporary", advice)]
    return [Finding(name, "ok", str(folder))]


def _disk(_answers: dict[str, Answer]) -> list[Finding]:
    from fastsp.utils.cache import can_be_written

    here, free = Path.cwd(), shutil.disk_usage(".").free
    if not can_be_written(here):
        return [Finding("disk", "missing", f"{here} cannot be written", "use a folder of yours, or set run_dir")]
    found = f"{free / GIB:.0f} GiB free in {here}"
    if free < DISK_FOR_A_RUN:
        advice = f"a run of Stable Diffusion 2.1 takes {DISK_FOR_A_RUN // GIB} GiB, less with checkpoint.keep: 1"
        return [Finding("disk", "note", found, f"{advice}; SDXL three times as much; digits, a few MB")]
    return [Finding("disk", "ok", found)]

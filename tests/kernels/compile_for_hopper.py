"""Compile every kernel, in every shape it may be tuned to, for an H100 or H200 on any machine. Prints a JSON object for
each: what came out.

Run as a script with TRITON_INTERPRET=0, with names of ops to compile those alone. The ops are called on CPU tensors,
but each launch is recorded and compiled instead of run; Triton brings the assembler.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from fastsp_kernels import adamw_ema, diffuse, random_normals, random_words, reproject
from fastsp_kernels._triton import LAUNCH_OPTIONS
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import mangle_type

HOPPER = GPUTarget("cuda", 90, 32)
MODULES = ("philox", "diffuse", "reproject", "adamw_ema")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Recorder:
    """Stands in for an autotuned kernel and compiles it for the arguments of a launch, with all its configurations."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.configs = kernel.fn, kernel.configs

    def __getitem__(self, grid: Any) -> Recorder:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in LAUNCH_OPTIONS}
        given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **keywords}
        for config in self.configs:
            source = self.specialise({**given, **config.kwargs})
            compiled = compile(source, target=HOPPER, options={"num_warps": config.num_warps, **options})
            shape = {"block": config.kwargs["BLOCK"], "warps": config.num_warps}
            constants = {name: str(value) for name, value in given.items() if name.isupper()}
            missing = {"without": [name for name, value in given.items() if value is None]}
            print(json.dumps({"kernel": self.kernel.__name__, **shape, **constants, **missing, **properties(compiled)}))

    def specialise(self, given: dict[str, Any]) -> ASTSource:
        """As the launcher does: None, 1 and constexprs are constants, and 16 divides addresses and some sizes."""
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def type_of(value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                return tuple(type_of(item, (*path, index)) for index, item in enumerate(value))
            if value is None or (isinstance(value, int) and value == 1) or self.kernel.params[path[0]].is_constexpr:
                constants[path] = value
                return "constexpr"
            if hasattr(value, "data_ptr") or (isinstance(value, int) and value % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
            return mangle_type(value)

        signature = {name: type_of(given[name], (index,)) for index, name in enumerate(self.kernel.arg_names)}
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


def properties(compiled: Any) -> dict[str, Any]:
    """Global accesses of a thread by their width in bytes, and what slows a kernel down."""
    ptx = compiled.asm["ptx"]
    widths: dict[int, int] = {}
    for vector, bits in re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        width = int(vector or 1) * int(bits) // 8
        widths[width] = widths.get(width, 0) + 1
    return {
        "widths": widths,
        "fused": len(re.findall(r"fma\.rn(?:\.ftz)?\.f32", ptx)),
        "approximate": sorted(set(re.findall(r"\w+\.approx[.\w]*", ptx))),
        "barriers": len(re.findall(r"bar\.sync|barrier\.sync", ptx)),
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of local memory, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "local": int(found["STACK"]) + int(found["LOCAL"])}


def record(module_name: str) -> None:
    module = importlib.import_module(f"fastsp_kernels.{module_name}")
    module.uses_triton = lambda tensor: True
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name)))


def latents() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Latents, a source of noise, and the coefficients of a process."""
    source = {"seed": torch.tensor(1), "positions": torch.arange(2)}
    return torch.randn(2, 4, 64, 64), source, torch.rand(4, 2), torch.rand(2, 2)


def compile_random() -> None:
    random_words(1, 2, torch.arange(3), 100)
    random_normals(1, 2, torch.arange(3), (4, 5, 7))


def compile_diffuse() -> None:
    x0, source, marginal, _ = latents()
    diffuse(x0, marginal, noise=x0)
    for layout in LAYOUTS:
        diffuse(x0, marginal, **source, with_target=False, dtype=torch.bfloat16, memory_format=layout)


def compile_reproject() -> None:
    """With noise of its own, as in a training step and contiguous; and with given noise, as in the drop-in loss."""
    x0, source, *coefficients = latents()
    for layout in LAYOUTS:
        model_pred = x0.bfloat16().contiguous(memory_format=layout)
        reproject(model_pred, x0, *coefficients, **source, memory_format=layout)
    reproject(x0, x0, *coefficients, noise=x0)


def compile_adamw_ema() -> None:
    importlib.import_module("fastsp_kernels.adamw_ema").INTERPRETED = True  # nothing to tune
    one, masters = torch.ones(()), [torch.zeros(1 << 16)]
    halves = [masters[0].bfloat16()]
    scalars = {"learning_rate": one, "ema_decay": one, "gradient_norm": one}
    for gradients, moments, copies in (
        (masters, masters, []),
        (masters, masters, halves),
        (halves, masters, []),
        (halves, masters, halves),
        (halves, halves, halves),
    ):
        counters = {"step": torch.zeros(()), "skipped": torch.zeros((), dtype=torch.int64)}
        adamw_ema(masters, gradients, moments, moments, masters, copies, **scalars, **counters)


OPS: dict[str, Callable[[], None]] = {
    "random": compile_random,
    "diffuse": compile_diffuse,
    "reproject": compile_reproject,
    "adamw_ema": compile_adamw_ema,
}

if __name__ == "__main__":
    for module_name in MODULES:
        record(module_name)
    for op in sys.argv[1:] or OPS:
        OPS[op]()

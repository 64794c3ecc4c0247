"""Compile every kernel for an H100 or H200 on any machine, and print what came out: a JSON object per kernel.

Run as a script with TRITON_INTERPRET=0. The ops are called on CPU tensors, but each launch is recorded and compiled
instead of run; Triton brings the assembler.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import torch
from fastsp_kernels import adamw_ema, diffuse, diffuse_seeded, reproject
from fastsp_kernels._triton import LAUNCH_OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import mangle_type

HOPPER = GPUTarget("cuda", 90, 32)


class Recorder:
    """Stands in for an autotuned kernel and compiles it for the arguments of a launch, with one block size."""

    def __init__(self, kernel: Any, block: int) -> None:
        self.kernel, self.block = kernel.fn, block

    def __getitem__(self, grid: Any) -> Recorder:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in LAUNCH_OPTIONS}
        given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **keywords, "BLOCK": self.block}
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
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        ptx = compile(source, target=HOPPER, options={"num_warps": 4, **options}).asm["ptx"]
        accesses = re.findall(r"(?:ld|st)\.global(?:\.nc)?((?:\.v\d)?)\.(b\d+)", ptx)
        wide = sum(vector == ".v4" and width == "b32" for vector, width in accesses)
        approximate = sorted(set(re.findall(r"\w+\.approx[.\w]*", ptx)))
        report = {"kernel": self.kernel.__name__, "wide": wide, "accesses": len(accesses), "approximate": approximate}
        print(json.dumps(report))


def record(module_name: str, block: int) -> None:
    module = importlib.import_module(f"fastsp_kernels.{module_name}")
    module.uses_triton = lambda tensor: True
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name), block))


def main() -> None:
    for module_name in ("diffuse", "reproject", "reproject_backward", "adamw_ema"):
        record(module_name, 1024)
    importlib.import_module("fastsp_kernels.adamw_ema").INTERPRETED = True  # nothing to tune
    latents, positions, seed = torch.randn(2, 4, 64, 64), torch.arange(2), torch.tensor(1)
    table, angles = torch.rand(1000), torch.rand(1000, dtype=torch.float64)
    diffuse(latents, latents, positions, table, table, target="epsilon")
    diffuse_seeded(latents, seed, positions, table, table, dtype=torch.bfloat16, memory_format=torch.channels_last)
    for prediction_type in ("v_prediction", "epsilon", "sample"):
        answer = latents.bfloat16().requires_grad_()
        reproject(
            answer,
            latents,
            positions,
            positions,
            table,
            table,
            angles,
            seed=seed,
            positions=positions,
            prediction_type=prediction_type,
        ).sum().backward()
    weights, one = [torch.zeros(1 << 16)], torch.ones(())
    halves = [weights[0].bfloat16()]
    scalars = {"learning_rate": one, "ema_decay": one, "gradient_norm": one}
    for copies in ([], halves):
        counters = {"step": torch.zeros(()), "skipped": torch.zeros((), dtype=torch.int64)}
        adamw_ema(weights, halves, weights, weights, weights, copies, **scalars, **counters)


if __name__ == "__main__":
    main()

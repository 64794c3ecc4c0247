"""The house: which package may import which, and that docs/architecture.md draws it so."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top to the ground. A package imports from floors below its own, never upward or sideways.
FLOORS = (
    ("cli",),
    ("bench", "export"),
    ("evaluation",),
    ("training",),
    ("generation",),
    ("config",),
    ("loss",),
    ("models", "data"),
    ("perceptual",),
    ("diffusion",),
    ("families",),
    ("utils", "kernels"),
)
# Modules that lie directly in fastsp/, and the package that each belongs to.
PACKAGE_OF = {
    "__main__": "cli",
    "config_epochs": "config",
    "config_mistakes": "config",
    "config_text": "config",
    "objectives": "config",
    "options": "utils",
    "errors": "utils",
}
FLOOR_OF = {package: number for number, floor in enumerate(FLOORS) for package in floor}


def source_files() -> dict[str, Path]:
    """Module name -> file."""
    folders = (ROOT / "fastsp", ROOT / "kernels" / "fastsp_kernels")
    files = [(folder, file) for folder in folders for file in folder.rglob("*.py")]
    parts = {file: file.relative_to(folder.parent).with_suffix("").parts for folder, file in files}
    return {".".join(names).removesuffix(".__init__"): file for file, names in parts.items()}


FILES = source_files()


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it: inside a function too, and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members if members <= FILES.keys() else members | {node.module}
    return found & FILES.keys()


IMPORTS = {name: imports(file) - {name} for name, file in FILES.items()}
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def package_of(module: str) -> str:
    top, _, rest = module.partition(".")
    if top == "fastsp_kernels":
        return "kernels"
    name = rest.partition(".")[0]
    return PACKAGE_OF.get(name, name)


def test_every_module_has_a_floor():
    unknown = {name for name in FILES if name != "fastsp" and package_of(name) not in FLOOR_OF}
    assert not unknown, "say in FLOORS or PACKAGE_OF where they belong"


def test_nothing_imports_upward_or_sideways():
    wrong = [
        f"{module} ({package_of(module)}) imports {other} ({package_of(other)})"
        for module, others in IMPORTS.items()
        for other in others - {"fastsp"}
        if package_of(module) != package_of(other) and FLOOR_OF[package_of(module)] >= FLOOR_OF[package_of(other)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the circle


def test_kernels_import_torch_numpy_and_triton_alone():
    tops = {
        name.partition(".")[0]
        for module, file in FILES.items()
        if package_of(module) == "kernels"
        for node in ast.walk(ast.parse(file.read_text()))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        + ([node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
    }
    assert tops - set(sys.stdlib_module_names) == {"fastsp_kernels", "torch", "numpy", "triton"}


def test_the_page_draws_these_floors():
    picture = PAGE.partition("```text\n")[2].partition("```")[0].splitlines()
    assert tuple(tuple(line.partition("  ")[0].split(", ")) for line in picture) == FLOORS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(fastsp(?:_kernels)?(?:\.\w+)+)`", PAGE))))
def test_what_the_page_names_exists(name):
    module, _, attribute = name.rpartition(".")
    if name not in FILES:
        source = FILES[module].read_text()
        assert re.search(rf"^(?:class |def )?{attribute}\b|^from .*\b{attribute}\b", source, re.MULTILINE), name


def test_the_page_names_files_that_exist():
    named = re.findall(r"(?:\.\./)?((?:tests|docs|fastsp|kernels)/[\w/.]+\w)", PAGE)
    assert named and not [path for path in named if not (ROOT / path).exists()]

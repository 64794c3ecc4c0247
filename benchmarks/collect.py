"""Puts what `make gpu-test` and `make gpu-bench` wrote into OUT where it is committed, and makes tables of it.

    python benchmarks/collect.py OUT [benchmarks/results/nvidia-h200]

Into a folder named after the GPU go the rows of `fastsp bench`, those of pytest-benchmark without their single rounds,
the outcome of the tests, and `README.md` with all of it as tables and with device, versions, commit and date. Files of
other names that are there from earlier runs stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
FACTS = (
    "model",
    "batch_size",
    "commit",
    "torch",
    "triton",
    "diffusers",
    "cuda",
    "cudnn",
    "driver",
    "nvidia-dali-cuda130",
)
# What a table shows if a row has it; other numbers of a row are in the JSON file.
COLUMNS = (
    *("name", "provider", "samples_per_s", "ms_p20", "ms_p50", "ms_p80", "speed_relative_to_fastsp_sp", "mfu"),
    *("gflop_per_sample", "peak_memory_gb", "first_step_s", "cuda_graph", "teacher"),
    *("p20_us", "p50_us", "p80_us", "required_bytes_per_s", "fraction_of_copy", "images_per_second", "waiting_share"),
    *("passed", "failed", "skipped"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    found = {file.stem: rows for file in sorted(options.out.glob("*.json")) if (rows := rows_of(file))}
    found |= {f"{file.stem}-outcome": [outcome(file)] for file in sorted(options.out.glob("*.xml"))}
    if not found:
        print(f"{options.out} holds no results", file=sys.stderr)
        return 2
    devices = [row["device"] for rows in found.values() for row in rows if "device" in row]
    folder = options.folder or RESULTS / re.sub(r"[^a-z0-9]+", "-", (devices or ["unknown"])[0].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    everything = {file.stem: rows for file in sorted(folder.glob("*.json")) if (rows := rows_of(file))}
    text = "\n".join(line for name, rows in everything.items() for line in table(name, rows)) + "\n"
    (folder / "README.md").write_text(text)
    print(f"{text}\nwrote {folder}")
    return 0


def rows_of(file: Path) -> list[Row]:
    """Of a file of `fastsp bench`, of pytest-benchmark or of this script; none of any other."""
    content = json.loads(file.read_text())
    if isinstance(content, dict) and "benchmarks" in content:
        date = content["datetime"][:19]
        content = [
            {"name": row["name"], "date": date, **row["extra_info"], "median_s": row["stats"]["median"]}
            for row in content["benchmarks"]
        ]
    rows = content if isinstance(content, list) else []
    return [{**row, **row.get("environment", {})} for row in rows if "date" in row]


def outcome(file: Path) -> Row:
    """Of a JUnit file: how many tests passed, and the names of those that did not."""
    suites = list(ElementTree.parse(file).iter("testsuite"))
    kinds: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        kind = next((child.tag for child in case if child.tag in kinds), "passed")
        kinds[kind].append(f"{case.get('classname')}::{case.get('name')}")
    failed = kinds["failure"] + kinds["error"]
    return {
        "name": file.stem,
        "date": suites[0].get("timestamp", "")[:19],
        "passed": len(kinds["passed"]),
        "failed": len(failed),
        "skipped": len(kinds["skipped"]),
        "failures": failed,
        "skips": kinds["skipped"],
    }


def table(name: str, rows: list[Row]) -> Iterator[str]:
    """Markdown: the rows, and what they were measured with."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    yield f"## {name}\n"
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(number(row.get(key)) for key in columns)} |"
    yield ""
    facts = [[f"{key} {row[key]}" for key in ("device", *FACTS) if row.get(key)] for row in rows]
    made = {", ".join([row["date"], *known]) for row, known in zip(rows, facts, strict=True)}
    yield from (f"Measured {line}.  " for line in sorted(made))
    yield from (f"- failed: {case}" for row in rows for case in row.get("failures", ()))
    yield ""


def number(value: Any) -> str:
    """Three digits; text as it is."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


if __name__ == "__main__":
    sys.exit(main())

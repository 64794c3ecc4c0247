"""What a run of the GPU suite leaves in OUT, as the files and tables that are committed.

    python benchmarks/collect.py OUT [benchmarks/results/nvidia-h200]

Writes into the folder named after the GPU: the rows of `fastsp bench` (`step*.json`) and its roofline as they are,
pytest-benchmark's files without their single rounds (`kernels.json`, `data.json`), the tests' outcome (`tests.json`),
the pictures of the training run, and `README.md` with everything as tables, which is printed too. What the folder holds
from other runs of the suite stays, unless it was measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastsp.bench.report import verdict

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
LISTS = ("kernels.json", "data.json", "tests.json")  # of which single rows are measured anew
PICTURES = ("roofline.png", "train/samples/comparison.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    latest = read(options.out)
    if not latest:
        print(f"{options.out} holds no results of the GPU suite", file=sys.stderr)
        return 2
    folder = options.folder or RESULTS / folder_name(device_of(latest))
    folder.mkdir(parents=True, exist_ok=True)
    found = together(kept(folder), latest)
    for name, content in found.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    for picture in PICTURES:
        if (options.out / picture).is_file():
            shutil.copyfile(options.out / picture, folder / Path(picture).name)
    text = "\n".join(markdown(found)) + "\n"
    (folder / "README.md").write_text(text)
    print(text)
    print(f"wrote {folder}")
    return 0


def read(out: Path) -> dict[str, Any]:
    """The contents of the files to be kept, by their names."""
    found: dict[str, Any] = {file.name: json.loads(file.read_text()) for file in sorted(out.glob("step*.json"))}
    for name in ("kernels", "data"):
        files = sorted(out.glob(f"{name}*.json"))
        if rows := [row for file in files for row in benchmarks(json.loads(file.read_text()))]:
            found[f"{name}.json"] = rows
    if suites := [outcome(file) for file in sorted(out.glob("gpu-test*.xml"))]:
        found["tests.json"] = suites
    return found


def kept(folder: Path) -> dict[str, Any]:
    """What an earlier run of this left in a folder. Other files there are somebody else's."""
    names = [file.name for file in sorted(folder.glob("step*.json"))] + list(LISTS)
    contents = {name: json.loads((folder / name).read_text()) for name in names if (folder / name).is_file()}
    return {name: rows for name, rows in contents.items() if isinstance(rows, list)}


def together(earlier: dict[str, Any], latest: dict[str, Any]) -> dict[str, Any]:
    """The latest rows in place of earlier ones of the same name. The rows of `fastsp bench` were measured side by side
    and stay so."""
    found = {**earlier, **latest}
    for name in LISTS:
        rows = [*earlier.get(name, []), *latest.get(name, [])]
        if rows:
            found[name] = list({row.get("file", row.get("name")): row for row in rows}.values())
    return dict(sorted(found.items()))


def benchmarks(report: Row) -> list[Row]:
    """Of a file of pytest-benchmark: names, what was noted, and the median of its own clock."""
    return [
        {
            "name": row["name"],
            "group": row["group"],
            "date": report["datetime"][:19],
            **row["extra_info"],
            "median_s": row["stats"]["median"],
        }
        for row in report["benchmarks"]
    ]


def outcome(file: Path) -> Row:
    """Of a JUnit file: how many passed, and who did not."""
    failed, skipped, passed, seconds = [], [], 0, 0.0
    report = ElementTree.parse(file)
    date = next((suite.get("timestamp", "")[:19] for suite in report.iter("testsuite")), "")
    for case in report.iter("testcase"):
        name, seconds = f"{case.get('classname')}::{case.get('name')}", seconds + float(case.get("time", 0))
        reasons = {child.tag: str(child.get("message", "")).partition("\n")[0] for child in case}
        if reason := reasons.get("failure", reasons.get("error")):
            failed.append({"name": name, "reason": reason})
        elif "skipped" in reasons:
            skipped.append({"name": name, "reason": reasons["skipped"]})
        else:
            passed += 1
    counts = {"passed": passed, "failed": failed, "skipped": skipped}
    return {"file": file.name, "date": date, **counts, "seconds": round(seconds, 1)}


def device_of(found: dict[str, Any]) -> str:
    """The GPU's name, as any of the files has it."""
    for content in found.values():
        for row in content if isinstance(content, list) else []:
            name = row.get("device") or row.get("environment", {}).get("device")
            if name:
                return str(name)
    return "unknown"


def folder_name(device: str) -> str:
    """NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def markdown(found: dict[str, Any]) -> Iterator[str]:
    """Everything as tables."""
    yield f"# {device_of(found)}"
    for name, rows in found.items():
        if name.startswith("step") and rows:
            yield from _step(name, rows)
    if rows := found.get("kernels.json"):
        yield from _table(
            "Kernels",
            ["operation", "provider", "us p20/p50/p80", "GB/s", "of a copy", "host ms", "config"],
            [
                [
                    row["group"],
                    row["provider"],
                    "/".join(f"{row[key]:.1f}" for key in ("p20_us", "p50_us", "p80_us")),
                    f"{row['required_bytes_per_s'] / 1e9:.0f}",
                    f"{row['fraction_of_copy']:.0%}",
                    _number(row.get("host_ms")),
                    row.get("config") or "",
                ]
                for row in rows
            ],
        )
        yield from _provenance(rows)
    if rows := found.get("data.json"):
        notes = [", ".join(f"{key} {_number(value)}" for key, value in row.items() if _plain(value)) for row in rows]
        yield from _table(
            "Data", ["benchmark", "what was noted"], [[r["name"], n] for r, n in zip(rows, notes, strict=True)]
        )
        yield from _provenance(rows)
    for suite in found.get("tests.json", []):
        failed = [f"{case['name']} ({case['reason']})" for case in suite["failed"]]
        counts = f"{suite['passed']} passed, {len(failed)} failed, {len(suite['skipped'])} skipped"
        yield f"\n{suite['file']}, {suite['date']}: {counts}."
        yield from (f"- failed: {case}" for case in failed)


def _step(name: str, rows: list[Row]) -> Iterator[str]:
    facts = rows[0]
    versions = facts["environment"]
    made_of = ", ".join(
        f"{key} {versions[key]}" for key in ("torch", "triton", "diffusers", "cuda", "cudnn") if key in versions
    )
    yield from _table(
        f"`{name}`: {facts['model']}, batch {facts['batch_size']}, {facts['precision']}",
        [
            "provider",
            "samples/s",
            "ms p20/p50/p80",
            "MFU",
            "of the matrix rate",
            "GB",
            "speed over fastsp_sp",
            "first step, s",
        ],
        [
            [
                row["name"],
                _number(row["samples_per_s"]),
                "/".join(_number(row[key]) for key in ("ms_p20", "ms_p50", "ms_p80")),
                "" if row["mfu"] is None else f"{row['mfu']:.0%}",
                f"{row['mfu_of_measured_matmul']:.0%}",
                _number(row["peak_memory_gb"]),
                _number(row["speed_relative_to_fastsp_sp"]),
                _number(row["first_step_s"]),
            ]
            for row in rows
        ],
    )
    matmul, copy = _number(facts["matmul_tflops_per_s"]), _number(facts["copy_gbyte_per_s"])
    yield f"\n{facts['date']}, commit {versions.get('commit', 'unknown')}, {made_of}; attention {facts['attention']}; "
    yield f"matrix product {matmul} TFLOP/s, copy {copy} GB/s."
    yield from (f"- {sentence}" for sentence in verdict(rows))
    ours = next((row for row in rows if row["name"] == "fastsp_sp"), {})
    for key, columns in (
        ("phases", ["name", "ms_p50", "gflop_per_sample"]),
        ("operators", ["group", "ms", "share", "calls"]),
        ("batch_sweep", ["batch_size", "samples_per_s", "peak_memory_gb"]),
    ):
        if part := ours.get(key):
            yield from _table(
                f"fastsp_sp: {key}", columns, [[_number(row[column]) for column in columns] for row in part]
            )


def _provenance(rows: list[Row]) -> Iterator[str]:
    """When and with what the rows were measured, which may have been at several times."""
    facts = [{**row, **row.get("environment", {})} for row in rows]
    keys = ("commit", "torch", "triton", "nvidia-dali-cuda130", "driver")
    lines = {f"{row['date']}, " + ", ".join(f"{key} {row[key]}" for key in keys if row.get(key)) for row in facts}
    yield ""
    yield from (f"Measured {line}.  " for line in sorted(lines))


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    """Three digits; text as it is."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())

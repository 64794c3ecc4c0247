"""The paper's tables as runs: the stages that each compares, the rows that it prints, and what the paper reports.

Every table is one run: MSE first, then a self-perceptual stage for each of its rows, all from the same MSE weights.
The paper's figures are those of Stable Diffusion 2.1 on COCO in Inception-v3's features: with a run on other data only
the order of the rows can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.evaluation.rows import Setting, by_setting

BASE, SP = "mse", "sp"


class Entry(NamedTuple):
    """A row of a table: what is sampled how, and the paper's figures."""

    label: str
    stage: str
    fid: float
    inception_score: float
    steps: int = 25
    guidance: float = 0.0
    rescale: float = 0.0


class Table(NamedTuple):
    """A table of the paper."""

    title: str  # what it compares
    entries: tuple[Entry, ...]  # its rows, in the paper's order
    # The self-perceptual stages by name, each with what differs from the configuration's own
    stages: dict[str, dict[str, Any]] = {SP: {}}  # noqa: RUF012 - never changed
    unconditional: bool = False  # trained and sampled with the empty prompt


def _variants(title: str, key: str, *rows: tuple[str, str, float, float]) -> Table:
    """Stages that differ in one key, and a row for each: label, the key's value, FID, IS."""
    names = [f"{SP}_{value.replace('+', '_')}" for _, value, _, _ in rows]
    entries = tuple(Entry(label, name, fid, score) for name, (label, _, fid, score) in zip(names, rows, strict=True))
    return Table(title, entries, {name: {key: row[1]} for name, row in zip(names, rows, strict=True)})


TABLES: dict[int, Table] = {
    1: Table(
        "MSE and self-perceptual, with and without guidance",
        (
            Entry("MSE", BASE, 32.68, 22.20),
            Entry("MSE", BASE, 29.63, 22.86, steps=50),
            Entry("self-perceptual", SP, 25.89, 27.76),
            Entry("self-perceptual", SP, 24.42, 28.07, steps=50),
            Entry("MSE + CFG", BASE, 24.41, 32.10, guidance=7.5),
            Entry("MSE + CFG rescaled", BASE, 18.67, 34.17, guidance=7.5, rescale=0.7),
        ),
    ),
    2: Table(
        "unconditional models",
        (Entry("MSE", BASE, 62.32, 11.18), Entry("self-perceptual", SP, 59.12, 12.04)),
        unconditional=True,
    ),
    3: _variants(
        "layers of the perceptual network",
        "layers",
        ("encoder", "encoder", 26.64, 26.89),
        ("decoder", "decoder", 42.42, 19.98),
        ("encoder + mid", "encoder+mid", 26.96, 27.24),
        ("mid", "mid", 25.89, 27.76),
    ),
    4: _variants(
        "the timestep t'",
        "timestep_sampling",
        ("t + 40 or t - 40", "offset", 27.24, 23.31),
        ("N(t, 100)", "normal", 24.54, 25.42),
        ("U(1, T)", "uniform", 25.89, 27.76),
    ),
    5: _variants("the distance", "distance", ("MAE", "mae", 25.28, 27.41), ("MSE", "mse", 25.89, 27.76)),
    6: Table(
        "the perceptual network",
        (Entry("MSE model", SP, 25.89, 27.76), Entry("SP model", "sp_repeat", 26.61, 26.41)),
        {SP: {}, "sp_repeat": {"perceptual_network": SP}},
    ),
    7: Table(
        "self-perceptual with guidance",
        (
            Entry("SP + CFG 2", SP, 21.19, 32.22, guidance=2, rescale=0.7),
            Entry("SP + CFG 3", SP, 20.65, 33.49, guidance=3, rescale=0.7),
            Entry("SP + CFG 4", SP, 20.67, 33.34, guidance=4, rescale=0.7),
            Entry("SP + CFG 7.5", SP, 23.49, 31.64, guidance=7.5, rescale=0.7),
        ),
    ),
}


def own_config(file: Path) -> Path:
    """A configuration of the repository: below this folder, else beside an editable install; else `UserError`."""
    beside = Path(__file__).resolve().parents[2] / file
    for path in (file, beside):
        if path.is_file():
            return path
    raise UserError(
        f"configuration file {file} is neither here nor in {beside.parent}: run this in a clone of the "
        "repository, install from one with pip install -e, or give another file by --config"
    )


def table_config(number: int, base: Path, overrides: Sequence[str] = ()) -> Config:
    """The run of a table, 1 to 7, in ``reproduce/tableN`` beside the base's own.

    `base` is a configuration whose first stage is MSE and that has a self-perceptual one, else `UserError`: their
    settings are taken, as are model, data and all else. `overrides`, as on the command line, have the last word.
    """
    if number not in TABLES:
        raise UserError(f"table {number}: the paper has tables 1 to {max(TABLES)}")
    table, config = TABLES[number], load_config(base)
    template = next((stage for stage in config.stages if stage.objective == "self_perceptual"), None)
    if config.stages[0].objective != "mse" or template is None:
        raise UserError(
            f"{base}: a table needs a first stage of MSE and a self-perceptual one: it takes their settings"
        )
    own = {**template.model_dump(), "init": BASE, "perceptual_network": BASE}
    changes = {
        "run_dir": str(Path(config.run_dir).parent / "reproduce" / f"table{number}"),
        "stages": [
            {**config.stages[0].model_dump(), "name": BASE},
            *({**own, "name": name, **differing} for name, differing in table.stages.items()),
        ],
        "final": list(table.stages)[-1],
        "data.unconditional": table.unconditional,
        "evaluation.enabled": True,
        "evaluation.steps": sorted({entry.steps for entry in table.entries}),
        "evaluation.guidance": [
            {"stages": [row.stage], "scale": row.guidance, "rescale": row.rescale}
            for row in table.entries
            if row.guidance
        ],
        "evaluation.unconditional": table.unconditional,
    }
    return load_config(base, [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *overrides])


def compared(number: int, rows: list[dict[str, Any]]) -> Iterator[tuple[Entry, float | None, float | None]]:
    """Each entry of a table with our FID and Inception Score, means over the seeds; None where there is no row yet."""
    table, groups = TABLES[number], by_setting(rows)
    for entry in table.entries:
        setting = Setting(entry.stage, not table.unconditional, entry.guidance, entry.rescale, entry.steps)
        found = groups.get(setting, [])
        fid, score = (mean(row[key] for row in found) if found else None for key in ("fid", "inception_score"))
        yield entry, fid, score


def counterpart(role: str | None, setting: Setting) -> tuple[float, float, str] | None:
    """The paper's FID, Inception Score and table for a row of a run's report; None where it has none.

    A guided row is matched to the paper's with the nearest scale. The paper has no equally long control.
    """
    if role == "real":
        return 0.00, 35.28, "Table 1"
    stage, guided = {"base": BASE, "self_perceptual": SP}.get(role or ""), setting.guidance > 0
    number = 2 if not setting.conditional else 7 if guided and stage == SP else 1
    matching = [
        entry
        for entry in TABLES[number].entries
        if entry.stage == stage
        and (entry.guidance > 0, entry.rescale > 0) == (guided, setting.rescale > 0)
        and (guided or entry.steps == setting.steps)
    ]
    if not matching:
        return None
    entry = min(matching, key=lambda entry: abs(entry.guidance - setting.guidance))
    return entry.fid, entry.inception_score, f"Table {number}" + (f", scale {entry.guidance:g}" if guided else "")

"""FID and IS of Lin & Yang, "Diffusion Model with Perceptual Loss" (arXiv 2401.00110), to stand beside ours.

Theirs are Stable Diffusion 2.1 in Inception-v3 features over 10,000 COCO captions. Only the order of the rows can be
compared with a run on other data in other features, never the values.
"""

from __future__ import annotations

from typing import NamedTuple

from fastsp.evaluation.reproduction import BASE, SP, TABLES
from fastsp.evaluation.rows import Setting


class Reported(NamedTuple):
    """What the paper reports for a row that corresponds to one of ours."""

    fid: float
    inception_score: float
    where: str  # the table, and what the row's label does not say


def counterpart(role: str, setting: Setting) -> Reported | None:
    """The paper's row for ours, None where it has none.

    Args:
        role: "real", "base" (MSE), "self_perceptual", "control" or "other". The paper has no equally long control.
        setting: what ours was sampled with. A guided row is matched to the paper's with the nearest scale.
    """
    if role == "real":
        return Reported(0.00, 35.28, "Table 1")
    stage = {"base": BASE, "self_perceptual": SP}.get(role)
    guided = setting.guidance > 0
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
    where = f"Table {number}" + (f", scale {entry.guidance:g}" if guided else "")
    return Reported(entry.fid, entry.inception_score, where)

"""FID and IS of Lin & Yang, "Diffusion Model with Perceptual Loss" (arXiv 2401.00110), to stand beside ours.

Theirs are Stable Diffusion 2.1 in Inception-v3 features over 10,000 COCO captions. Only the order of the rows can be
compared with a run on other data in other features, never the values.
"""

from typing import NamedTuple

from fastsp.evaluation.rows import Setting


class Reported(NamedTuple):
    """What the paper reports for a row that corresponds to one of ours."""

    fid: float
    inception_score: float
    where: str  # the table, and what the row's label does not say


GROUND_TRUTH = Reported(0.00, 35.28, "Table 1")
UNGUIDED = {  # role, DDIM steps
    ("base", 25): Reported(32.68, 22.20, "Table 1"),
    ("base", 50): Reported(29.63, 22.86, "Table 1"),
    ("self_perceptual", 25): Reported(25.89, 27.76, "Table 1"),
    ("self_perceptual", 50): Reported(24.42, 28.07, "Table 1"),
}
UNCONDITIONAL = {
    "base": Reported(62.32, 11.18, "Table 2"),
    "self_perceptual": Reported(59.12, 12.04, "Table 2"),
}
GUIDED_MSE = Reported(24.41, 32.10, "Table 1, scale 7.5")
GUIDED_MSE_RESCALED = Reported(18.67, 34.17, "Table 1, scale 7.5")
GUIDED_SELF_PERCEPTUAL_RESCALED = {  # guidance scale
    2.0: Reported(21.19, 32.22, "Table 7, scale 2"),
    3.0: Reported(20.65, 33.49, "Table 7, scale 3"),
    4.0: Reported(20.67, 33.34, "Table 7, scale 4"),
    7.5: Reported(23.49, 31.64, "Table 7, scale 7.5"),
}


def counterpart(role: str, setting: Setting) -> Reported | None:
    """The paper's row for ours, None where it has none.

    Args:
        role: "real", "base" (MSE), "self_perceptual", "control" or "other". The paper has no equally long control.
        setting: what ours was sampled with. Any guided MSE is matched to the paper's scale of 7.5, self-perceptual with
            guidance and rescale to the nearest scale of Table 7.
    """
    if role == "real":
        return GROUND_TRUTH
    if not setting.conditional:
        return UNCONDITIONAL.get(role) if setting.steps == 25 and not setting.guidance else None
    if not setting.guidance:
        return UNGUIDED.get((role, setting.steps))
    if role == "base":
        return GUIDED_MSE_RESCALED if setting.rescale else GUIDED_MSE
    if role == "self_perceptual" and setting.rescale:
        nearest = min(GUIDED_SELF_PERCEPTUAL_RESCALED, key=lambda scale: abs(scale - setting.guidance))
        return GUIDED_SELF_PERCEPTUAL_RESCALED[nearest]
    return None

"""What the evaluation reads of the configuration's `evaluation` section."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class GuidedRows(Protocol):
    """Rows with classifier-free guidance, at the first of the step counts."""

    @property
    def stages(self) -> Sequence[str] | None: ...  # None: all
    @property
    def scale(self) -> float: ...
    @property
    def rescale(self) -> float: ...  # 0: none


class EvaluationSettings(Protocol):
    """The section's keys; suggested defaults in the comments."""

    @property
    def num_samples(self) -> int: ...  # 500; of one row
    @property
    def seeds(self) -> Sequence[int]: ...  # [0, 1, 2]; of the initial noise; one seed gives no verdict
    @property
    def steps(self) -> Sequence[int]: ...  # [25, 50]; DDIM steps of the rows without guidance
    @property
    def guidance(self) -> Sequence[GuidedRows]: ...  # []
    @property
    def unconditional(self) -> bool: ...  # true; every stage with the empty prompt too, at the first step count
    @property
    def batch_size(self) -> int: ...  # 256; samples made at once; no figure depends on it
    @property
    def features(self) -> str: ...  # "classifier"; or an Inception-v3 safetensors file
    @property
    def heldout(self) -> str | list[str] | None: ...  # null; like data.path; the digits have their own split
    @property
    def captions(self) -> str | None: ...  # null; COCO's captions_val2014.json, or a text file
    @property
    def reference(self) -> str | None: ...  # null; a folder of real images, or statistics saved by `fastsp eval`


def absent_files(settings: EvaluationSettings) -> list[str]:
    """The files that the settings name and that are not there, each as ``key path``."""
    named = {"captions": settings.captions, "reference": settings.reference, "features": settings.features}
    if settings.features == "classifier":
        del named["features"]
    return [f"evaluation.{key} {path}" for key, path in named.items() if path is not None and not Path(path).exists()]

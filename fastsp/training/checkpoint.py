"""Checkpoints that are whole or not there: written beside their place, checked, committed by one rename.

Tensors go through `torch.distributed.checkpoint` and its safetensors writer; everything else is one JSON manifest with
the size and checksum of every file. No pickles.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fastsp.files import new_folder
from fastsp.training.checkpoint_folder import (
    Progress,
    folder_name,
    newest_whole_folder,
    progress_of,
    remove_old,
    write_manifest,
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress

    def load_into(self, state: dict[str, Tensor]) -> None:
        """Read every tensor of ``state`` in place.

        Raises:
            KeyError: the checkpoint lacks one of them.
        """
        with _single_process():
            dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)


def save_checkpoint(
    root: Path, progress: Progress, state: dict[str, Tensor], keep: int, keep_every: int | None = None
) -> Path:
    """Write ``root/step_*`` and remove all but the newest ``keep`` and every ``keep_every``-th step of a stage.

    Until the rename at the end, nothing under the final name exists and no older checkpoint is touched.
    """
    final = root / folder_name(progress)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    with new_folder(final) as unfinished:
        with _single_process():
            dcp.save(contiguous, storage_writer=HuggingFaceStorageWriter(str(unfinished)), no_dist=True)
        write_manifest(unfinished, {"progress": asdict(progress), "torch": torch.__version__})
    remove_old(final, keep, keep_every)
    return final


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged, and why newer ones were passed over."""
    folder, passed_over = newest_whole_folder(root)
    return (Checkpoint(folder, progress_of(folder)) if folder else None), passed_over


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that there is no process group, which is meant to be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield

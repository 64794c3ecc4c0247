"""Checkpoints: written to a temporary folder, checked, and committed by one rename.

`torch.distributed.checkpoint` writes the tensors as safetensors; a JSON manifest has the rest, with the size and
checksum of every file. Every rank writes its part in a thread: a step waits only for the copies to the CPU.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from fastsp.config import CheckpointConfig
from fastsp.generation.checkpoints import read_into
from fastsp.training.checkpoint_folder import (
    Files,
    Progress,
    damage,
    describe,
    folder_name,
    newest_first,
    progress_of,
    remove_old,
    write_manifest,
)
from fastsp.training.distributed import Ranks
from fastsp.training.placement import local
from fastsp.utils.files import commit_folder, unfinished_path
from fastsp.utils.versions import installed_version

_FILE_BYTES = 2 << 30  # about, of one file: the writer holds one at a time in memory


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress

    def load_into(self, state: dict[str, Tensor]) -> None:
        """Read every tensor of ``state`` in place, see :func:`fastsp.generation.checkpoints.read_into`."""
        read_into(self.folder, state)


class CheckpointWriter:
    """Saves checkpoints below ``root``, which all ranks share, in the background, one at a time.

    All ranks call the same methods in the same order. ``config_digest`` is for the manifest.
    """

    def __init__(self, root: Path, settings: CheckpointConfig, config_digest: str, ranks: Ranks) -> None:
        self.root, self.settings, self.ranks = root, settings, ranks
        self.facts = {
            "config": config_digest,
            "world_size": ranks.world_size,
            "versions": {
                "fastsp": installed_version("fastsp"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self._staged: dict[str, Tensor] = {}  # reused, because pinning memory is slow
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.ranks.world_size == 1:  # if another rank failed, waiting for it would hang
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed; :meth:`wait` raises its error."""
        return self._failure is not None

    def save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Start to write ``root/step_*``. Returns when the tensors may change again.

        Raises:
            Exception: the error of the previous save, or without ``checkpoint.asynchronous`` of this one.
        """
        self.wait()
        arguments = (progress, self._stage(_part_of(state, self.ranks)), _file_indices(state))
        self._thread = Thread(target=self._write, args=arguments, name="fastsp-save", daemon=True)
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress is committed, or raise its error."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _stage(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in CPU memory, contiguous, as the format requires."""
        staged = {}
        for name, tensor in part.items():
            source = local(tensor).detach()
            copy = self._staged.get(name)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._staged[name] = copy
            staged[name] = copy.copy_(source, non_blocking=True)
            if isinstance(tensor, DTensor):
                assert self.ranks.cpu_mesh is not None
                stride = torch.empty(tensor.shape, device="meta").stride()
                staged[name] = DTensor.from_local(
                    copy, self.ranks.cpu_mesh, tensor.placements, shape=tensor.shape, stride=stride
                )
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(self, progress: Progress, part: dict[str, Tensor], file_indices: dict[str, int]) -> None:
        """All ranks write into one unfinished folder; when all are done, rank 0 gives it its name."""
        final, ranks = self.root / folder_name(progress), self.ranks

        def prepare() -> Path:
            unfinished = unfinished_path(final)
            if ranks.is_main:
                unfinished.mkdir(parents=True)
            return unfinished

        def commit(files: Files) -> None:
            assert unfinished is not None
            write_manifest(unfinished, {"progress": asdict(progress), **self.facts}, files)
            commit_folder(unfinished, final)
            remove_old(final, self.settings.keep, self.settings.keep_every)

        unfinished: Path | None = None
        try:
            unfinished = ranks.together(prepare)[0]
            writer = HuggingFaceStorageWriter(str(unfinished), file_indices, save_distributed=True)
            dcp.save(part, storage_writer=writer, process_group=ranks.patient, no_dist=ranks.world_size == 1)
            own = f"shard-{ranks.rank + 1:05d}-*"
            described = ranks.together(lambda: describe(unfinished, own))
            files = {name: facts for part in described for name, facts in part.items()}
            ranks.together(lambda: commit(files) if ranks.is_main else None)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if ranks.is_main and unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._failure = error


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and why newer ones were skipped."""
    passed_over: list[str] = []
    for folder in newest_first(root):
        reason = damage(folder)
        if reason is None:
            return Checkpoint(folder, progress_of(folder)), passed_over
        passed_over.append(f"{folder.name}: {reason}")
    return None, passed_over


def _part_of(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """What this rank writes: its shards of the sharded tensors, and an even share of the replicated ones."""
    replicated = [name for name, tensor in state.items() if not isinstance(tensor, DTensor)]
    replicated.sort(key=lambda name: state[name].nbytes)
    own = set(replicated[ranks.rank :: ranks.world_size])
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor) or name in own}


def _file_indices(state: dict[str, Tensor]) -> dict[str, int]:
    """The number of each tensor's file, from 1; the same on all ranks."""
    indices, total = {}, 0
    for name, tensor in state.items():
        total += tensor.nbytes
        indices[name] = 1 + total // _FILE_BYTES
    return indices

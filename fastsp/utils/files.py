"""Files and folders that are whole or not there: written beside their place, made durable, given their name at the end.

Whatever stops a process in between, nothing half-written ever stands under the final name, and what stood there before
is still whole. What a killed process leaves behind matches :data:`UNFINISHED`.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

from fastsp.errors import UserError

UNFINISHED = ".*.tmp"
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # said by file systems that know no such operation
os.umask(_umask := os.umask(0o077))  # it can only be read by setting it
_MODE = 0o666 & ~_umask  # of a new file
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here",
}


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' ``save_file`` with sorted metadata, whose order else changes: equal contents are equal bytes."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the same characters, then spaces up to a multiple of 8 bytes
            file.seek(8)
            file.write(text.ljust(size))


def read_text(path: Path, name: str | None = None) -> str:
    """The text of a file that a user hands in, see :func:`decode_text`; errors call it ``name``, else by its path.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    name = name or str(path)
    try:
        return decode_text(path.read_bytes(), name)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, name: str | None = None) -> list[str]:
    """The lines of :func:`read_text`, stripped, without the empty ones."""
    return [line.strip() for line in read_text(path, name).split("\n") if line.strip()]


def read_json_object(file: Path) -> dict[str, Any]:
    """What a JSON file of a model holds.

    Raises:
        UserError: it cannot be read, or holds something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def decode_text(content: bytes, name: str) -> str:
    """UTF-8 without the byte order mark that Windows' editors put first, its lines ended by ``\\n``.

    Raises:
        UserError: it is in another encoding; the message says which is likely.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            found = "it looks like UTF-16"
        else:
            line = content.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{content[error.start]:02x} in line {line}; it may be cp1252 (Latin-1)"
        raise UserError(f"{name} is not UTF-8 text ({found}): save it as UTF-8") from None


def expand_home(path: str) -> str:
    """The path with its leading ``~`` or ``~user`` replaced by that home folder; a UserError if there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path!r} names a home folder that is not known; write ./{path} for a file of that name")
    return expanded


def check_writable(file: Path, force: bool, option: str = "") -> None:
    """Check before the work begins that a file, named by an ``option``, can be written at its end.

    The folders above it may be missing.

    Raises:
        UserError: a folder is there, or a file and not ``force``, or the file system does not let us write.
    """
    check_free(file, force, option)
    _try_to_create(unfinished_path(file), f"{option} {file}".lstrip())


def check_free(file: Path, force: bool, option: str = "") -> None:
    """The part of :func:`check_writable` that only looks, for many files of one folder."""
    name = f"{option} {file}".lstrip()
    if os.path.isdir(file):
        raise UserError(f"{name} is a folder; a file is written there")
    if os.path.lexists(file) and not force:
        raise UserError(f"{name} is there already; --force replaces it, or choose another name")


def check_folder_writable(folder: Path, option: str = "", replaces: bool = False) -> None:
    """As :func:`check_writable`, of a folder to write into; ``replaces``: by :func:`new_folder`, beside the old one.

    Raises:
        UserError: a file is there, or the file system does not let us write.
    """
    name = f"{option} {folder}".lstrip()
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{name} is a file; a folder is written there")
    _try_to_create(folder / unfinished_path(folder).name, name)
    if replaces:
        _try_to_create(unfinished_path(folder), name)


def _try_to_create(file: Path, name: str) -> None:
    """Create and remove a file, in its own folder or in the nearest one above it that exists."""
    place = next(parent for parent in file.absolute().parents if os.path.lexists(parent))
    if not os.path.isdir(place):
        raise UserError(f"{name} cannot be written: {place} is no folder")
    try:
        os.close(os.open(place / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(place / file.name)
    except OSError as error:
        raise UserError(f"{name} cannot be written: {place}: {error.strerror}") from None


class FileLock:
    """An exclusive lock (``flock``) among processes, held from :meth:`acquire` to :meth:`release` or the process's end.

    Some file systems of clusters have no locks. There nothing is locked and the work goes on; ``note``, else None, is a
    line that says so.

    ``path`` is a file for the lock alone, which stays; while the lock is held it names the holder. ``patience``:
    seconds to wait for another holder. ``what``: how messages call what is protected.
    """

    def __init__(self, path: Path, patience: float, what: str) -> None:
        self.path, self.patience, self.what = path, patience, what
        self.note: str | None = None
        self._stream: TextIO | None = None

    def acquire(self) -> Self:
        """Wait for the lock and take it; without effect if it is held already.

        Raises:
            UserError: another process still holds it after ``patience`` seconds, or the file cannot be opened.
        """
        if self._stream is not None:
            return self
        until = time.monotonic() + self.patience
        try:
            stream = self.path.open("a+", encoding="utf-8")
            while (is_ours := _try_lock(stream, fcntl.LOCK_EX)) is False and time.monotonic() < until:
                time.sleep(0.05)
        except OSError as error:
            raise UserError(f"{self.what} cannot be locked: {self.path}: {error.strerror}") from None
        if is_ours is False:
            with stream:
                raise UserError(f"{self.what} is in use by {_text_of(stream)}")
        if is_ours is None:
            self.note = f"{self.what}: its file system has no locks; take care that no other process writes there"
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        self._stream = stream
        return self

    def release(self) -> None:
        """Let others have it. Without effect if it is not held."""
        if self._stream is not None:
            with suppress(OSError):  # the disk may be full or gone
                self._stream.truncate(0)
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class LockHolder(NamedTuple):
    """Who holds a :class:`FileLock`, such as ``process 12 on node7``; certain, unless the file system has no locks."""

    name: str
    certain: bool


def lock_holder(path: Path) -> LockHolder | None:
    """Who holds the :class:`FileLock` on ``path``, by its text where there are no locks; None: nobody."""
    try:
        with path.open(encoding="utf-8") as stream:
            is_free, name = _try_lock(stream, fcntl.LOCK_SH), _text_of(stream)
    except OSError:
        return None
    if is_free is False:
        return LockHolder(name, certain=True)
    owner = re.fullmatch(r"process (\d+) on (.*)", name)
    if is_free or owner is None or (owner[2] == socket.gethostname() and not _is_alive(int(owner[1]))):
        return None
    return LockHolder(name, certain=False)


def _try_lock(stream: TextIO, kind: int) -> bool | None:
    """Whether the lock could be taken; None where the file system has none."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _text_of(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read() or "another process"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # another user's, if it may only not be asked
    return True


def write_file(path: Path, content: str | bytes) -> None:
    """A file whole, in place of the one that may be there. Text becomes UTF-8."""
    with new_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to. Leaving the context makes that file durable and renames it to ``path``."""
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        _open_up(unfinished)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """An empty folder to fill. Leaving the context makes all of it durable and renames it to ``path``.

    Raises:
        OSError: without ``replace``, a folder of that name has appeared; it stays.
    """
    unfinished = unfinished_path(path)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        commit_folder(unfinished, path, replace)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def commit_folder(unfinished: Path, path: Path, replace: bool = True) -> None:
    """Make a filled folder durable and rename it to ``path``; with ``replace``, in place of one that is there."""
    for entry in [*unfinished.rglob("*"), unfinished]:
        if entry.is_file():
            _open_up(entry)
        sync(entry)
    replaced = unfinished_path(path) if replace and path.exists() else None
    if replaced is not None:
        path.rename(replaced)
    try:
        unfinished.rename(path)
    except OSError:
        if replaced is not None:
            replaced.rename(path)
        raise
    sync(path.parent)
    if replaced is not None:  # only now: removing gigabytes takes a while, in which nothing would stand under the name
        shutil.rmtree(replaced)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is gone under its name before the first of its files is."""
    dying = unfinished_path(path)
    path.rename(dying)
    shutil.rmtree(dying)


def remove_unfinished(root: Path) -> None:
    """Remove what killed processes left anywhere below ``root``. Nobody else may be writing there."""
    for path in list(root.rglob(UNFINISHED)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def unfinished_path(path: Path) -> Path:
    """Where to write what becomes ``path`` by a rename: another one every time, so that two processes do not meet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _open_up(file: Path) -> None:
    """Safetensors makes files for their owner alone, whatever the umask says."""
    with suppress(OSError):  # some mounted file systems know no modes
        file.chmod(_MODE)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder where the file system can, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, *_UNSUPPORTED)):
            raise
    finally:
        os.close(descriptor)


def no_room(error: BaseException | None) -> str | None:
    """How an error, or one that it was raised from, says that nothing more can be written; None if it does not."""
    if error is None:
        return None
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    if number in _NO_ROOM:
        return _NO_ROOM[number]
    failures = getattr(error, "failures", None)  # of torch's CheckpointException: by rank, an error and its trace
    parts = [value for value in failures.values() if isinstance(value, tuple)] if isinstance(failures, dict) else []
    inner = {part for value in parts for part in value if isinstance(part, BaseException)}
    return next(filter(None, map(no_room, inner | {error.__cause__, error.__context__})), None)

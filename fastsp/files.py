"""Files and folders that are whole or not there: written beside their place, made durable, given their name at the end.

Whatever stops a process in between, nothing half-written ever stands under the final name, and what stood there before
is still whole. What a killed process leaves behind matches :data:`UNFINISHED`.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsp.errors import UserError

UNFINISHED = ".*.tmp"
os.umask(_umask := os.umask(0o077))  # it can only be read by setting it
_MODE = 0o666 & ~_umask  # of a new file
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here",
}


def read_text(path: Path, name: str | None = None) -> str:
    """The text of a file that a user hands in, without the byte order mark that Windows' editors put first.

    Args:
        path: a file, or what the shell makes of ``<(command)``.
        name: what errors call it; by default the path.

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


def decode_text(content: bytes, name: str) -> str:
    """UTF-8 without a byte order mark, its lines ended by ``\\n``.

    Raises:
        UserError: it is in another encoding; the message says which is likely, and which byte of which line shows it.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            found = "it looks like UTF-16"
        else:
            line = content.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{content[error.start]:02x} in line {line}; it may be cp1252 (Latin-1)"
        raise UserError(f"{name} is not UTF-8 text ({found}): save it as UTF-8") from None


def check_writable(file: Path, force: bool, option: str = "") -> None:
    """See that a command may write a file, before it takes its time.

    Args:
        file: to be written.
        force: it may replace another.
        option: of the command line that names it.

    Raises:
        UserError: a folder is there, or a file and not ``force``.
    """
    name = f"{option} {file}".lstrip()
    if file.is_dir():
        raise UserError(f"{name} is a folder; a file is written there")
    if file.exists() and not force:
        raise UserError(f"{name} is there already; --force replaces it, or choose another name")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole, in place of the one that may be there. Text becomes UTF-8."""
    with new_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to. Leaving the context makes that file durable and renames it to ``path``.

    The path is different every time, so that processes which write the same file do not meet.
    """
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
    """Beside ``path``, another one every time: where to write what becomes ``path`` by a rename."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _open_up(file: Path) -> None:
    """Safetensors makes files for their owner alone, whatever the umask says."""
    with suppress(OSError):  # some mounted file systems know no modes
        file.chmod(_MODE)


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_room(error: BaseException | None) -> str | None:
    """How an error, or one that it was raised from, says that nothing more can be written; None if it does not."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (told := re.search(r"os error (\d+)", str(error))):
            number = int(told[1])
        if number in _NO_ROOM:
            return _NO_ROOM[number]
        failures = getattr(error, "failures", {})  # of torch's CheckpointException: by rank, an error and its trace
        pending += [failure for failure, _ in failures.values()]
        pending += [error.__cause__, error.__context__]
    return None

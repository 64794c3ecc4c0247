"""Files and folders are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from fastsp.errors import UserError
from fastsp.utils import files
from fastsp.utils.files import (
    FileLock,
    LockHolder,
    check_folder_writable,
    check_writable,
    commit_folder,
    lock_holder,
    new_file,
    new_folder,
    no_room,
    read_lines,
    read_text,
    remove_unfinished,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    write_file(file, "ä")
    with pytest.raises(KeyboardInterrupt), new_file(file) as unfinished:
        unfinished.write_text("half")
        assert file.read_bytes() == "ä".encode()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.txt"] and file.read_text() == "ä"
    write_file(file, b"\xff")
    assert file.read_bytes() == b"\xff"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with new_folder(folder) as unfinished:
        (unfinished / "old").write_text("old")
    with pytest.raises(OSError, match="planted"), new_folder(folder) as unfinished:
        (unfinished / "new").write_text("half")
        raise OSError("planted")
    assert names(folder.parent) == ["folder"] and names(folder) == ["old"]
    with new_folder(folder) as unfinished:
        (unfinished / "new").write_text("new")
    assert names(folder.parent) == ["folder"] and names(folder) == ["new"]


def test_the_new_folder_stands_before_the_old_one_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "final"
    with new_folder(folder) as unfinished:
        (unfinished / "old").write_text("old")
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((names(path), names(folder))))
    with new_folder(folder) as unfinished:
        (unfinished / "new").write_text("new")
    assert seen == [(["old"], ["new"])]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "final"
    with new_folder(folder) as unfinished:
        (unfinished / "old").write_text("old")
    monkeypatch.setattr(files, "sync", lambda path: None)
    with pytest.raises(FileNotFoundError):
        commit_folder(tmp_path / "not there", folder)
    assert names(folder) == ["old"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "a"
    with new_file(file) as one, new_file(file) as two:
        one.write_text("one")
        two.write_text("two")
    assert file.read_text() == "one" and names(tmp_path) == ["a"]


def test_what_a_kill_leaves_behind_is_removed(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / ".a.png.0123abcd.tmp").write_text("half")
    (tmp_path / ".step_00000007.0123abcd.tmp").mkdir()
    (tmp_path / ".step_00000007.0123abcd.tmp" / "b").write_text("half")
    (tmp_path / "results.tmp").write_text("mine")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".hidden", "results.tmp"] and not names(tmp_path / ".hidden")


def wrapped() -> BaseException:
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError:
            raise RuntimeError("saving failed")  # noqa: B904 - how libraries do it
    except RuntimeError as error:
        return error


def with_failures(failures: object) -> BaseException:
    error = RuntimeError("of a library")
    error.failures = failures  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (wrapped(), "quota is used up"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (CheckpointException("", {0: (OSError(errno.ENOSPC, ""), None)}), "the disk is full"),  # type: ignore[dict-item]
        (OSError(errno.EACCES, "Permission denied"), None),
        (with_failures({0: object()}), None),  # torchrun's ChildFailedError
        (with_failures({0: (), 1: ("text", OSError(errno.ENOSPC, ""))}), "the disk is full"),
        (with_failures(["text"]), None),
        (ValueError("28"), None),
        (None, None),
    ],
)
def test_errors_that_mean_a_full_disk(error, reason):
    assert no_room(error) is None if reason is None else reason in no_room(error)


def test_files_are_for_whom_the_umask_says(tmp_path):
    """Safetensors makes them for their owner alone."""
    (plain := tmp_path / "plain").write_text("")
    with new_file(tmp_path / "file.safetensors") as unfinished:
        save_file({"x": torch.zeros(1)}, unfinished)
    with new_folder(tmp_path / "folder") as unfinished:
        save_file({"x": torch.zeros(1)}, unfinished / "x.safetensors")
    for file in (tmp_path / "file.safetensors", tmp_path / "folder" / "x.safetensors"):
        assert file.stat().st_mode == plain.stat().st_mode


def test_text_of_any_editor_is_read_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffé one\r\n\r\n two\u2028still two \n".encode())
    assert read_text(file) == "é one\n\n two\u2028still two \n"
    assert read_lines(file) == ["é one", "two\u2028still two"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a\ncafé\n".encode("cp1252"), r"byte 0xe9 in line 2; it may be cp1252 \(Latin-1\)\): save it as UTF-8"),
        (b"\xef\xbb\xbfa\n" + "café\n".encode("cp1252"), "byte 0xe9 in line 2; it may be cp1252"),
        ("a".encode("utf-16"), r"is not UTF-8 text \(it looks like UTF-16\)"),
        (None, "does not exist"),
    ],
)
def test_text_that_cannot_be_read_is_one_line_that_names_the_file(tmp_path, content, told):
    file = tmp_path / "list.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^--prompts .*list\.txt .*{told}"):
        read_text(file, f"--prompts {file}")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder where nothing can be created; its mode would not keep root from it."""
    folder, really_open = tmp_path / "read_only", os.open
    folder.mkdir()

    def refuses(path, flags, *rest):
        if flags & os.O_CREAT and folder in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    return folder


def test_outputs_are_tried_before_the_work(tmp_path, read_only):
    (tmp_path / "file").write_text("precious")
    for good in (tmp_path / "new.png", tmp_path / "a" / "b" / "new.png"):
        check_writable(good, force=False)
        check_folder_writable(good, replaces=True)
    check_writable(tmp_path / "file", force=True)
    for bad in (read_only / "new.png", read_only / "a" / "new.png"):
        with pytest.raises(UserError, match=r"--out .*new\.png cannot be written: .*read_only: Read-only file system"):
            check_writable(bad, False, "--out")
        with pytest.raises(UserError, match="Read-only file system"):
            check_folder_writable(bad)
    with pytest.raises(UserError, match=r"file/a cannot be written: .*file is no folder"):
        check_writable(tmp_path / "file" / "a", force=True)
    with pytest.raises(UserError, match="file is a file; a folder is written there"):
        check_folder_writable(tmp_path / "file")
    (read_only / "old").mkdir()
    with pytest.raises(UserError, match="Read-only"):
        check_folder_writable(read_only / "old", replaces=True)
    with pytest.raises(UserError, match=r"File name too long"):
        check_writable(tmp_path / ("x" * 250), force=False)
    assert names(tmp_path) == ["file", "read_only"]


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request, monkeypatch):
    def refuses(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuses)


def test_a_lock_names_its_holder(tmp_path):
    path = tmp_path / ".lock"
    assert lock_holder(path) is None
    with FileLock(path, 0, "the run") as lock:
        assert lock.note is None
        assert lock_holder(path) == LockHolder(f"process {os.getpid()} on {socket.gethostname()}", certain=True)
        with pytest.raises(UserError, match=f"the run is in use by process {os.getpid()} on "):
            FileLock(path, 0.1, "the run").acquire()
    assert lock_holder(path) is None
    FileLock(path, 0, "the run").acquire().release()
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")  # of one that was killed
    assert lock_holder(path) is None


def test_a_lock_waits_for_its_turn(tmp_path):
    first = FileLock(tmp_path / ".lock", 0, "the rows").acquire()
    timer = threading.Timer(0.2, first.release)
    timer.start()
    with FileLock(tmp_path / ".lock", 30, "the rows"):
        timer.join()


def test_without_locks_the_work_goes_on_with_a_note(tmp_path, no_locks):
    path = tmp_path / ".lock"
    with FileLock(path, 0, "the run") as lock:
        assert "the run: its file system has no locks" in lock.note
        assert lock_holder(path) == LockHolder(f"process {os.getpid()} on {socket.gethostname()}", certain=False)
        FileLock(path, 0, "the run").acquire()
    assert lock_holder(path) is None
    path.write_text(f"process {2**22 + 1} on {socket.gethostname()}")  # more than Linux ever counts to
    assert lock_holder(path) is None
    path.write_text("process 1 on another machine")
    assert lock_holder(path) == LockHolder("process 1 on another machine", certain=False)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Only the names of its files are then less durable. Of a file's content it would be an error."""
    really = os.fsync

    def refuses(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    write_file(tmp_path / "a", "text")
    with new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "b").write_text("text")
    assert names(tmp_path) == ["a", "folder"]

    def fails(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Invalid argument"):
        write_file(tmp_path / "c", "text")

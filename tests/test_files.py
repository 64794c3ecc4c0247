"""Files and folders are whole or not there."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from fastsp import files
from fastsp.errors import UserError
from fastsp.files import (
    commit_folder,
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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (wrapped(), "quota is used up"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (CheckpointException("", {0: (OSError(errno.ENOSPC, ""), None)}), "the disk is full"),  # type: ignore[dict-item]
        (OSError(errno.EACCES, "Permission denied"), None),
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

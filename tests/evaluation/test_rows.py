"""The file of rows: nothing in it is lost, by several processes either."""

from __future__ import annotations

import errno
import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evaluation.runs import row

from fastsp.errors import UserError
from fastsp.evaluation.rows import RowFile


def test_two_evaluations_into_one_file_lose_no_row(tmp_path: Path) -> None:
    """Both have read the file before either writes; then both write again and again, at the same time."""
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([{"mine": "precious"}]))
    files = [RowFile(path) for _ in range(4)]

    def add(number: int) -> None:
        for seed in range(10):
            assert files[number].add(row(f"model{number}", seed, 1.0))
            files[number].add(row("shared", seed, 1.0))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    rows = json.loads(path.read_text())
    assert rows[0] == {"mine": "precious"} and len(rows) == 1 + 4 * 10 + 10, "those of equal question once"
    assert {(found["stage"], found["seed"]) for found in rows[1:]} == {
        (name, seed) for name in ("model0", "model1", "model2", "model3", "shared") for seed in range(10)
    }


def test_without_locks_rows_are_added_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    file = RowFile(tmp_path / "evaluation.json")
    with file.lock() as lock:
        assert "has no locks; take care that no other process writes there" in (lock.note or "")
    assert file.add(row("mse", 0, 1.0)) and not file.add(row("mse", 0, 2.0)) and file.add(row("mse", 1, 1.0))
    assert [found["fid"] for found in json.loads(file.path.read_text())] == [1.0, 1.0]


@pytest.mark.parametrize("content", ["{", '{"thesis": 1}', "[1]"])
def test_what_holds_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match="choose another file"):
        RowFile(path)
    assert path.read_text() == content

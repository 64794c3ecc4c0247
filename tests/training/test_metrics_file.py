"""`metrics.jsonl`: without gap or duplicate over stops, whatever line a kill has torn."""

from __future__ import annotations

import pytest

from fastsp.training.metrics_file import MetricsFile


@pytest.fixture
def metrics(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rows() == []
    for step in range(1, 6):
        file.append({"stage": "mse", "step": step, "global_step": step})
    with file.path.open("a") as stream:
        stream.write('{"stage": "mse", "step": 6, "glob')  # torn by a kill
    return file


def steps(rows):
    return [row["step"] for row in rows]


def test_a_torn_line_is_none_and_the_newest_are_those_before_it(metrics):
    assert steps(metrics.rows()) == [1, 2, 3, 4, 5]
    assert steps(metrics.rows(2)) == [4, 5]


def test_rewinding(metrics):
    metrics.rewind(3)
    metrics.append({"stage": "mse", "step": 4, "global_step": 4})
    assert steps(metrics.rows()) == [1, 2, 3, 4]
    metrics.append({"stage": "sp", "step": 0, "global_step": 4})
    metrics.rewind(4)
    assert steps(metrics.rows()) == [1, 2, 3, 4], "the start of the next stage is written anew"
    metrics.rewind(0)
    assert metrics.path.read_text() == ""

"""The record of bad samples: each named once, by several processes too, and a fraction that means something."""

import json

import pytest

from fastsp.data.bad_samples import BadSampleLog
from fastsp.errors import UserError


def names(path):
    return [json.loads(line)["sample"] for line in path.read_text().splitlines()]


def test_processes_name_a_sample_once(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first, second = BadSampleLog(path, 0.5, 100), BadSampleLog(path, 0.5, 100)
    first.add("a", "empty", 1)
    second.add("b", "empty", 2)
    first.add("b", "empty", 2)
    second.add("a", "empty", 1)
    first.add("ünïcode", "empty", 3)
    second.add("ünïcode", "empty", 3)
    BadSampleLog(path, 0.5, 100).add("a", "empty", 7)
    assert names(path) == ["a", "b", "ünïcode"]
    assert len(first) == 3


def test_a_torn_last_line_does_not_stop_the_next_run(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"sample": "a", "reason": "x", "position": 1}\n{"sample": "b", "rea')
    log = BadSampleLog(path, 0.5, 100)
    log.add("b", "empty", 2)
    assert path.read_text().splitlines()[-1].startswith('{"sample": "b", "reason": "empty"')


@pytest.mark.parametrize("name", ["bad_samples.jsonl", None])
def test_how_many_were_met_is_a_function_of_the_position(tmp_path, name):
    """So that a run which goes on counts as the straight one; a damaged shard, known at once, counts always."""
    path = tmp_path / name if name else None
    log = BadSampleLog(path, 0.5, 100)
    assert log.met_before(1000) == 0
    log.add("shard.tar", "damaged")
    for sample, position in (("a", 0), ("b", 7), ("c", 20)):
        log.add(sample, "empty", position)
    log.add("a", "empty", 30)
    assert [log.met_before(position) for position in (0, 1, 7, 8, 21)] == [1, 2, 2, 3, 4]
    if path is not None:
        again = BadSampleLog(path, 0.5, 100)
        assert again.met_before(8) == 3
        log.add("d", "empty", 25)
        assert again.met_before(26) == 5


def test_the_fraction_is_of_at_least_an_epoch_or_1000_samples():
    log = BadSampleLog(None, 0.01, size=5000)
    log.add("a", "empty")
    log.count(64, 10)  # of 1000 that is 1 %, no more
    with pytest.raises(UserError, match=r"11 of 128 samples.*0\.01.*a \(empty\).*max_bad_fraction higher"):
        log.count(64, 1)
    small = BadSampleLog(None, 0.01, size=100)
    small.add("a", "empty")
    small.count(10, 1)
    with pytest.raises(UserError):
        small.count(10, 1)


def test_after_many_samples_the_fraction_is_theirs():
    log = BadSampleLog(None, 0.01, size=5000)
    log.add("a", "empty")
    for _ in range(100):
        log.count(100, 1)
    with pytest.raises(UserError):
        log.count(100, 2)

"""The record of bad samples: each named once, by several processes too, and a fraction that means something."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastsp.data.bad_samples import EARLY, FEW, BadSampleLog, too_many
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


def deliver(log, positions, size, is_bad):
    """As a source does, one sample a batch; returns the position where the run stops."""
    for position in positions:
        if is_bad(position % size):
            log.add(f"sample {position % size}", "empty", position)
            try:
                log.check()
            except UserError:
                return position
    return None


@pytest.mark.parametrize(
    ("size", "fraction", "allowed"),
    [
        (100_000, 0.01, 1000),
        (1000, 0.01, 10),
        (50, 0.01, FEW),  # of a small folder, one would be 2 %
        (8, 0.01, FEW),
        (3, 0.01, 2),  # but not all of it
        (1, 0.01, 0),
        (50, 0.5, 25),
        (50, 0.0, 0),  # none means none
        (50, 1.0, 50),
    ],
)
def test_how_many_are_too_many(size, fraction, allowed):
    assert not too_many(allowed, size, fraction)
    assert too_many(allowed + 1, size, fraction) or fraction == 1.0


@pytest.mark.parametrize("size", range(2, 100))
def test_one_broken_picture_stops_no_run(size):
    assert deliver(BadSampleLog(None, 0.01, size), range(3 * size), size, lambda index: index == size // 2) is None


def test_the_run_stops_at_the_first_sample_that_is_too_many():
    assert deliver(BadSampleLog(None, 0.01, 50), range(500), 50, lambda index: index >= 40) == 40 + FEW
    assert deliver(BadSampleLog(None, 0.01, 2000), range(2000), 2000, lambda index: index % 40 == 0) == 800
    assert deliver(BadSampleLog(None, 0.01, 2000), range(2000), 2000, lambda index: index < 20) is None


def test_a_large_source_of_which_half_is_bad_stops_early():
    """Such as one whose captions are all missing: 1 % of it would be 100,000 samples."""
    log = BadSampleLog(None, 0.01, 10_000_000)
    assert deliver(log, range(5000), 10_000_000, lambda index: True) == EARLY // 2
    log = BadSampleLog(None, 0.01, 10_000_000)
    assert deliver(log, range(5000), 10_000_000, lambda index: index % 5 < 2) is None
    log = BadSampleLog(None, 0.8, 10_000_000)
    assert deliver(log, range(5000), 10_000_000, lambda index: index % 4 > 0) is None


def test_processes_that_write_at_once_name_a_sample_once(tmp_path):
    """Each looks for the name and writes it under one lock."""
    path, count = tmp_path / "bad_samples.jsonl", 300
    script = (
        "import sys; from pathlib import Path; from fastsp.data.bad_samples import BadSampleLog\n"
        f"log = BadSampleLog(Path(sys.argv[1]), 0.5, {count})\n"
        f"for index in range({count}): log.add(f'sample {{index}}', 'empty', index)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, path]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(names(path)) == sorted(f"sample {index}" for index in range(count))


def test_what_stops_a_run_says_what_to_do(tmp_path):
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 0.01, size=150)
    for position in range(FEW):
        log.add(f"a{position}", "empty", position)
    log.check()
    log.add("b", "not an image", 130)
    with pytest.raises(
        UserError, match=r"6 of 131 samples.*0\.01.*b \(not an image\).*jsonl, .*max_bad_fraction higher"
    ):
        log.check()


def every_fiftieth(index):
    return index % 50 == 0


@pytest.mark.parametrize("sitting", [7, 450, 1000])
def test_a_run_that_goes_on_stops_where_the_straight_one_does(tmp_path, sitting):
    straight = BadSampleLog(tmp_path / "straight.jsonl", 0.01, size=2000)
    expected = deliver(straight, range(2000), 2000, every_fiftieth)
    assert expected == 1000
    for start in range(0, 2000, sitting):
        log = BadSampleLog(tmp_path / "in_sittings.jsonl", 0.01, size=2000)
        ahead = deliver(log, range(start, start + sitting + 40), 2000, every_fiftieth)  # read ahead of the last step
        if ahead is not None:
            break
    assert ahead == expected


def test_the_same_samples_in_every_epoch_count_once(tmp_path):
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 0.02, size=1000)
    assert deliver(log, range(5000), 1000, every_fiftieth) is None
    again = BadSampleLog(tmp_path / "bad_samples.jsonl", 0.02, size=1000)
    assert deliver(again, range(4900, 6000), 1000, lambda index: index % 50 == 0 or index == 400 + 11) == 5411


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_where_a_run_stops_does_not_depend_on_the_number_of_processes(tmp_path, world_size):
    """Each counts what all have met, without a word to the others."""
    logs = [BadSampleLog(tmp_path / "bad_samples.jsonl", 0.01, size=2000) for _ in range(world_size)]
    share = 64 // world_size
    for step in range(31):
        stopped = [
            deliver(log, range(first := 64 * step + share * rank, first + share), 2000, every_fiftieth)
            for rank, log in enumerate(logs)
        ]
        if any(position is not None for position in stopped):
            break
    assert min(position for position in stopped if position is not None) == 1000


def test_one_thread_adds_while_another_asks(tmp_path):
    """The training's progress display asks what the data's threads have met."""
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 1.0, size=1000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            asking = [pool.submit(lambda: [log.met_before(1000) for _ in range(20)]) for _ in range(50)]
            assert deliver(log, range(1000), 1000, lambda index: True) is None
            assert all(found == sorted(found) for found in (future.result() for future in asking))
    finally:
        sys.setswitchinterval(interval)
    assert log.met_before(1000) == 1000 == len((tmp_path / "bad_samples.jsonl").read_text().splitlines())


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 0.5, 100)
    log.add("a", "empty", 1)
    assert names(tmp_path / "bad_samples.jsonl") == ["a"]

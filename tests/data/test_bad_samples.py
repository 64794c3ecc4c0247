"""The record of bad samples: each named once, by several processes too, and a fraction that means something."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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


def deliver(log, positions, size, is_bad):
    """As a source does, one sample a batch; returns the position where the run stops."""
    for position in positions:
        bad = is_bad(position % size)
        if bad:
            log.add(f"sample {position % size}", "empty", position)
        try:
            log.count(1, int(bad))
        except UserError:
            return position
    return None


def test_the_fraction_is_of_at_least_an_epoch_or_1000_samples():
    log = BadSampleLog(None, 0.01, size=5000)
    assert deliver(log, range(1000), 5000, lambda index: index < 19) is None  # 10 +- 3 of 1000 is 1 %
    log = BadSampleLog(None, 0.01, size=5000)
    assert deliver(log, range(1000), 5000, lambda index: index < 20) == 19
    log = BadSampleLog(None, 0.01, size=1500)
    assert deliver(log, range(1000), 1500, lambda index: index < 16) == 15  # more than 1 % of all, whatever comes
    log = BadSampleLog(None, 0.01, size=100)
    assert deliver(log, range(1000), 100, lambda index: index == 3) is None
    log = BadSampleLog(None, 0.01, size=100)
    assert deliver(log, range(1000), 100, lambda index: index in (3, 50)) == 50


def test_in_the_order_of_the_source_the_first_samples_do_not_speak_for_all():
    """As `fastsp encode` reads it: a damaged folder or shard lies in one place."""
    assert deliver(BadSampleLog(None, 0.01, size=6000), range(6000), 6000, lambda index: index < 30) == 19
    log = BadSampleLog(None, 0.01, size=6000, shuffled=False)
    assert deliver(log, range(6000), 6000, lambda index: index < 60) is None
    log = BadSampleLog(None, 0.01, size=6000, shuffled=False)
    assert deliver(log, range(6000), 6000, lambda index: index < 61) == 60


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


def test_after_many_samples_the_fraction_is_theirs():
    log = BadSampleLog(None, 0.01, size=50_000)
    assert deliver(log, range(10_000), 50_000, lambda index: index % 100 == 99) is None
    assert deliver(log, range(10_000, 11_000), 50_000, lambda index: index >= 10_050) == 10_080
    # the 131st of 10,081, where 101 are allowed and 10 is their standard deviation


def test_less_than_the_fraction_is_not_stopped_by_chance():
    """0.9 % bad samples that lie anywhere; of the first 1,000 more than 10 are bad in nearly every third run."""
    size, early = 20_000, 0
    for seed in range(30):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        bad = set(order[: size * 9 // 1000])
        early += sum(index < 1000 for index in bad) > 10
        assert deliver(BadSampleLog(None, 0.01, size), range(size), size, bad.__contains__) is None
    assert early > 4


def test_what_stops_a_run_says_what_to_do(tmp_path):
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 0.01, size=150)
    log.add("a", "empty", 20)
    log.count(64, 1)
    log.add("b", "not an image", 130)
    with pytest.raises(
        UserError, match=r"2 of 131 samples.*0\.01.*b \(not an image\).*jsonl;.*max_bad_fraction higher"
    ):
        log.count(64, 1)


def every_fiftieth(index):
    return index % 50 == 0


@pytest.mark.parametrize("sitting", [7, 450, 1000])
def test_a_run_that_goes_on_stops_where_the_straight_one_does(tmp_path, sitting):
    straight = BadSampleLog(tmp_path / "straight.jsonl", 0.01, size=100_000)
    expected = deliver(straight, range(5000), 100_000, every_fiftieth)
    assert expected == 950
    for start in range(0, 5000, sitting):
        log = BadSampleLog(tmp_path / "in_sittings.jsonl", 0.01, size=100_000)
        ahead = deliver(log, range(start, start + sitting + 40), 100_000, every_fiftieth)  # read ahead of the last step
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
    logs = [BadSampleLog(tmp_path / "bad_samples.jsonl", 0.01, size=100_000) for _ in range(world_size)]
    share = 64 // world_size
    for step in range(100):
        stopped = [
            deliver(log, range(first := 64 * step + share * rank, first + share), 100_000, every_fiftieth)
            for rank, log in enumerate(logs)
        ]
        if any(position is not None for position in stopped):
            break
    assert min(position for position in stopped if position is not None) == 950


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

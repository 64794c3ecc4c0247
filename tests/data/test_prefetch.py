"""Work in a thread: order, errors, and an end that leaves no thread behind."""

import gc
import subprocess
import sys
import threading
import time
from itertools import count

import pytest

from fastsp.data.prefetch import Prefetcher


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_items_in_order_and_then_the_end():
    items = Prefetcher(range(100), 3, "items")
    assert list(items) == list(range(100))
    assert list(items) == [] and not threads("items")


def test_at_most_depth_items_ahead():
    started = []
    items = Prefetcher((started.append(i) or i for i in count()), 2, "ahead")
    time.sleep(0.3)
    assert len(started) == 3  # two wait in the queue, one is held
    items.close()


def test_an_error_reaches_the_reader_after_the_items_before_it():
    def failing():
        yield 1
        raise ValueError("broken")

    items = Prefetcher(failing(), 2, "failing")
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    assert not threads("failing")


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_stops_a_chain_of_threads(taken):
    def outer(inner):
        try:
            yield from inner
        finally:
            inner.close()

    items = Prefetcher(outer(Prefetcher(count(), 2, "chain")), 2, "chain")
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    items.close()
    assert not threads("chain")
    with pytest.raises(StopIteration):
        next(items)


def test_one_that_is_dropped_leaves_no_thread():
    items = Prefetcher(count(), 2, "dropped")
    assert next(items) == 0 and threads("dropped")
    del items
    gc.collect()
    for thread in threads("dropped"):
        thread.join(10)
    assert not threads("dropped")


def test_a_program_that_ends_without_closing_ends_well():
    """A thread that is within a library's code when the interpreter goes would abort it."""
    code = """
import itertools, torch
from fastsp.data.prefetch import Prefetcher
items = Prefetcher((torch.randn(300, 300) @ torch.randn(300, 300) for _ in itertools.count()), 2, "left")
next(items)
print("done")
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")

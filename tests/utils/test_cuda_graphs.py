"""Recording on a GPU is tested with the step (tests/training/test_capture.py); here is what needs none."""

from __future__ import annotations

import gc

import pytest

from fastsp.utils.cuda_graphs import _no_garbage_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_recording(enabled):
    """And afterwards the collector is as it was, whatever happened."""
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(OSError, match="planted"), _no_garbage_collection():
            assert not gc.isenabled()
            raise OSError("planted")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()

"""Times in words."""

import pytest

from fastsp.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (200, "3 min 20 s"), (3840, "1 h 04 min"), (190_800, "2 d 05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""Lets `pytest benchmarks/data` import `benchmarks.data`, which no installation holds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

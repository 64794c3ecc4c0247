"""``python -m fastsp`` and the console script ``fastsp``."""

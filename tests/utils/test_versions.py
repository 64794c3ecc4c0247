"""Versions, also of what runs from its sources."""

import torch

from fastsp.utils.versions import installed_version


def test_versions_of_what_is_there_and_of_what_is_not():
    assert installed_version("torch") == torch.__version__
    assert installed_version("no-such-package-of-ours") == "not installed"

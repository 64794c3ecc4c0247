"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Of a package; "not installed" for what is missing, such as fastsp itself where it runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

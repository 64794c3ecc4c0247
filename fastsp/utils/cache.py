"""Where files that can be made again are kept. No torch: `fastsp doctor` asks too."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from fastsp.errors import UserError
from fastsp.utils.files import check_folder_writable


def cache_folder() -> Path:
    """`$FASTSP_CACHE`, else `~/.cache/fastsp`; a temporary folder where that cannot be written. It need not exist yet.

    A container's user may have a home that is not theirs, or none. A UserError if nothing can be written at all.
    """
    with suppress(RuntimeError):  # no $HOME, and no passwd entry that names a home
        folder = Path(os.environ.get("FASTSP_CACHE") or Path.home() / ".cache" / "fastsp").expanduser()
        if can_be_written(folder):
            return folder
    return temporary_folder()


def compiled_code_folder(chosen: str | None) -> Path:
    """Where ``torch.compile`` is to keep its results: ``chosen`` (`$TORCHINDUCTOR_CACHE_DIR`), else in the cache."""
    return Path(chosen) if chosen and can_be_written(Path(chosen)) else cache_folder() / "inductor"


@cache
def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, which need not exist yet. Asked of the file system once."""
    try:
        check_folder_writable(folder)
    except UserError:
        return False
    return True


@cache
def temporary_folder() -> Path:
    """A folder of this user alone below `$TMPDIR`, else `/tmp`: what is compiled there will be run."""
    try:
        folder = Path(tempfile.gettempdir()) / f"fastsp-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700 and can_be_written(folder):
            return folder
        return Path(tempfile.mkdtemp(prefix="fastsp-"))  # another user's, or one that others may write to
    except OSError as error:
        raise UserError(
            f"no cache can be written, not even a temporary one ({error}): set FASTSP_CACHE to a folder that can"
        ) from None

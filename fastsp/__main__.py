"""``python -m fastsp`` and the console script ``fastsp``: exit codes and one-line errors."""

from __future__ import annotations

import logging
import os
import sys

from fastsp.errors import RunFailed, UserError, install_command

SPIN_COUNT = "10000"


def limit_spinning() -> None:
    """Let OpenMP's threads wait for each other awake for a short time only; call it before torch is imported.

    torch's GNU OpenMP spins 300,000 times at a barrier, some 14 ms, before a thread sleeps. Beside other programs the
    thread that is waited for may have no core, and spinning takes one from it. With far fewer spins threads
    sleep between the operators of a quiet machine too. What the user has set stays. No result depends on it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2, never a traceback."""
    limit_spinning()
    # Notices of the libraries would break our display. The hub's bars stay: a download takes minutes.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # which diffusers imports: kernels for other GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from fastsp.cli import app

        sys.exit(app(standalone_mode=False))
    except UserError as error:
        sys.exit(_fail(str(error)))
    except RunFailed as error:
        _fail(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastsp"):
            raise  # ours to mend: a traceback helps
        command = install_command("train")
        sys.exit(_fail(f"{error.name} is missing: the command line needs more packages than the loss: {command}"))
    except Exception as error:
        from fastsp.utils.files import no_room

        if reason := no_room(error):
            _fail(f"{reason}{f': {file}' if (file := getattr(error, 'filename', None)) else ''}")
            sys.exit(1)
        if reason := _no_memory(error):
            _fail(f"{reason}; do fewer samples at once: --batch-size, or evaluation.batch_size of a run's evaluation")
            sys.exit(1)
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        if hasattr(error, "format_message"):  # the command line's own mistakes, of whichever click typer uses
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "fastsp"
            _fail(f"{error.format_message().rstrip('.')}. See '{command} --help'.")
        sys.exit(code)


def _no_memory(error: Exception) -> str | None:
    """See :func:`fastsp.training.faults.no_memory`; without torch nothing of the kind can have happened."""
    if "torch" not in sys.modules:
        return None
    from fastsp.training.faults import no_memory

    return no_memory(error)


def _fail(message: str) -> int:
    rank = os.environ.get("RANK") or "0"  # of what torchrun starts
    who = "fastsp" if rank == "0" else f"fastsp: rank {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()

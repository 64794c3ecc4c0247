"""Training runs in processes of their own, started in a fraction of a second: forked from one that has imported all.

The server that forks them runs nothing and has one thread; each child is a process like any other, to be signalled and
killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "fastsp.__main__",
        "fastsp.cli",
        "fastsp.data.images.pipeline",
        "fastsp.evaluation.report",
        "fastsp.training.trainer",
    ]
)


@dataclass
class Run:
    """`fastsp ARGUMENTS` in a child."""

    process: BaseProcess
    arguments: list[str]
    said: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the signal's number if it was killed."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.output()}"
        return self.process.exitcode

    def output(self) -> str:
        """What it printed, stderr too."""
        return self.said.read_text() if self.said.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something holds, while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.process.exitcode, f"ended before: {self.output()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)


def start(said: Path, *arguments: object, plant: Callable[[], None] | None = None) -> Run:
    """Start `fastsp ARGUMENTS`; what it prints goes to the file ``said``. ``plant`` is called in the child first."""
    said.unlink(missing_ok=True)
    words = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(target=_fastsp, args=(words, str(said), plant))
    process.start()
    return Run(process, words, said)


def logged_steps(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def metrics(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _fastsp(arguments: list[str], said: str, plant: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    from fastsp.__main__ import main

    if plant is not None:
        plant()
    sys.argv = ["fastsp", *arguments]
    main()

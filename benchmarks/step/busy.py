"""The digits model's MSE step on a quiet CPU and beside busy loops, by how OpenMP's threads wait for each other.

    python benchmarks/step/busy.py [--seconds 3] [--rounds 3] [--loops 0 2 4]

Every setting has a process of its own, since OpenMP reads its variables once. The processes take turns, so that all
meet the same machine. Printed is the median in samples/s and, beside busy loops, its ratio to the fair share of the
quiet median: cores / (cores + loops), at most 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

SETTINGS: dict[str, dict[str, str]] = {
    "torch's default": {"FASTSP_BENCH_UNTOUCHED": "1"},
    "fastsp": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WARM_UP_STEPS = 5


def work() -> None:
    """In a child: for every line of standard input, steps for so many seconds; prints samples/s."""
    if "FASTSP_BENCH_UNTOUCHED" not in os.environ:
        from fastsp.__main__ import limit_spinning

        limit_spinning()
    import torch

    from fastsp.bench.fastsp_step import FastspStep
    from fastsp.bench.workload import default_workload

    step = FastspStep(default_workload(torch.device("cpu")), "mse")
    for _ in range(WARM_UP_STEPS):
        step.step()
    print("ready", flush=True)
    for line in sys.stdin:
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < float(line):
            step.step()
            steps += 1
        print(steps * len(step.batch) / (time.monotonic() - began), flush=True)


@contextmanager
def started(command: list[str], **more):
    process = subprocess.Popen(command, text=True, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 2, 4], help="busy loops beside the step")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="values of GOMP_SPINCOUNT to try as well")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    settings = SETTINGS | {f"{count} spins": {"GOMP_SPINCOUNT": str(count)} for count in arguments.spins}
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    speeds: dict[str, list[float]] = {name: [] for name in settings}
    with ExitStack() as stack:
        children = {}
        for name, variables in settings.items():
            command = [sys.executable, __file__, "--work"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            children[name] = stack.enter_context(started(command, env=clean | variables, **pipes))
            assert children[name].stdout.readline() == "ready\n"
        cores = len(os.sched_getaffinity(0))
        for loops in arguments.loops:
            taken: dict[str, list[float]] = {name: [] for name in settings}
            with ExitStack() as busy:
                for _ in range(loops):
                    busy.enter_context(started([sys.executable, "-c", "while True: pass"]))
                for _ in range(arguments.rounds):
                    for name, child in children.items():
                        print(arguments.seconds, file=child.stdin, flush=True)
                        taken[name].append(float(child.stdout.readline()))
            share = min(1.0, cores / (cores + loops))
            print(f"{loops} busy loops, {cores} cores, load {os.getloadavg()[0]:.1f}; fair share {share:.2f}")
            for name, values in taken.items():
                speeds[name].append(statistics.median(values))
                quiet = speeds[name][0]
                print(
                    f"  {name:16s} {speeds[name][-1]:7.1f} samples/s  {speeds[name][-1] / (quiet * share):5.2f} of it"
                )


if __name__ == "__main__":
    main()

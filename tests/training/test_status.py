"""`fastsp status`: right about a run that trains, that was killed, that is finished, and fast."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training.processes import ROOT, logged_steps, start

from fastsp.errors import UserError
from fastsp.training.status import run_status

ARGUMENTS = [
    "data.batch_size=4",
    "stages=[{name: mse, objective: mse, steps: 40, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 8, learning_rate: 1e-4}]",
    "final=sp",
    "checkpoint.every=5",
    "log.every=1",
    "samples={every: 6, count: 1, steps: 1, prompts: [a handwritten one]}",
    "evaluation.enabled=false",
]


def test_a_run_from_its_start_to_its_end(tmp_path):
    run_dir = tmp_path / "run"
    config = ROOT / "configs" / "quickstart.yaml"
    train = ("train", "--config", config, f"run_dir={run_dir}", *ARGUMENTS, "--resume")
    run = start(tmp_path / "out", *train)
    # Checkpoints are written beside the training: on a busy machine the steps may be ahead of them.
    run.until(lambda: logged_steps(run_dir) >= 7 and (run_dir / "checkpoints" / "step_00000005").is_dir())
    report = (run_dir / "report.html").read_text()
    assert "config.yaml" in report or "stages" in report, "refreshed at the sampling interval"
    status = run_status(run_dir)
    assert status.running and f"process {run.process.pid} on " in status.running and not status.finished
    assert status.next.startswith("wait: it is training")
    run.signal(signal.SIGKILL)
    run.wait()

    status = run_status(run_dir, verify=True)
    assert status.running is None and not status.finished and status.checkpoint_damage is None
    assert (status.stage, status.step, status.stage_steps) in [("mse", step, 40) for step in range(7, 41)]
    assert status.total_steps == 48 and len(status.losses) == 5 and status.seconds_left > 0
    assert status.next == f"fastsp train --config {run_dir}/config.yaml --resume"
    said = "\n".join(status.lines())
    assert "not running" in said and f"checkpoint  {status.checkpoint} is whole" in said and "samples/s" in said
    assert "--resume run_dir=" in run_status(run_dir.rename(tmp_path / "moved")).next
    (tmp_path / "moved").rename(run_dir)

    assert start(tmp_path / "out", *train).wait() == 0
    status = run_status(run_dir)
    assert status.finished and status.global_step == 48 and status.seconds_left == 0
    assert (status.checkpoint, status.checkpoint_step) == ("step_00000048", 48) and "fastsp sample" in status.next

    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(rows[:40]))  # as of a run that was stopped before it logged a step of its last stage
    status = run_status(run_dir)
    assert (status.stage, status.step, status.stage_steps, status.global_step) == ("sp", 8, 8, 48)
    metrics.write_text("".join(rows))
    file = next((run_dir / "checkpoints" / "step_00000048").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert run_status(run_dir).checkpoint_damage is None, "the sizes are right"
    assert "checksum" in run_status(run_dir, verify=True).checkpoint_damage
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged: " in "\n".join(run_status(run_dir).lines())


def test_the_command_needs_no_torch_and_prints_json(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "run_dir: x\ndata: {batch_size: 2}\nstages: [{name: mse, steps: 10}]\nevaluation: {enabled: true}\n"
    )
    rows = [{"stage": "mse", "step": n, "global_step": n, "loss": 1 / n, "samples_per_s": 4.0} for n in (1, 2)]
    rows[0]["loss"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "ms')
    code = "import sys; from fastsp.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "status", str(tmp_path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["losses"] == [None, 0.5] and found["seconds_left"] == 4.0 and found["checkpoint"] is None
    assert found["running"] is None and found["next"].endswith(f"--resume run_dir={tmp_path}")


@pytest.mark.parametrize("text", [None, "", "a: 1", "stages: {"])
def test_what_is_no_run_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="holds no run"):
        run_status(tmp_path)
    with pytest.raises(UserError, match="nowhere holds no run"):
        run_status(Path("/nowhere"))


def test_a_dead_run_is_not_called_running_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuses)
    (tmp_path / "config.yaml").write_text("run_dir: x\ndata: {batch_size: 2}\nstages: [{name: mse, steps: 10}]\n")
    (tmp_path / ".lock").write_text("process 7 on another machine")
    status = run_status(tmp_path)
    assert status.running is None and status.perhaps_running == "process 7 on another machine"
    assert status.next.startswith("make sure that process 7 on another machine has ended; then fastsp train ")
    assert "not known whether process 7 on another machine still runs" in "\n".join(status.lines())
    (tmp_path / ".lock").write_text(f"process {2**22 + 1} on {socket.gethostname()}")
    status = run_status(tmp_path)
    assert status.running is None and status.perhaps_running is None and "--resume" in status.next

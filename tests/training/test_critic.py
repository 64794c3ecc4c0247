"""A critic in the trainer's step: who learns from what, over microbatches and steps, and what a run keeps of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.workloads import tiny_workload
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.test_capture import batch

from fastsp.bench.fastsp_step import build_training_step
from fastsp.config import load_config
from fastsp.errors import UserError
from fastsp.objectives import CriticConfig
from fastsp.training.step import TrainingStep
from fastsp.training.trainer import train

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
CRITIC = CriticConfig(weight=0.5, heads=8, learning_rate=0.01, warmup_steps=2)


def make(critic: CriticConfig | None, microbatch: int | None = None, **settings: Any) -> TrainingStep:
    workload = tiny_workload(4, **settings)
    data = workload.config.data.model_copy(update={"microbatch": microbatch})
    workload = replace(workload, config=workload.config.model_copy(update={"data": data}))
    return build_training_step(workload, "self_perceptual", critic=critic)


def after(step: TrainingStep, steps: int) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    """The network's master weights and the critic's figures after each step on one batch."""
    seen = []
    for number in range(1, steps + 1):
        result = step(batch(1, "cpu"), number)
        weights = {name: value.clone() for name, value in step.optimizer.state.items() if name.startswith("master.")}
        seen.append((weights, [] if result.critic is None else result.critic.tolist()))
    return seen


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_network_feels_the_heads_after_their_warm_up_and_not_before():
    """Bit for bit as without a critic until then, and at weight 0 for good, while the heads learn."""
    plain, silent, felt = (
        after(make(critic), 4) for critic in (None, CRITIC.model_copy(update={"weight": 0.0}), CRITIC)
    )
    assert [same(felt[n][0], plain[n][0]) for n in range(4)] == [True, True, False, False]
    assert all(same(silent[n][0], plain[n][0]) for n in range(4))
    losses = [figures[0] for _, figures in silent]
    assert losses[0] == pytest.approx(0.75 * 0.6931, rel=1e-3), "ln 2 of three samples in four: one is rejected"
    assert losses[0] > losses[1] > losses[2] > losses[3], "the heads learn"
    assert felt[0][1][1:] == [0.5 * 0.75, 0.0]


def test_microbatches_sum_to_the_batch():
    """Figures and the heads' gradients, which the first moments hold, once there are scores."""
    whole, parts = make(CRITIC), make(CRITIC, microbatch=2)
    for (_, ours), (_, theirs) in zip(after(whole, 3), after(parts, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    for name, value in whole.state.items():
        if name.startswith("critic.exp_avg."):
            assert value.norm() > 0 and (parts.state[name] - value).norm() < 1e-2 * value.norm(), name


def test_heads_are_float32_in_bfloat16_too_and_follow_the_run_s_seed():
    first, again, other = (make(CRITIC, precision="bf16") for _ in range(3))
    other.critic.heads.start(1)
    names = [name for name in first.state if name.startswith("critic.master.")]
    assert len(names) == 8 and all(first.state[name].dtype == torch.float32 for name in names)
    assert all(torch.equal(first.state[name], again.state[name]) for name in names)
    assert not all(torch.equal(first.state[name], other.state[name]) for name in names)
    figures = after(first, 4)
    assert all(torch.isfinite(torch.tensor(values)).all() for _, values in figures)


@pytest.mark.parametrize("anchor", ["self_perceptual", "mse"])
def test_a_run_keeps_heads_optimizer_and_figures(tmp_path, anchor):
    config = load_config(
        QUICKSTART,
        [
            f"run_dir={tmp_path}",
            "data.batch_size=4",
            "stages=[{name: mse, objective: mse, steps: 1, learning_rate: 1e-3},"
            "{name: sp, objective: self_perceptual, steps: 4, learning_rate: 1e-3, teacher: split,"
            f" critic: {{weight: 0.1, heads: 8, warmup_steps: 1, anchor: {anchor}}}}}]",
            "validation={every: 4, samples: 4, batch_size: 4}",
            "log.every=1",
            "samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}",
            "evaluation.enabled=false",
        ],
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "critic_gap" in line]
    assert [(row["stage"], row["step"]) for row in rows] == [("sp", step) for step in range(1, 5)]
    assert lines[-1]["validation_self_perceptual"] > 0, "the distance alone"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("critic_accuracy")
    assert [event.value for event in events] == pytest.approx([row["critic_accuracy"] for row in rows])
    assert rows[0]["critic_accuracy"] == 0.5 and all(row["critic_loss"] > 0 for row in rows)
    heads, moments = (load_file(tmp_path / f"stages/sp/critic{end}.safetensors") for end in ("", "_optimizer"))
    (file,) = (tmp_path / "checkpoints/step_00000005").glob("*.safetensors")
    saved = load_file(file)
    assert len(heads) == 8 and all(torch.equal(saved[f"critic.master.{name}"], heads[name]) for name in heads)
    assert all(torch.equal(saved[name], value) for name, value in moments.items())
    assert {name.split(".")[1] for name in moments} == {
        "exp_avg",
        "exp_avg_sq",
        "step_count",
        "skipped",
        "skipped_in_a_row",
    }
    assert not (tmp_path / "stages/mse/critic.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.critic={weight: 0.1}"], "stages.0.critic: only the objective self_perceptual has this key"),
        (["stages.1.critic={}", "data.batch_size=1"], "stages.1.critic: needs a data.batch_size of at least 2"),
        (["stages.1.critic.anchor=none"], "stages.1.critic.anchor: 'none' is not allowed"),
        (["stages.1.critic.weight=-1.0"], "stages.1.critic.weight: -1.0 is not allowed"),
        (["stages.1.critic={}", "stages.1.steps=50"], "stages.1: critic.warmup_steps 100 leaves none of the 50 steps"),
        (
            ["stages.1.critic={anchor: mse}", "stages.1.mse_weight=0.5", "stages.1.distance=mae"],
            "stages.1: critic.anchor 'mse' is the plain MSE, which does not take distance and mse_weight",
        ),
        (["stages.1.critic.size=3"], "stages.1.critic.size: unknown key; allowed: weight, heads"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)

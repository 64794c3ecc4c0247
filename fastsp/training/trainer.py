"""A run from its configuration to `final/`: the stages one after the other, each from where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from fastsp.config import Config, DataConfig
from fastsp.data.source import Source, open_source
from fastsp.diffusion.latents import fingerprint
from fastsp.errors import UserError
from fastsp.generation.checkpoints import initial_model
from fastsp.generation.generate import RAW
from fastsp.models import network_of
from fastsp.models.attention import Kernel
from fastsp.models.lora import load_adapters, save_adapters, save_for_use
from fastsp.objectives import StageConfig
from fastsp.perceptual import shared_copy
from fastsp.perceptual.metric import CALIBRATION_SAMPLES
from fastsp.training import announcements
from fastsp.training.attention_choice import choose_kernel
from fastsp.training.build_step import build_step
from fastsp.training.capture import captured
from fastsp.training.checkpoint import Checkpoint, CheckpointWriter, newest_whole
from fastsp.training.checkpoint_folder import Progress
from fastsp.training.checks import check_machine, check_model
from fastsp.training.compilation import compiler_settings, keep_compiled_code
from fastsp.training.config_changes import check_place
from fastsp.training.distributed import Ranks, check_same_data, process_group
from fastsp.training.faults import explained
from fastsp.training.interrupt import Interrupted, StopRequest
from fastsp.training.monitor import Monitor
from fastsp.training.parallel import whole_network
from fastsp.training.placement import on_device
from fastsp.training.run_directory import RunDirectory
from fastsp.training.samples import SampleDrawer
from fastsp.training.step import StepResult, TrainingStep
from fastsp.training.trackers import Trackers
from fastsp.training.validation import Validation
from fastsp.utils.devices import device_name
from fastsp.utils.files import new_folder, save_tensors
from fastsp.utils.gpu_settings import gpu_settings
from fastsp.utils.launcher import said_once

METRIC = "metric.safetensors"  # in a stage's folder: what its metric learned from the stage's first samples


@record  # for torchrun's summary
def train(
    config: Config,
    resume: bool = False,
    console: Console | None = None,
    *,
    allow_changes: bool = False,
    report: Callable[[Path], object] | None = None,
) -> None:
    """Train all stages of a configuration and write ``final/``.

    Args:
        config: the run's configuration.
        resume: continue the run in ``config.run_dir`` from its newest intact checkpoint.
        console: prints; None: to standard output.
        allow_changes: continue although the configuration has changed.
        report: called with the run directory whenever there are new pictures; it may fail.

    Raises:
        UserError: the run directory cannot be used, or the model or the data cannot be loaded.
        Interrupted: any process received SIGINT or SIGTERM; everything is saved.
        RunFailed: disk or memory is full, or the gradient is not finite again and again.
    """
    with process_group(config.distributed_timeout) as ranks, ExitStack() as stack:
        with said_once():
            config.check_world_size(ranks.world_size)
        with ranks.main_first():
            run, stop = RunDirectory(config, resume, allow_changes, ranks.is_main), StopRequest(ranks.is_main)
            stack.enter_context(explained(run))  # loading the model may already run out of memory
            stack.push(run)
            run.hold()
            trainer = Trainer(config, ranks, run, stop, console or Console(), report)  # fails before writing anything
            # Ranks are named within `stop`, because torchrun sends SIGTERM as soon as one process has ended.
            for context in (run, stop, ranks.naming_the_missing()):
                stack.enter_context(context)
            if run.lock.note is not None:
                trainer.console.print(f"note: {run.lock.note}")
        compiles = config.compiles_on(ranks.device)
        with (
            gpu_settings(config.precision == "bf16", config.deterministic),
            compiler_settings(len(trainer.shapes)) if compiles else nullcontext(),
        ):
            trainer.train(resume)


class Trainer:
    """One process's share of a run. Made and used by :func:`train`."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        run: RunDirectory,
        stop: StopRequest,
        console: Console,
        report: Callable[[Path], object] | None = None,
    ) -> None:
        self.config, self.ranks, self.run, self.stop, self.console = config, ranks, run, stop, console
        self.report = report if ranks.is_main else None
        self.trackers: Trackers | None = None  # of rank 0, while it trains
        self.device = ranks.device
        check_machine(config, self.device)
        if self.device.type == "cuda" or config.compiles_on(self.device):  # Triton's kernels are compiled in any case
            keep_compiled_code()
        self.model = initial_model(config)
        if self.model.kind.is_flow:
            self.config = run.config = config.of_flow()
        check_model(config, self.model, self.device)
        self.model.place(self.device, config.compiles_on(self.device))
        self.source = self._open(config.data, bad_samples_file=run.bad_samples_file)
        buckets = self.source.buckets
        self.shapes = [(config.data.resolution,) * 2] if buckets is None else buckets.shapes
        for shape in self.shapes:
            self.model.latent_shape(shape)
        self.validation = None
        if config.validation.every and config.validation_data is not None:
            held_out = self._open(config.validation_data, shuffle=False, shapes=self.shapes)
            self.validation = Validation(config, held_out, ranks)
        self.inventory = self.source.inventory()
        changed_data = run.check_data(self.inventory)
        share = f", {ranks.world_size} processes ({config.distributed})" if ranks.world_size > 1 else ""
        console.print(
            f"run {run.root}: {len(self.source)} samples of {config.data.source}, "
            f"{announcements.kind(self.model.network)} of {announcements.size(self.model.network)}, "
            f"{config.precision} on {device_name(self.device)}{share}"
        )
        for line in announcements.about(self.model, self.source, config.data.batch_size):
            console.print(line, highlight=False, markup=False)
        if changed_data:
            console.print(f"changed: the data ({changed_data})")

    def _open(self, data: DataConfig, **more: Any) -> Source:
        """A source of the run's model."""
        model, ranks = self.model, self.ranks
        if data.source == "latents":  # which the model's own networks must have made
            more |= {"vae_sha256": fingerprint(model.vae), "text_sha256": model.text_fingerprint()}
        return open_source(
            data,
            tokenizer=model.tokenizer,
            tokenizer_2=model.tokenizer_2,
            tokenizer_3=model.tokenizer_3,
            token_chunks=model.text.token_chunks,
            channels=model.channels,
            seed=self.config.seed,
            device=self.device,
            progress=ranks.is_main,
            **more,
        )

    def train(self, resume: bool) -> None:
        """All stages, then ``final/``."""
        is_main = self.ranks.is_main
        check_same_data(self.inventory, self.ranks)
        checkpoint = self.ranks.broadcast(self._newest_checkpoint() if resume and is_main else None)
        reached = checkpoint.progress.global_step if checkpoint else 0
        kernel: Kernel = "sdpa"
        if is_main:
            rows, say = self._microbatch(), partial(self.console.print, highlight=False)
            self.samples = SampleDrawer(self.model, self.config, self._some_captions(), self.run.samples, rows)
            self.run.keep_changes()
            self.run.keep_data(self.inventory)
            self.run.metrics.rewind(reached)
            file = self.run.attention_file
            kernel = choose_kernel(self.config, self.model, self.shapes, rows, file, self.device, say)
        self.attention = self.ranks.broadcast(kernel)
        with Trackers(self.run, self.config, reached) if is_main else nullcontext() as self.trackers:
            for stage in self.config.stages:
                done = self.config.steps_done(stage, reached)
                if done < stage.steps or not self.run.stage_folder(stage.name).is_dir():
                    self.train_stage(stage, done, checkpoint)
        if is_main:
            self.finish()
        self.ranks.barrier()
        self._stop_if_asked("everything", self.stop.signal_number)

    def train_stage(self, stage: StageConfig, done: int, checkpoint: Checkpoint | None) -> None:
        """One stage, from update ``done`` (from the checkpoint) to the weights in its folder."""
        self.console.print(announcements.headline(stage, done))
        self.console.print(announcements.average(self.config.ema, stage.steps), highlight=False)
        step, ema_network = self._build(stage)
        if done:
            assert checkpoint is not None
            if checkpoint.progress.stage != stage.name:
                raise UserError(f"{self.run.stage_folder(stage.name)} is missing, the weights of a finished stage")
            checkpoint.load_into(step.state)
            step.after_loading()
        else:
            self._calibrate(step, self.config.first_position(stage))
            self._validate(step, ema_network, stage, 0)
            if self.config.samples.every and stage.init is None:
                self._draw(ema_network, stage, 0)  # what the training starts from
        self._take_steps(stage, done, step, ema_network)
        self._finish_stage(stage, step, ema_network)
        self.ranks.barrier()  # the next stage starts from that folder

    def _take_steps(self, stage: StageConfig, done: int, step: TrainingStep, ema_network: Any) -> None:
        """The updates of a stage after the first ``done``, with what is shown and saved between them."""
        config, take_step = self.config, captured(step)
        first, batch_size = config.first_position(stage), config.data.batch_size
        batches = self.source.batches(
            first_position=first + done * batch_size,
            last_position=first + stage.steps * batch_size,
            batch_size=batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        monitor = Monitor(self.trackers, config, stage, done, self.source.bad_samples, self.console)
        writer = CheckpointWriter(self.run.checkpoints, config.checkpoint, config.digest, self.ranks)
        seen: set[tuple[int, ...]] = set()
        with closing(batches), monitor, writer:
            for number, batch in enumerate(monitor.watched(batches), start=done + 1):
                new = batch.image_shapes() - seen
                seen |= new
                with self._preparing(len(new), step):
                    result = take_step(batch.to(self.device), number)
                monitor.after_step(number, result)
                if _due(number, config.samples.every, stage.steps):
                    with monitor.paused():
                        self._draw(ema_network, stage, number)
                if number == stage.steps or _due(number, config.validation.every, stage.steps):
                    with monitor.paused():
                        self._validate(step, ema_network, stage, number)
                stop, failed = self.ranks.exchange([self.stop.signal_number or 0, writer.failed]).amax(0).tolist()
                if stop or self._saves(number, stage, result):
                    with monitor.paused():
                        if self.ranks.is_main:
                            self.run.metrics.sync()
                        writer.save(Progress(stage.name, number, config.steps_before(stage) + number), step.state)
                if stop or failed:
                    writer.wait()
                self._stop_if_asked(f"step {number} of {stage.name}", stop)

    def _calibrate(self, step: TrainingStep, first: int) -> None:
        """Let the stage's metric see the samples from position ``first`` on: each rank its share."""
        if not step.calibration:
            return
        rank, world_size = self.ranks.rank, self.ranks.world_size
        count = max(CALIBRATION_SAMPLES, world_size)
        span = {"first_position": first, "last_position": first + count, "batch_size": count}
        with closing(self.source.batches(**span, rank=rank, world_size=world_size)) as batches:
            step.calibrate(next(batches).to(self.device), self._microbatch())

    def _finish_stage(self, stage: StageConfig, step: TrainingStep, ema_network: Any) -> None:
        """Write the folder of a stage: the average, and in its ``raw/`` the weights themselves. All ranks take part.

        ``ema_network`` holds the raw weights afterwards.
        """
        whole = self._draw(ema_network, stage, stage.steps)
        with new_folder(self.run.stage_folder(stage.name)) if self.ranks.is_main else nullcontext() as unfinished:
            if unfinished is not None:
                self._write_network(whole, unfinished)
                if step.critic is not None:
                    step.critic.save(unfinished)
                if learned := {name: tensor.cpu() for name, tensor in step.calibration.items()}:
                    save_tensors(learned, unfinished / METRIC, {"format": "pt"})
            del whole  # where it was gathered from shards, there may be no room for another one
            step.optimizer.replace_averages()
            raw = whole_network(ema_network, self.ranks)
            if unfinished is not None:
                (unfinished / RAW).mkdir()
                self._write_network(raw, unfinished / RAW)
        self._refresh_report()

    def finish(self) -> None:
        """``final/`` from the chosen stage, and the stages side by side from equal noise. It holds one network."""
        rows: dict[str, list[Image.Image]] = {stage.name: [] for stage in self.config.stages}
        for name in sorted(rows, key=lambda name: name != self.config.final):  # what matters most is written first
            network = self._initial_network(name).to(self.device).eval()
            if name == self.config.final:
                with new_folder(self.run.final) as unfinished:
                    self._write_final(network, unfinished)
                self.console.print(f"{self.run.final} holds the EMA weights of stage {self.config.final}")
                self.console.print("sampling every stage from equal noise, for comparison.png and the trajectories")
            rows[name] = self.samples.row(network)
            self.samples.draw_trajectory(network, name)
            del network
        self.samples.draw_comparison(rows)
        self.console.print(f"{self.run.samples / 'comparison.png'} shows the stages side by side from equal noise")

    @contextmanager
    def _preparing(self, shapes: int, step: TrainingStep) -> Iterator[None]:
        """Around a step: where it has so many shapes that are new in the stage, say why it takes longer than others."""
        if not shapes:
            yield
            return
        for_shapes, first = "", "the first step"
        if len(self.shapes) > 1:
            for_shapes, first = f" for {shapes} of {len(self.shapes)} shapes", "the first step with them"
        if not self.config.compiles_on(self.device):
            if step.traces:
                self.console.print(f"tracing the perceptual network{for_shapes}: {first} takes longer than the others")
            yield
            return
        folder, began = keep_compiled_code(), time.monotonic()
        what = f"{announcements.kind(self.model.network)} and perceptual network{for_shapes}"
        self.console.print(f"compiling {what} ({self.config.compile_mode}); kept in {folder}")
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.console.print(f"compiled; {first} took {time.monotonic() - began:.1f} s")

    def _build(self, stage: StageConfig) -> tuple[TrainingStep, Any]:
        """The step of a stage and the network of its moving average, from the weights of the stage's `init`."""
        model = self.model
        return build_step(
            self.config,
            stage,
            model,
            model.encode_no_prompt(),
            initial=self._initial_network(stage.init),
            frozen_network=self._initial_network(stage.frozen_network) if stage.frozen_network else None,
            ranks=self.ranks,
            attention=self.attention,
        )

    def _microbatch(self) -> int:
        """Samples that go through this process's network at once."""
        return self.config.data.microbatch or self.config.data.batch_size // self.ranks.world_size

    def _initial_network(self, name: str | None) -> Any:
        """The network of a stage or folder; None: the model's own. The adapters of all stages share one base."""
        is_stage = any(stage.name == name for stage in self.config.stages)
        if not is_stage and name in (None, self.config.model.pretrained):
            return shared_copy(self.model.network)
        assert name is not None
        if not is_stage or self.config.model.lora is None:
            return network_of(self.run.stage_folder(name) if is_stage else Path(name))
        network = shared_copy(self.model.network)
        load_adapters(network, self.run.stage_folder(name))
        return network

    def _write_network(self, network: Any, folder: Path) -> None:
        if self.model.base is None:
            network.save_pretrained(folder)
        else:
            save_adapters(network, folder, self.model.base)

    def _write_final(self, network: Any, folder: Path) -> None:
        if self.model.base is None:
            replace(self.model, network=network).save(folder)
        else:
            save_for_use(network, folder, self.model.base, self.model.scheduler, self.model.kind.name)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Find the newest intact checkpoint and print which."""
        for change in self.run.changes:
            self.console.print(f"changed: {change}")
        checkpoint, passed_over = newest_whole(self.run.checkpoints)
        for reason in passed_over:
            self.console.print(f"passed over {reason}")
        if checkpoint is None:
            self.console.print("no checkpoint yet: starting from the beginning")
        else:
            progress = checkpoint.progress
            check_place(self.config, progress)
            self.console.print(f"resuming {checkpoint.folder.name}: step {progress.step} of {progress.stage}")
        return checkpoint

    def _saves(self, number: int, stage: StageConfig, result: StepResult) -> bool:
        """Whether to save after a step. Not between skipped updates, except at a stage's end, so that a run which they
        stop continues from before them."""
        if number == stage.steps:
            return True
        return number % self.config.checkpoint.every == 0 and not int(result.skipped_in_a_row)

    def _draw(self, ema_network: Any, stage: StageConfig, step: int) -> Any:
        """Draw a grid with the averaged weights; returns the whole network on rank 0. All ranks call it: shards."""
        whole = whole_network(ema_network, self.ranks)
        if whole is not None:
            at = "final" if step == stage.steps else f"step_{step:06d}"
            with on_device(whole, self.device):
                picture = self.samples.draw(whole, f"{stage.name}_{at}")
            assert self.trackers is not None
            self.trackers.show(picture, stage.name, self.config.steps_before(stage) + step)
            self._refresh_report()
        return whole

    def _validate(self, step: TrainingStep, ema_network: Any, stage: StageConfig, number: int) -> None:
        """Log the validation's losses after a step, if there is a validation. All ranks take part."""
        if self.validation is None:
            return
        with on_device(ema_network, self.device):
            figures = self.validation.losses(step, ema_network)
        if self.trackers is not None:
            self.trackers.log(figures, stage, number)
        told = ", ".join(f"{name.removeprefix('validation_')} {value:.5g}" for name, value in figures.items())
        self.console.print(f"{stage.name}: validation at step {number}: {told}", highlight=False)

    def _stop_if_asked(self, done: str, signal_number: int | None) -> None:
        if signal_number:
            self.console.print(f"stopped after {done}; continue with --resume")
            raise Interrupted(signal_number)

    def _refresh_report(self) -> None:
        """A failing report does not stop the run; it is mentioned once."""
        try:
            if self.report is not None:
                self.report(self.run.root)
        except Exception as error:
            self.console.print(f"the report is not refreshed any more: {type(error).__name__}: {error}")
            self.report = None

    def _some_captions(self) -> list[str]:
        """Captions of the first samples of the run, for the pictures."""
        count = self.config.samples.count
        with closing(self.source.batches(last_position=count, batch_size=count)) as batches:
            return list(next(batches).captions)


def _due(number: int, every: int, last: int) -> bool:
    """Whether to draw after a step. The last step's grid is drawn when the stage is finished."""
    return number != last and bool(every and number % every == 0)

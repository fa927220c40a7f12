"""The training loop: schedule, data, step, log, checkpoint, in that order."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastjepa import distributed
from fastjepa.checkpoint.checkpointer import Checkpointer
from fastjepa.checkpoint.format import RunState, latest_for_message
from fastjepa.checkpoint.resume import resume
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.data import Batch, ImageDataset, Loader, steps_per_epoch
from fastjepa.engine.base import Engine
from fastjepa.errors import ConfigError, Preempted, TrainingError
from fastjepa.objectives.base import Method, Moment, describe_parts
from fastjepa.optim.schedule import Schedule, set_schedule
from fastjepa.profiling import DEFAULT_STEPS, StepProfile, StepProfiler
from fastjepa.profiling.output import write_report
from fastjepa.profiling.report import Report, format_profile
from fastjepa.run.folder import RunFolder, explain_write_errors
from fastjepa.run.meter import Meter, join
from fastjepa.run.metrics_file import MetricsFile
from fastjepa.run.progress import Progress
from fastjepa.run.skipped_steps import SkippedSteps
from fastjepa.run.stop_request import StopRequest
from fastjepa.run.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Trainer:
    """Trains `engine.model` on `dataset` from the step that the run folder holds to the end of the run.

    Args:
        profile: measure the first steps too, and write what they show into the run folder.

    Raises:
        ConfigError: the data set is smaller than one global batch.
        CheckpointError: the checkpoint to resume from is damaged, of another model, or forbidden (resume: never).
    """

    def __init__(
        self,
        method: Method,
        dataset: ImageDataset,
        engine: Engine,
        sizes: BatchSizes,
        folder: RunFolder,
        *,
        profile: bool = False,
    ) -> None:
        config = method.config
        self.config, self.method, self.dataset = config, method, dataset
        self.engine, self.sizes, self.folder = engine, sizes, folder
        self.is_first_rank = distributed.rank() == 0
        self.steps_per_epoch = steps_per_epoch(len(dataset), config.global_batch_size)
        self.total_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.schedule = Schedule(config.optim, self.steps_per_epoch, self.total_steps)
        self._data = {"images": len(dataset), "fingerprint": dataset.fingerprint}
        self.start_step = resume(config, folder, engine, self._data, self.total_steps)
        self._parts = describe_parts(engine.model.parts, self.method.evaluated)
        self._profile = profile
        self._checkpointer = Checkpointer(
            folder.checkpoints,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            asynchronous=config.async_checkpoint,
        )
        self._skipped = SkippedSteps(config.max_skipped_steps, folder, dataset.name)

    def run(self, stop_request: StopRequest) -> None:
        """Train to the last step; returns at once if the run is complete.

        Raises:
            TrainingError: too many steps in a row had a loss or gradients that were not finite.
            CheckpointError: the last checkpoint could not be written.
            Preempted: SIGTERM or SIGUSR1 came; a checkpoint is written.
        """
        if self.start_step >= self.total_steps:
            logger.info("the run is complete: %d of %d steps", self.start_step, self.total_steps)
            if self._profile:
                logger.info("--profile: no step is left to measure: choose another output_dir, or raise epochs")
            return
        config, engine = self.config, self.engine
        profiler = self._profiler() if self._profile else None
        meter = Meter(engine.device)
        with distributed.share_errors():
            metrics = MetricsFile(self.folder.metrics, self.start_step) if self.is_first_rank else None
        progress = Progress(self.start_step, self.total_steps, enabled=self.is_first_rank)
        engine.model.train()
        with (
            self._watchdog() as watchdog,  # first, to be there while the others end: a save that goes on may hang too
            stop_request.during_training(),
            self._checkpointer,
            self._loader() as loader,
        ):
            batches = profiler.watch(loader) if profiler else iter(loader)
            for step in range(self.start_step, self.total_steps):
                values = self.schedule.at(step)
                set_schedule(engine.param_groups, values)
                scalars = self.method.scalars(Moment(step, self.steps_per_epoch, self.total_steps))
                samples, losses = [], []
                for _ in range(self.sizes.accum):
                    watchdog.at(f"step {step}, waiting for data")
                    batch = self._next(batches, meter)
                    watchdog.at(f"step {step}, training")
                    output = engine.micro_step(batch.prepared)
                    samples.append(batch.sample_ids)
                    losses.append(output.loss)
                    prepared = batch.prepared
                    meter.update(output.loss, output.signals, images=prepared.num_images, counts=prepared.counts)
                self._skipped.note(step, samples, losses, engine.skipped_in_a_row())
                progress.advance()

                done, last = step + 1, step + 1 == self.total_steps
                stopped_by = None if last else stop_request.agreed()
                save_due = done % config.checkpoint_interval == 0 or last or stopped_by is not None
                line_due = done % config.log_interval == 0 or save_due
                skipped = 0
                if line_due or done % config.max_skipped_steps == 0:
                    watchdog.at(f"step {step}, metrics")
                    skipped, problem = self._skipped.look(done)
                    if problem:
                        raise self._not_finite(problem)
                if line_due:
                    line = self._line(done, join(values, scalars), meter)
                    if metrics is not None:
                        line["bad_samples"] = len(loader.bad_samples)
                        metrics.write(line)
                        progress.report(line)
                if save_due and skipped and not last and stopped_by is None:
                    logger.warning("no checkpoint at step %d: its last %d steps were skipped", done, skipped)
                elif save_due:
                    watchdog.at(f"step {step}, checkpoint")
                    self._save(done, last=last or stopped_by is not None)
                    meter.restart_clock()
                if profiler and (profiled := profiler.step_done()):
                    self._report(profiled)
                    meter.restart_clock()
                if stopped_by is not None:
                    raise Preempted(
                        f"{stopped_by}: stopped after step {done}. Start again to go on from the last checkpoint"
                    )
        progress.close()
        if metrics is not None:
            metrics.close()

    def _profiler(self) -> StepProfiler | None:
        """
        Raises:
            ConfigError: the run is too short to measure. What is left of one that goes on may be: it is not held up.
        """
        left, needed = self.total_steps - self.start_step, DEFAULT_STEPS.total
        if left < needed:
            problem = f"--profile: expected {needed} steps or more, but the run has only {left} left"
            if self.start_step:
                logger.warning("%s: not measured", problem)
                return None
            raise ConfigError(f"{problem}: raise epochs")
        with distributed.share_errors(), explain_write_errors(str(self.folder.profile), "Choose another output_dir"):
            self.folder.profile.mkdir(exist_ok=True)
        return StepProfiler(self.engine, self.method, self.sizes, self.folder.profile)

    def _report(self, profiled: StepProfile) -> None:
        if self.is_first_rank:
            write_report(Report("fastjepa/train.py --profile", self.config, profiled), self.folder.profile)
            logger.info("%s\n\n%s", format_profile(profiled), self.folder.profile / "report.html")

    def _loader(self) -> Loader:
        with distributed.share_errors():
            return Loader(
                self.dataset,
                self.config,
                self.method,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                micro_batch_size=self.sizes.micro,
                grad_accum_steps=self.sizes.accum,
                steps_per_epoch=self.steps_per_epoch,
                start_step=self.start_step,
                total_steps=self.total_steps,
                device=self.engine.device,
                bad_samples_file=self.folder.bad_samples,
            )

    @staticmethod
    def _next(batches: Iterator[Batch], meter: Meter) -> Batch:
        asked = time.perf_counter()
        batch = next(batches)
        meter.update_data(time.perf_counter() - asked, batch.seconds._asdict())
        return batch

    def _line(self, done: int, values: dict[str, float], meter: Meter) -> dict[str, Any]:
        """One line of metrics: the means since the last one. Reads the loss back, so only when a line is due."""
        grad_norm = self.engine.grad_norm()
        return join(
            {"step": done, "epoch": done / self.steps_per_epoch},
            values,
            {"grad_norm": grad_norm if math.isfinite(grad_norm) else None},  # JSON has no infinity
            meter.summary(),
            {"skipped_steps": done - self.engine.optimizer.updates},
        )

    def _watchdog(self) -> Watchdog:
        return Watchdog(self.folder.heartbeats, self.config.hang_timeout)

    def _not_finite(self, what: str) -> TrainingError:
        newest = latest_for_message(self.folder.checkpoints)
        return TrainingError(
            f"{what}. Try a lower optim.lr, optim.clip_grad, or precision=fp32. Newest checkpoint: {newest}"
        )

    def _save(self, step: int, *, last: bool) -> None:
        tensors = {id(piece.tensor): piece.tensor for piece in self.engine.pieces()}.values()
        bad = sum(int(not tensor.isfinite().all()) for tensor in tensors)
        if distributed.sum_over_ranks(torch.tensor([float(bad)], device=self.engine.device))[0]:
            raise self._not_finite(f"the weights are not finite after step {step}")
        state = RunState(step, dataclasses.asdict(self.config.resolved()), self._data, self._parts)
        self._checkpointer.save(self.engine, state, last=last)

"""The training loop: rollout, advantages, update, progress, metrics; and checkpoints."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from g2rpo.data.prompts import Prompt, prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import build_grid
from g2rpo.flow.sweep import SweepSettings
from g2rpo.policy.folder import resolve_source
from g2rpo.policy.size import read_size
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardModel
from g2rpo.rewards.registry import load_reward
from g2rpo.stop import Stopped, StoppedAlone, StopRequest
from g2rpo.training.advantages import TransitionAdvantages
from g2rpo.training.batch import TrainingBatch, rollout_advantages, training_batch
from g2rpo.training.batch_sizes import BatchSizes
from g2rpo.training.checkpoint.folder import Progress, writing
from g2rpo.training.checkpoint.load import resume
from g2rpo.training.checkpoint.save import CheckpointWriter
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.collective import (
    RankStatus,
    make_accelerator,
    of_all_ranks,
    raise_on_all_ranks,
    start_trackers,
    sum_over_ranks,
    sync_ranks,
)
from g2rpo.training.config import TrainConfig
from g2rpo.training.continuation import ContinuationPolicy
from g2rpo.training.engine import build_optimizer, build_weights
from g2rpo.training.memory import check_fits
from g2rpo.training.metrics import (
    METRICS_FILE,
    MetricsLog,
    PhaseClock,
    iteration_row,
    iteration_sums,
)
from g2rpo.training.previews import save_previews
from g2rpo.training.rollout import Rollout, RolloutEngine
from g2rpo.training.update import Updater, UpdateStatistics
from g2rpo.training.validation import is_due, validation_rewards


class Trainer:
    """Trains one policy; resumes from the newest sound checkpoint of its run folder.

    Attributes:
        config: the run's configuration.
        run: the run folder (``metrics.jsonl``, ``checkpoints/``).
        progress: iterations done and cost so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        *,
        accelerator: Accelerator | None = None,
        rewards: dict[str, RewardModel] | None = None,
    ) -> None:
        """Loads policy and rewards.

        Args:
            config: the run's configuration.
            run: its folder; made if it is not there.
            accelerator: made from ``config`` by default.
            rewards: reward models to use in place of the configured ones (for one's own).

        Raises:
            UserError: something that the configuration names cannot be found or loaded.
        """
        self.config, self.run = config, run
        self.accelerator = accelerator or make_accelerator(config, run)
        self._check()
        self.prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
        self.weights = build_weights(config, self.accelerator)
        self.policy = self.weights.policy
        self.grid = build_grid(config.grid, self.policy.image_tokens)
        self.sizes = BatchSizes(config.execution, self.policy, run, lambda: self.weights.waits)
        self.engine = self._engine(self._load_rewards() if rewards is None else rewards)
        optimizer = build_optimizer(config.optimization, self.weights.parameters)
        decay = config.optimization.ema_decay
        self.ema = None if decay is None else EMAModel(self.weights.parameters, decay=decay)
        state = TrainingState(config, run, self.weights, optimizer, self.ema)
        self.optimizer, self.checkpoints = optimizer, CheckpointWriter(state)
        # Before a checkpoint is read: the base of the KL is the policy that was not trained yet.
        self.updater = Updater(config, self.weights, optimizer, self.sizes.training)
        background = self.checkpoints.background
        self.progress = resume(state, None if background is None else background.group)
        self.sizes.rollout.lower(self.progress.rollout_micro_batch)
        self.sizes.decode.lower(self.progress.decode_images)
        self.sizes.training.lower(self.progress.training_micro_batch)
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def _check(self) -> None:
        """Refuses what cannot be trained here, before anything is loaded."""
        config, ranks = self.config, self.accelerator.num_processes
        if len(set(of_all_ranks(self.accelerator, str(self.run.resolve())))) > 1:
            raise UserError(
                f"{self.run}: the ranks have different run folders, so their inputs differ; let "
                "them see the same files, and start again once those are all there"
            )
        if config.rollout.prompts_per_iteration % ranks:
            raise UserError(
                f"rollout.prompts_per_iteration {config.rollout.prompts_per_iteration} cannot be "
                f"shared by {ranks} ranks: use a multiple of {ranks}"
            )
        if self.accelerator.device.type == "cuda":
            _, total = torch.cuda.mem_get_info(self.accelerator.device)
            size = read_size(resolve_source(config.policy.source, config.policy.revision))
            check_fits(config, size, ranks, total)

    def _load_rewards(self) -> dict[str, RewardModel]:
        device = self.accelerator.device
        models: dict[str, RewardModel] = {}
        for name, term in self.config.rewards.items():
            models[name] = model = load_reward(term.reward, device)
            if self.config.execution.offload.rewards:
                model.offload()
        return models

    def _engine(self, rewards: dict[str, RewardModel]) -> RolloutEngine:
        config, approximations = self.config, self.config.approximate_rollout
        twin = None if approximations is None else ContinuationPolicy(self.policy, approximations)
        return RolloutEngine(
            policy=self.policy,
            rewards=rewards,
            grid=self.grid,
            settings=SweepSettings(
                diffusion=config.method.diffusion(self.grid.sigmas),
                micro_batch=self.sizes.rollout,
                dtype=torch.float64 if config.policy.dtype == "float64" else torch.float32,
                device=self.accelerator.device,
            ),
            seed=config.seed,
            continuations=twin,
            decode=self.sizes.decode,
            overlap=config.execution.overlap_rewards,
        )

    @property
    def finished(self) -> bool:
        """Whether no iteration is left; the same on all ranks, whose counters are."""
        settings, spent = self.config.optimization, self.progress.device_seconds
        limit = settings.max_device_seconds
        return self.progress.iteration >= settings.iterations or (
            limit is not None and spent >= limit
        )

    @property
    def expected_iterations(self) -> int:
        """Iterations that the run will have, as far as their cost so far tells."""
        settings, progress = self.config.optimization, self.progress
        limit, spent = settings.max_device_seconds, progress.device_seconds
        if limit is None or spent == 0:
            return settings.iterations
        within = math.ceil(progress.iteration * limit / spent)
        return max(progress.iteration, min(settings.iterations, within))

    def save(self) -> None:
        """Writes a checkpoint of the current state (:meth:`CheckpointWriter.save`)."""
        self.checkpoints.save(self.progress)
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def train(self) -> Progress:
        """Runs the iterations that are left and returns the counters.

        Raises:
            UserError: a reward, loss or gradient is not finite, the ratio before an update is
                not 1, or the run folder cannot be written. The last checkpoint stays intact.
            Stopped: on all ranks, where a stop was asked for on any and iterations are left; a
                checkpoint of those that are done has been written.
            StoppedAlone: memory ran out on this rank, which the others wait for.
        """
        self._saved_at = time.monotonic()
        log = self._open_log()
        start_trackers(self.accelerator, self.run, self.progress.iteration)
        try:
            self._iterations(log)
        except StoppedAlone:
            raise
        except Stopped:
            self.accelerator.end_training()
            raise
        except UserError:
            self.checkpoints.finish()  # what was begun before is sound
            raise
        self.accelerator.end_training()
        return self.progress

    def _iterations(self, log: MetricsLog | None) -> None:
        name, shown = f"train {self.config.method.name}", next(iter(self.config.rewards))
        main, done = self.accelerator.is_main_process, self.progress.iteration
        with ProgressReport(name, self.expected_iterations, done=done, enabled=main) as report:
            self._between_iterations()
            while not self.finished:
                save_previews(self.config, self.run, self.weights, self.progress.iteration)
                row = self.iterate() | self.validate()
                self._record(log, row)
                report.expect(self.expected_iterations)
                report.advance(note=f"{shown} {row[f'reward/{shown}/mean']:.4f}")
                self._between_iterations()

    def _open_log(self) -> MetricsLog | None:
        """The first rank's metrics, with a validation before the first iteration."""
        log = None
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if self.accelerator.is_main_process:
                log = MetricsLog(self.run / METRICS_FILE, self.progress.iteration)
        begins = any(of_all_ranks(self.accelerator, log is not None and log.empty))
        first = self.validate() if begins else {}
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if first and log is not None:
                log.append({"iteration": 0, "rollout_evaluations": 0, "seconds": 0.0} | first)
        return log

    def _record(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        """Writes the row of an iteration on the first rank."""
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if log is not None:
                log.append(row)
                values = {k: v for k, v in row.items() if k != "iteration"}
                self.accelerator.log(values, step=row["iteration"])

    def _between_iterations(self) -> None:
        """All ranks together write a checkpoint that is due, or stop.

        Near a time limit SLURM signals the ranks at slightly different moments. Each only notes the
        request (:mod:`g2rpo.stop`); here, between two iterations, all of them agree to save and
        stop, and ``Stopped.resume`` has the batch script requeue the job.
        """
        config, done = self.config.checkpoints, self.progress.iteration
        last = self.finished
        minutes = config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        due = due and self.accelerator.is_main_process  # the ranks' clocks differ
        own = RankStatus(StopRequest.requested(), due, self.checkpoints.written)
        status = sync_ranks(self.accelerator, own)
        wanted = status.due or status.stop is not None or done % config.every == 0 or last
        if wanted and done > self._saved:
            self.save()
        if status.written or status.stop is not None or last:
            self.checkpoints.finish()
        if status.stop is not None and not last:
            raise Stopped(status.stop.text, status.stop.resume)

    def validate(self) -> dict[str, float]:
        """Mean in-domain rewards on the validation prompts, where they are due now.

        Their cost is not part of the run's counters.
        """
        config = self.config.validation
        done = self.progress.iteration
        if config is None or not is_due(config, done, last=self.finished):
            return {}
        return validation_rewards(config, self.engine, self.weights, self.sizes.rollout)

    def local_prompts(self) -> list[Prompt]:
        """This rank's prompts of the coming iteration."""
        chosen = prompts_of_iteration(
            self.prompts,
            self.config.rollout.prompts_per_iteration,
            self.config.seed,
            self.progress.iteration,
        )
        return chosen[self.accelerator.process_index :: self.accelerator.num_processes]

    def iterate(self) -> dict[str, Any]:
        """Runs one iteration and returns its metrics."""
        clock, prompts, iteration = PhaseClock(), self.local_prompts(), self.progress.iteration
        rollout = self.rollout(prompts)
        clock.end("sampling", rollout.sampling_seconds)
        clock.end("scoring")
        advantages = self.advantages(rollout)
        batch = training_batch(rollout, prompts, self.config, advantages)
        updates = self.updater.run(batch, prompts, iteration)
        if self.ema is not None:
            self.ema.step(self.weights.parameters)
        clock.end("training")
        sums = self._count(rollout, batch, updates, clock)
        return self._metrics(sums, updates, advantages)

    def rollout(self, prompts: list[Prompt]) -> Rollout:
        """Draws and scores this rank's samples of the coming iteration."""
        iteration = self.progress.iteration
        tree = self.config.method.rollout_tree(self.config.shape, iteration)
        with raise_on_all_ranks(self.accelerator), self.weights.rollout():
            rollout = self.engine.run(tree, prompts, iteration)
        self.sizes.share(self.accelerator)
        return rollout

    def advantages(self, rollout: Rollout) -> TransitionAdvantages:
        """The advantages of this rank's transitions."""
        accelerator, config = self.accelerator, self.config
        if config.advantage.normalizer != "global_std" or accelerator.num_processes == 1:
            return rollout_advantages(rollout, config)
        # Only this normaliser looks beyond a group: it needs the rewards of all ranks.
        own = {name: rollout.group_rewards(name) for name in config.rewards}
        device = accelerator.device
        every = {name: accelerator.gather(value.to(device)).cpu() for name, value in own.items()}
        found = rollout_advantages(rollout, config, every)
        count = len(rollout.conditioning)
        local = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
        return replace(found, by_step=tuple(values[local] for values in found.by_step))

    def _count(
        self,
        rollout: Rollout,
        batch: TrainingBatch,
        updates: list[UpdateStatistics],
        clock: PhaseClock,
    ) -> dict[str, float]:
        """Advances the counters by an iteration; returns the sums over all ranks."""
        own = iteration_sums(rollout, batch, updates) | {"device_seconds": clock.total}
        own |= {f"seconds/{phase}": seconds for phase, seconds in clock.phases.items()}
        sums = sum_over_ranks(self.accelerator, own)
        approximations = self.config.approximate_rollout
        cached = approximations is not None and approximations.step_cache is not None
        self.progress.advance(sums, step_cache=cached)
        if self.sizes.training.reduced:
            self.progress.training_micro_batch = self.sizes.training.states
        if self.sizes.rollout.reduced:
            self.progress.rollout_micro_batch = self.sizes.rollout.states
        if self.sizes.decode.reduced:
            self.progress.decode_images = self.sizes.decode.states
        return sums

    def _metrics(
        self,
        sums: dict[str, float],
        updates: list[UpdateStatistics],
        advantages: TransitionAdvantages,
    ) -> dict[str, Any]:
        ranks = self.accelerator.num_processes
        groups = advantages.zero_std_groups
        return {
            **{name: value for name, value in vars(self.progress).items() if value is not None},
            "rollout_micro_batch": self.sizes.rollout.states,
            "seconds": self.progress.device_seconds / ranks,
            "learning_rate": self.config.optimization.learning_rate,
            "gradient_norm": updates[-1].gradient_norm,
            "ratio_deviation": updates[0].ratio_deviation,
            **iteration_row(sums, ranks, self.config.rewards),
            **{f"advantage/{name}/zero_std_groups": count for name, count in groups.items()},
        }

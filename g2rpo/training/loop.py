"""The training loop: rollouts, advantages, updates, metrics and checkpoints."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from g2rpo.config import validate
from g2rpo.data.prompts import Prompt, prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import build_grid
from g2rpo.flow.sweep import SweepSettings
from g2rpo.policy.continuation import ContinuationPolicy
from g2rpo.policy.folder import resolve_source
from g2rpo.policy.size import read_size
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardConfig, RewardModel
from g2rpo.rewards.offload import OffloadedReward
from g2rpo.rewards.registry import load_reward
from g2rpo.stop import Stopped, StoppedAlone, StopRequest
from g2rpo.training.advantages import transition_advantages
from g2rpo.training.checkpoint import checkpoints
from g2rpo.training.checkpoint.checkpoints import Progress
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.collective import (
    RankStatus,
    make_accelerator,
    of_all_ranks,
    raise_on_all_ranks,
    sum_over_ranks,
    sync_ranks,
)
from g2rpo.training.config import TrainConfig
from g2rpo.training.engine import build_weights
from g2rpo.training.engine.optimizer import build_optimizer
from g2rpo.training.memory import check_fits
from g2rpo.training.metrics import METRICS_FILE, MetricsLog, PhaseClock, reward_row, reward_sums
from g2rpo.training.previews import save_previews
from g2rpo.training.rollout import Rollout, RolloutEngine
from g2rpo.training.rollout_batch_size import RolloutSizes
from g2rpo.training.transitions import TrainingBatch, collect_transitions
from g2rpo.training.update import Updater, UpdateStatistics
from g2rpo.training.validation import is_due, validation_rewards

logger = logging.getLogger(__name__)


def _check_memory(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuses, before anything is loaded, what cannot fit into this rank's GPU."""
    if accelerator.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(accelerator.device)
        size = read_size(resolve_source(config.policy.source, config.policy.revision))
        check_fits(config, size, accelerator.num_processes, total)


def _load_reward(reward: RewardConfig, config: TrainConfig, device: torch.device) -> RewardModel:
    model = load_reward(reward, device)
    return OffloadedReward(model, device) if config.execution.offload.rewards else model


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
        ranks = self.accelerator.num_processes
        if len(set(of_all_ranks(self.accelerator, str(run.resolve())))) > 1:
            raise UserError(
                f"{run}: the ranks have different run folders, so their inputs differ; let them "
                "see the same files, and start again once those are all there"
            )
        if config.rollout.prompts_per_iteration % ranks:
            raise UserError(
                f"rollout.prompts_per_iteration {config.rollout.prompts_per_iteration} cannot be "
                f"shared by {ranks} ranks: use a multiple of {ranks}"
            )
        self.prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
        _check_memory(config, self.accelerator)
        self.weights = build_weights(config, self.accelerator)
        self.policy = self.weights.policy
        self.grid = build_grid(config.grid, self.policy.image_tokens)
        if rewards is None:
            device = self.accelerator.device
            rewards = {n: _load_reward(r.reward, config, device) for n, r in config.rewards.items()}
        self.sizes = RolloutSizes(
            config.execution.rollout_micro_batch, self.policy, run, lambda: self.weights.waits
        )
        continuations = None
        if config.approximate_rollout is not None:
            continuations = ContinuationPolicy(self.policy, config.approximate_rollout)
        self.engine = RolloutEngine(
            policy=self.policy,
            rewards=rewards,
            grid=self.grid,
            settings=SweepSettings(
                diffusion=config.method.diffusion(self.grid.sigmas),
                micro_batch=self.sizes.velocity,
                dtype=torch.float64 if config.policy.dtype == "float64" else torch.float32,
                device=self.accelerator.device,
            ),
            seed=config.seed,
            continuations=continuations,
            decode=self.sizes.decode,
            overlap=config.execution.overlap_rewards,
        )
        self._prepare()
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def _prepare(self) -> None:
        """Optimiser, average and reference; then whatever a checkpoint restores."""
        self.optimizer = build_optimizer(self.config.optimization, self.weights.parameters)
        self.state = TrainingState(self.config, self.run, self.weights, self.optimizer)
        self.updater = Updater(self.config, self.run, self.weights, self.optimizer, self.grid)
        self.updater.keep_reference()
        self.progress = self.state.resume()
        self.updater.size.restore(self.progress.training_micro_batch)
        self.sizes.restore(self.progress.rollout_micro_batch, self.progress.decode_images)

    @property
    def ema(self) -> EMAModel | None:
        """The running average of the weights, where one is kept."""
        return self.state.ema

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
        """Writes a checkpoint of the current state (:meth:`TrainingState.save`)."""
        self.state.save(self.progress)
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
        main = self.accelerator.is_main_process
        self._saved_at = time.monotonic()
        log = self._open_log()
        if self.config.execution.tensorboard:
            purge = {"tensorboard": {"purge_step": self.progress.iteration + 1}}
            self.accelerator.init_trackers("tensorboard", init_kwargs=purge)
        name = f"train {self.config.method.name}"
        try:
            total, done = self.expected_iterations, self.progress.iteration
            with ProgressReport(name, total, done=done, enabled=main) as report:
                self._between_iterations()
                while not self.finished:
                    save_previews(self.config, self.run, self.weights, self.progress.iteration)
                    row = self.iterate() | self.validate()
                    error = self._record(log, row)
                    report.expect(self.expected_iterations)
                    shown = next(iter(self.config.rewards))
                    report.advance(note=f"{shown} {row[f'reward/{shown}/mean']:.4f}")
                    self._between_iterations(error)
        except StoppedAlone:
            raise
        except Stopped:
            self.accelerator.end_training()
            raise
        except UserError:
            self.state.finish()  # what was begun before is sound
            raise
        self.accelerator.end_training()
        return self.progress

    def _open_log(self) -> MetricsLog | None:
        """The first rank's metrics, with a validation before the first iteration."""
        log, error = None, None
        if self.accelerator.is_main_process:
            try:
                with checkpoints.writing(self.run, METRICS_FILE):
                    log = MetricsLog(self.run / METRICS_FILE, self.progress.iteration)
            except UserError as found:
                error = found
        raise_on_all_ranks(self.accelerator, error)
        begins = any(of_all_ranks(self.accelerator, log is not None and log.empty))
        if begins and (first := self.validate()) and log is not None:
            try:
                with checkpoints.writing(self.run, METRICS_FILE):
                    log.append({"iteration": 0, "rollout_evaluations": 0, "seconds": 0.0} | first)
            except UserError as found:
                error = found
        raise_on_all_ranks(self.accelerator, error)
        return log

    def _record(self, log: MetricsLog | None, row: dict[str, Any]) -> UserError | None:
        """Writes the row; gives what went wrong, which all ranks are to be told."""
        if log is None:
            return None
        try:
            with checkpoints.writing(self.run, METRICS_FILE):
                log.append(row)
                values = {k: v for k, v in row.items() if k != "iteration"}
                self.accelerator.log(values, step=row["iteration"])
        except UserError as error:
            return error
        return None

    def _between_iterations(self, error: UserError | None = None) -> None:
        """All ranks together raise an error, write a checkpoint that is due, or stop."""
        config, done = self.config.checkpoints, self.progress.iteration
        last = self.finished
        minutes = config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        due = due and self.accelerator.is_main_process  # the ranks' clocks differ
        own = RankStatus(error, StopRequest.requested(), due, self.state.written)
        turn = sync_ranks(self.accelerator, own)
        wanted = turn.due or turn.stop is not None or done % config.every == 0 or last
        if wanted and done > self._saved:
            self.save()
        if turn.written or turn.stop is not None or last:
            self.state.finish()
        if turn.stop is not None and not last:
            raise Stopped(turn.stop.text, turn.stop.resume)

    def validate(self) -> dict[str, float]:
        """Mean in-domain rewards on the validation prompts, where they are due now.

        Their cost is not part of the run's counters.
        """
        config = self.config.validation
        done = self.progress.iteration
        if config is None or not is_due(config, done, last=self.finished):
            return {}
        return validation_rewards(config, self.engine, self.weights, self.sizes.velocity)

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
        clock = PhaseClock()
        iteration = self.progress.iteration
        prompts = self.local_prompts()
        rollout = self._rollout(prompts, iteration)
        clock.end("sampling", rollout.sampling_seconds)
        clock.end("scoring")
        batch, zero_std_groups = self.training_batch(rollout, prompts, iteration)
        statistics = self.updater.run(batch, rollout.conditioning, prompts, iteration)
        if self.ema is not None:
            self.ema.step(self.weights.parameters)
        clock.end("training")
        return self._metrics(rollout, batch, statistics, zero_std_groups, clock)

    def _rollout(self, prompts: list[Prompt], iteration: int) -> Rollout:
        tree = self.config.method.rollout_tree(self.config.shape, iteration)
        rollout, message = None, None
        try:
            with self.weights.rollout():
                rollout = self.engine.run(tree, prompts, iteration)
        except UserError as error:
            message = str(error)
        raise_on_all_ranks(self.accelerator, message)
        self.sizes.share(self.accelerator)
        assert rollout is not None
        return rollout

    def training_batch(
        self, rollout: Rollout, prompts: list[Prompt], iteration: int
    ) -> tuple[TrainingBatch, dict[str, int]]:
        """The trained transitions of a rollout with their advantages, and groups without any."""
        config = self.config
        grouped = {name: rollout.group_rewards(name) for name in config.rewards}
        local = slice(0, len(prompts))
        if config.advantage.normalizer == "global_std" and self.accelerator.num_processes > 1:
            # Only this normaliser looks beyond a group: it needs the rewards of all ranks.
            device = self.accelerator.device
            grouped = {
                name: self.accelerator.gather(values.to(device)).cpu()
                for name, values in grouped.items()
            }
            first = self.accelerator.process_index * len(prompts)
            local = slice(first, first + len(prompts))
        weights = {name: reward.weight for name, reward in config.rewards.items()}
        recorded_steps = [step.step for step in rollout.recorded]
        advantages = transition_advantages(
            grouped, weights, rollout.tree.groups, recorded_steps, config.advantage
        )
        trained = [
            [
                config.method.trained_steps(
                    recorded_steps, config.seed, iteration, (prompt.id, sample)
                )
                for sample in range(config.rollout.group_size)
            ]
            for prompt in prompts
        ]
        by_step = [values[local] for values in advantages.by_step]
        return collect_transitions(rollout.recorded, by_step, trained), advantages.zero_std_groups

    def _metrics(
        self,
        rollout: Rollout,
        batch: TrainingBatch,
        statistics: UpdateStatistics,
        zero_std_groups: dict[str, int],
        clock: PhaseClock,
    ) -> dict[str, Any]:
        """Sums over ranks, advances the counters and describes the iteration."""
        ranks = self.accelerator.num_processes
        images = len(rollout.tree.images) * len(rollout.conditioning)
        sums = {
            "rollout_evaluations": rollout.velocity_evaluations,
            "reused_evaluations": rollout.reused_evaluations,
            "training_forwards": statistics.forwards,
            "training_backwards": statistics.backwards,
            "images_scored": images,
            "device_seconds": clock.total,
            "clipped": statistics.clipped,
            "transitions": statistics.transitions,
            "kl": statistics.kl,
            "loss": sum(statistics.losses) / len(statistics.losses),
            "advantage": float(batch.advantage.abs().mean()),
            **{f"seconds/{phase}": seconds for phase, seconds in clock.phases.items()},
        }
        for name in self.config.rewards:
            sums |= reward_sums(rollout, name)
        sums = sum_over_ranks(self.accelerator, sums)
        progress = self.progress
        progress.iteration += 1
        progress.rollout_evaluations += round(sums["rollout_evaluations"])
        progress.training_forwards += round(sums["training_forwards"])
        progress.training_backwards += round(sums["training_backwards"])
        progress.images_scored += round(sums["images_scored"])
        progress.device_seconds += sums["device_seconds"]
        approximations = self.config.approximate_rollout
        if approximations is not None and approximations.step_cache is not None:
            reused = round(sums["reused_evaluations"])
            progress.reused_evaluations = (progress.reused_evaluations or 0) + reused
        if self.updater.size.reduced:
            progress.training_micro_batch = self.updater.size.states
        if self.sizes.velocity.reduced:
            progress.rollout_micro_batch = self.sizes.velocity.states
        if self.sizes.decode.reduced:
            progress.decode_images = self.sizes.decode.states
        row: dict[str, Any] = {
            **{name: value for name, value in vars(progress).items() if value is not None},
            "rollout_micro_batch": self.sizes.velocity.states,
            "seconds": progress.device_seconds / ranks,
            "learning_rate": self.config.optimization.learning_rate,
            "loss": sums["loss"] / ranks,
            "gradient_norm": statistics.gradient_norms[-1],
            "ratio_deviation": statistics.ratio_deviation,
            "clipped_fraction": sums["clipped"] / sums["transitions"],
            "kl": sums["kl"] / sums["transitions"],
            "advantage/absolute_mean": sums["advantage"] / ranks,
            **{f"seconds/{phase}": sums[f"seconds/{phase}"] / ranks for phase in clock.phases},
        }
        for name, count in zero_std_groups.items():
            row[f"advantage/{name}/zero_std_groups"] = count
        for name in self.config.rewards:
            row |= reward_row(sums, name)
        return row


def load_train_config(data: Any, where: str) -> TrainConfig:
    """Builds a :class:`TrainConfig`; :class:`UserError` in one line where it is wrong."""
    return validate(TrainConfig, data, where)

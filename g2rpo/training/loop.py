"""The training loop: rollout, advantages, updates, metrics and checkpoints."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from g2rpo.data.prompts import Prompt, prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import build_grid
from g2rpo.flow.sweep import SweepSettings
from g2rpo.methods.adaptive import rank_correlations, signal_to_noise_ratios, with_newer
from g2rpo.policy.folder import resolve_source
from g2rpo.policy.size import read_size
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardModel
from g2rpo.rewards.registry import check_prompts, load_reward
from g2rpo.stop import Stopped, StoppedAlone, StopRequest
from g2rpo.training.advantages import TransitionAdvantages
from g2rpo.training.batch import TrainingBatch, TransitionBatch, rollout_advantages, training_batch
from g2rpo.training.batch_sizes import BatchSizes
from g2rpo.training.checkpoint.folder import Progress, writing
from g2rpo.training.checkpoint.load import resume
from g2rpo.training.checkpoint.save import CheckpointWriter
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.clock import PhaseClock
from g2rpo.training.collective import (
    make_accelerator,
    of_all_ranks,
    raise_on_all_ranks,
    start_trackers,
    sum_over_ranks,
)
from g2rpo.training.config import TrainConfig
from g2rpo.training.continuation import ContinuationPolicy
from g2rpo.training.counts import most_states_of_update
from g2rpo.training.measuring import measure_agreement, measure_gradients
from g2rpo.training.memory import check_fits
from g2rpo.training.metrics import (
    METRICS_FILE,
    MetricsLog,
    iteration_row,
    iteration_sums,
)
from g2rpo.training.objective import TransitionObjective
from g2rpo.training.old_policy import OldPolicy
from g2rpo.training.previews import save_previews, validation_rewards
from g2rpo.training.rollout import Rollout, RolloutEngine
from g2rpo.training.update import Updater, UpdateStatistics
from g2rpo.training.weights import build_optimizer, build_weights


class Trainer:
    """Trains one policy, resuming from the newest undamaged checkpoint of its run folder.

    Attributes:
        run: the run folder (``metrics.jsonl``, ``checkpoints/``).
        progress: iterations done and their cost.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        *,
        rewards: dict[str, RewardModel] | None = None,
    ) -> None:
        """Loads the policy and the reward models, or takes ``rewards`` in their place.

        Raises:
            UserError: something named in the configuration cannot be found or loaded.
        """
        self.config, self.run = config, run
        self.accelerator = make_accelerator(config, run)
        self._check()
        self.prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
        if rewards is None:
            terms = config.rewards.values()
            check_prompts([t.reward for t in terms], [prompt.text for prompt in self.prompts])
        self.weights = build_weights(config, self.accelerator)
        self.policy = self.weights.policy
        self.grid = build_grid(config.grid, self.policy.image_tokens)
        self.sizes = BatchSizes(config.execution, self.weights, run)
        self.engine = self._engine(self._load_rewards() if rewards is None else rewards)
        optimizer = build_optimizer(config.optimization, self.weights.parameters)
        decay = config.optimization.ema_decay
        # The released warm-up, min((1 + n) / (10 + n), decay), begins with n = 1.
        self.ema = None
        if decay is not None:
            self.ema = EMAModel(self.weights.parameters, decay=decay, update_after_step=-1)
        old = config.old_policy
        self.old = None if old is None else OldPolicy(old, self.weights)
        state = TrainingState(config, run, self.weights, optimizer, self.ema, self.old)
        self.optimizer, self.checkpoints = optimizer, CheckpointWriter(state)
        # Before a checkpoint is read: the KL's reference is the untrained policy.
        self.updater = Updater(config, self.weights, optimizer, self.sizes, self.old)
        self.progress = resume(state, self.checkpoints.group)
        self.sizes.restore(vars(self.progress))
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def _check(self) -> None:
        """Rejects what cannot be trained here before anything is loaded."""
        config, ranks = self.config, self.accelerator.num_processes
        if len(set(of_all_ranks(self.accelerator, str(self.run.resolve())))) > 1:
            raise UserError(
                f"{self.run}: the ranks have different run folders, so their inputs differ; make "
                "the same files visible to all of them and start again"
            )
        if config.rollout.prompts_per_iteration % ranks:
            raise UserError(
                f"rollout.prompts_per_iteration={config.rollout.prompts_per_iteration} is not "
                f"divisible by {ranks} ranks; use a multiple of {ranks}"
            )
        halves = 2 * ranks
        if (
            "signal_to_noise" in config.method.measures(0)
            and config.rollout.prompts_per_iteration % halves
        ):
            raise UserError(
                f"method.adaptive_steps compares the gradients of two halves of the prompts; use a "
                f"multiple of {halves} for rollout.prompts_per_iteration at {ranks} rank(s), not "
                f"{config.rollout.prompts_per_iteration}"
            )
        if isinstance(config.objective, TransitionObjective):
            states = most_states_of_update(config, ranks)
            config.objective.check_micro_batch(states, config.execution.training_micro_batch)
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
                transitions=config.method.transitions(self.grid.sigmas),
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
        """Whether no iteration is left (the same on all ranks, as their counters are)."""
        settings, progress = self.config.optimization, self.progress
        return progress.iteration >= settings.iterations or progress.spent(settings) >= 1

    @property
    def expected_iterations(self) -> int:
        """Iterations that the run will have, estimated from their cost so far."""
        settings, done = self.config.optimization, self.progress.iteration
        spent = self.progress.spent(settings)
        within = math.ceil(done / spent) if spent else settings.iterations
        return max(done, min(settings.iterations, within))

    def save(self) -> None:
        """Writes a checkpoint of the current state (:meth:`CheckpointWriter.save`)."""
        self.checkpoints.save(self.progress)
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def train(self) -> Progress:
        """Runs the remaining iterations and returns the counters.

        Raises:
            UserError: a reward, loss or gradient is not finite, the ratio before the first update
                is not 1, or the run folder cannot be written. The last checkpoint stays intact.
            Stopped: on all ranks, after a checkpoint, if any rank was asked to stop.
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
            self.checkpoints.finish()  # a checkpoint started before the error is sound
            raise
        self.accelerator.end_training()
        return self.progress

    def _iterations(self, log: MetricsLog | None) -> None:
        name, shown = f"train {self.config.title}", next(iter(self.config.rewards))
        main, done = self.accelerator.is_main_process, self.progress.iteration
        with ProgressReport(name, self.expected_iterations, done=done, enabled=main) as report:
            self._between_iterations()
            while not self.finished:
                save_previews(self.config, self.run, self.weights, self.progress.iteration)
                row = self.iterate()
                try:
                    row |= self.validate()
                except UserError:  # a server of rewards may be gone: validates on resume
                    self._record(log, row)
                    self.save()
                    raise
                self._record(log, row)
                report.expect(self.expected_iterations)
                report.advance(note=f"{shown} {row[f'reward/{shown}/mean']:.4f}")
                self._between_iterations()

    def _open_log(self) -> MetricsLog | None:
        """Opens the first rank's metrics; validates at the start, and where a validation failed."""
        log = None
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if self.accelerator.is_main_process:
                log = MetricsLog(self.run / METRICS_FILE, self.progress.iteration)
        missing = any(of_all_ranks(self.accelerator, log is not None and not log.validated))
        found = self.validate() if missing else {}
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if found and log is not None:
                log.add_validation(found)
        return log

    def _record(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        """Writes an iteration's row on the first rank."""
        with raise_on_all_ranks(self.accelerator), writing(self.run, METRICS_FILE):
            if log is not None:
                log.append(row)
                values = {k: v for k, v in row.items() if k != "iteration"}
                self.accelerator.log(values, step=row["iteration"])

    def _between_iterations(self) -> None:
        """Writes a checkpoint if one is due, and stops if asked to, on all ranks together.

        Near a time limit SLURM signals the ranks at slightly different moments. Each only records
        the request (:mod:`g2rpo.stop`); here, between two iterations, all of them agree to save and
        stop. With ``Stopped.resume`` the batch script requeues the job.
        """
        config, done, last = self.config.checkpoints, self.progress.iteration, self.finished
        minutes = config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        due = due and self.accelerator.is_main_process  # the ranks' clocks differ
        own = (StopRequest.requested(), due, self.checkpoints.written)
        stops, dues, written = zip(*of_all_ranks(self.accelerator, own), strict=True)
        # If any rank is to resume, all of them are.
        stop = max(filter(None, stops), key=lambda reason: reason.resume, default=None)
        wanted = any(dues) or stop is not None or done % config.every == 0 or last
        if wanted and done > self._saved:
            self.save()
        if all(written) or stop is not None or last:
            self.checkpoints.finish()
        if stop is not None and not last:
            raise Stopped(stop.text, stop.resume)

    def validate(self) -> dict[str, float]:
        """Mean in-domain rewards on the validation prompts if a validation is due, else nothing.

        Their cost is not part of the run's counters.

        Raises:
            UserError: on all ranks, a reward failed.
        """
        config = self.config.validation
        if config is None or (self.progress.iteration % config.every and not self.finished):
            return {}
        return validation_rewards(config, self.engine, self.weights, self.sizes.rollout)

    def local_prompts(self) -> list[Prompt]:
        """This rank's prompts of the next iteration."""
        chosen = prompts_of_iteration(
            self.prompts,
            self.config.rollout.prompts_per_iteration,
            self.config.seed,
            self.progress.iteration,
        )
        return chosen[self.accelerator.process_index :: self.accelerator.num_processes]

    def iterate(self) -> dict[str, Any]:
        """Runs one iteration and returns its metrics."""
        clock = PhaseClock(self.accelerator.device)
        prompts, iteration = self.local_prompts(), self.progress.iteration
        rollout = self.rollout(prompts)
        clock.end("sampling", rollout.sampling_seconds)
        clock.end("scoring")
        advantages = self.advantages(rollout)
        batch = training_batch(rollout, prompts, self.config, advantages)
        batch, frozen = self.updater.with_frozen(batch)
        measured = self.measure(rollout, batch)
        updates = self.updater.run(batch, prompts, iteration)
        if self.ema is not None:
            self.ema.step(self.weights.parameters)
        if self.old is not None:
            self.old.follow(self.optimizer_steps(iteration + 1))
        clock.end("training")
        twice = self.policy.evaluations_per_velocity
        own = iteration_sums(rollout, batch, updates, [frozen, *measured], clock, twice)
        own |= {
            f"advantage/{name}/zero_std_groups": count
            for name, count in advantages.zero_std_groups.items()
        }
        return self._count(sum_over_ranks(self.accelerator, own), updates)

    def optimizer_steps(self, iterations: int) -> int:
        """Optimizer steps in the first ``iterations`` of an objective on the forward process."""
        return iterations * self.config.optimization.updates_per_iteration

    def rollout(self, prompts: list[Prompt]) -> Rollout:
        """Draws and scores this rank's samples of the next iteration.

        Raises:
            UserError: on all ranks, a reward failed, after a checkpoint of the iterations so far.
        """
        iteration = self.progress.iteration
        method, measurements = self.config.method, self.progress.measurements
        tree = method.rollout_tree(self.config.shape, iteration, measurements)
        old = self.old
        if old is not None and not old.config.makes_rollouts(self.optimizer_steps(iteration)):
            old = None
        try:
            with (
                nullcontext() if old is None else old.in_use(),
                raise_on_all_ranks(self.accelerator),
                self.weights.rollout(),
            ):
                rollout = self.engine.run(tree, prompts, iteration)
        except UserError:  # a server of rewards may be gone: nothing else is lost
            if iteration > self._saved:
                self.save()
            raise
        self.sizes.share_rollout()
        return rollout

    def measure(self, rollout: Rollout, batch: TrainingBatch) -> list[UpdateStatistics]:
        """Measures what the method needs to choose later rollouts, if that is due.

        Returns:
            The forwards and backwards that it took.
        """
        wanted = self.config.method.measures(rollout.iteration)
        found: dict[str, float] = {}
        computed: list[UpdateStatistics] = []
        if "agreement" in wanted:
            found |= sum_over_ranks(self.accelerator, measure_agreement(rollout, self.config))
        if "signal_to_noise" in wanted:
            prompts = self.config.rollout.prompts_per_iteration
            assert isinstance(batch, TransitionBatch)
            gradients, computed = measure_gradients(self.updater, batch, prompts)
            found |= gradients
        if wanted:
            # The ranks' sums agree up to rounding at least; the choice must be the same.
            shared = of_all_ranks(self.accelerator, found)[0]
            self.progress.measurements = with_newer(self.progress.measurements, shared)
        return computed

    def advantages(self, rollout: Rollout) -> TransitionAdvantages:
        """The advantages of this rank's transitions."""
        accelerator, config = self.accelerator, self.config
        if not config.advantage.beyond_groups or accelerator.num_processes == 1:
            return rollout_advantages(rollout, config)
        rewards = {
            name: accelerator.gather(rollout.group_rewards(name).to(accelerator.device)).cpu()
            for name in config.rewards
        }
        advantages = rollout_advantages(rollout, config, rewards)
        rank, count = accelerator.process_index, len(rollout.conditioning)
        local = slice(rank * count, (rank + 1) * count)
        # Those of all ranks, counted on the first one.
        equal = {name: n if rank == 0 else 0 for name, n in advantages.zero_std_groups.items()}
        return TransitionAdvantages(tuple(part[local] for part in advantages.by_step), equal)

    def _count(self, sums: dict[str, float], updates: list[UpdateStatistics]) -> dict[str, Any]:
        """Advances the counters by an iteration and returns its metrics."""
        approximations = self.config.approximate_rollout
        cached = approximations is not None and approximations.step_cache is not None
        self.progress.advance(sums, step_cache=cached)
        vars(self.progress).update(self.sizes.reduced)
        ranks = self.accelerator.num_processes
        counters = {k: v for k, v in vars(self.progress).items() if k != "measurements"}
        measured = self.progress.measurements or {}
        return {
            **{name: value for name, value in counters.items() if value is not None},
            "rollout_micro_batch": self.sizes.rollout.states,
            "seconds": self.progress.device_seconds / ranks,
            "learning_rate": self.config.optimization.learning_rate,
            "gradient_norm": updates[-1].gradient_norm,
            "ratio_deviation": updates[0].ratio_deviation,
            **iteration_row(sums, ranks, self.config.rewards),
            **{k: int(count) for k, count in sums.items() if k.endswith("/zero_std_groups")},
            **{f"signal_to_noise/{k}": v for k, v in signal_to_noise_ratios(measured).items()},
            **{f"agreement/{k[0]}-{k[1]}": v for k, v in rank_correlations(measured).items()},
        }

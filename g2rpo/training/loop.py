"""The training loop: rollouts, advantages, updates, metrics and checkpoints."""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from g2rpo.config import validate
from g2rpo.data.prompts import Prompt, prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.flow.schedule import build_grid
from g2rpo.flow.sweep import SweepSettings
from g2rpo.policy import FluxPolicy
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardModel
from g2rpo.rewards.registry import load_reward
from g2rpo.sampling import sample_ode
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training import checkpoints
from g2rpo.training.advantages import group_advantages, step_advantages
from g2rpo.training.checkpoints import Progress
from g2rpo.training.collective import Turn, decide, raise_together, sum_over_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.metrics import METRICS_FILE, MetricsLog, reward_row, reward_sums
from g2rpo.training.rollout import Rollout, RolloutEngine
from g2rpo.training.transitions import TrainingBatch, collect_transitions
from g2rpo.training.update import Updater, UpdateStatistics

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator for ``config``; ranks come from the launcher's environment.

    Raises:
        UserError: a CUDA device is asked for and none is there.
    """
    device = config.execution.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "execution.device is cuda but no GPU is visible; use execution.device=cpu or auto"
        )
    tracker = "tensorboard" if config.execution.tensorboard else None
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        log_with=tracker,
        project_dir=str(run) if tracker else None,
    )


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
        if config.rollout.prompts_per_iteration % ranks:
            raise UserError(
                f"rollout.prompts_per_iteration {config.rollout.prompts_per_iteration} cannot be "
                f"shared by {ranks} ranks: use a multiple of {ranks}"
            )
        self.prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
        self.policy = FluxPolicy.load(config.policy, self.accelerator.device)
        self.grid = build_grid(config.grid, self.policy.image_tokens)
        if rewards is None:
            device = self.accelerator.device
            rewards = {n: load_reward(r.reward, device) for n, r in config.rewards.items()}
        self.engine = RolloutEngine(
            policy=self.policy,
            rewards=rewards,
            grid=self.grid,
            settings=SweepSettings(
                diffusion=config.method.diffusion(self.grid.sigmas),
                micro_batch=config.execution.rollout_micro_batch,
                dtype=torch.float64 if config.policy.dtype == "float64" else torch.float32,
                device=self.accelerator.device,
            ),
            seed=config.seed,
        )
        self.progress = Progress()
        self._prepare()
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def _prepare(self) -> None:
        """Optimiser, EMA, reference and ranks; then whatever a checkpoint restores."""
        settings = self.config.optimization
        transformer = self.policy.transformer.eval().requires_grad_(True)
        self._named = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self._named],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = EMAModel(
                [parameter for _, parameter in self._named], decay=settings.ema_decay
            )
        self.updater = Updater(
            self.config, self.policy, self.accelerator, self.optimizer, self.grid
        )
        self.updater.keep_reference()
        self._resume()
        # Only the training forward goes through the wrapper that synchronises gradients: rollouts
        # and validations may differ in number between ranks.
        self.updater.policy = copy.copy(self.policy)
        self.updater.policy.transformer = self.accelerator.prepare(transformer)

    def _resume(self) -> None:
        error = None
        if self.accelerator.is_main_process:
            try:
                checkpoints.remove_unfinished(self.run)
            except UserError as found:
                error = found
        raise_together(self.accelerator, error)
        folder = checkpoints.latest_checkpoint(self.run)
        if folder is None:
            return
        self.policy.load_transformer(folder / "transformer")
        checkpoints.load_optimizer(folder / "optimizer.safetensors", self.optimizer, self._named)
        if self.ema is not None:
            tensors = checkpoints.load_tensors(folder / "ema.safetensors")
            device = self.accelerator.device
            self.ema.shadow_params = [tensors[name].to(device) for name, _ in self._named]
            self.ema.optimization_step = int(tensors["optimization_step"])
        self.progress = checkpoints.read_progress(folder)
        logger.info("resuming after iteration %d", self.progress.iteration)

    def save(self) -> None:
        """Writes a checkpoint of the current state, atomically, and deletes what is not kept.

        Raises:
            UserError: on all ranks, where it cannot be written; the last one stays intact.
        """
        error = None
        if self.accelerator.is_main_process:
            folder = checkpoints.checkpoint_folder(self.run, self.progress.iteration)
            try:
                with checkpoints.writing(self.run, f"checkpoint {folder.name}"):
                    self._write_checkpoint(folder)
            except UserError as found:
                error = found
        raise_together(self.accelerator, error)
        self._saved, self._saved_at = self.progress.iteration, time.monotonic()

    def _write_checkpoint(self, folder: Path) -> None:
        with atomic_folder(folder) as temporary:
            self.policy.save_transformer(temporary / "transformer")
            checkpoints.save_optimizer(
                temporary / "optimizer.safetensors", self.optimizer, self._named
            )
            if self.ema is not None:
                self._save_ema(temporary)
            checkpoints.write_state(temporary, self.progress)
        checkpoints.prune(self.run, self.config.checkpoints)

    def _save_ema(self, folder: Path) -> None:
        assert self.ema is not None
        names = [name for name, _ in self._named]
        shadow: dict[str, Any] = dict(zip(names, self.ema.shadow_params, strict=True))
        shadow["optimization_step"] = torch.tensor(self.ema.optimization_step)
        save_file(shadow, folder / "ema.safetensors")
        self.ema.store([parameter for _, parameter in self._named])
        self.ema.copy_to([parameter for _, parameter in self._named])
        try:
            self.policy.save_transformer(folder / "ema_transformer")
        finally:
            self.ema.restore([parameter for _, parameter in self._named])

    def train(self) -> Progress:
        """Runs the iterations that are left and returns the counters.

        Raises:
            UserError: a reward, loss or gradient is not finite, the ratio before an update is
                not 1, or the run folder cannot be written. The last checkpoint stays intact.
            Stopped: on all ranks, where a stop was asked for on any and iterations are left; a
                checkpoint of those that are done has been written.
        """
        total = self.config.optimization.iterations
        main = self.accelerator.is_main_process
        self._saved_at = time.monotonic()
        log = self._open_log()
        if self.config.execution.tensorboard:
            purge = {"tensorboard": {"purge_step": self.progress.iteration + 1}}
            self.accelerator.init_trackers("tensorboard", init_kwargs=purge)
        name = f"train {self.config.method.name}"
        try:
            with ProgressReport(name, total, done=self.progress.iteration, enabled=main) as report:
                self._between_iterations()
                while self.progress.iteration < total:
                    row = self.iterate()
                    error = self._record(log, row)
                    shown = next(iter(self.config.rewards))
                    report.advance(note=f"{shown} {row[f'reward/{shown}/mean']:.4f}")
                    self._between_iterations(error)
        except Stopped:
            self.accelerator.end_training()
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
                if log.empty and (first := self.validate()):
                    start = {"iteration": 0, "rollout_evaluations": 0, "seconds": 0.0}
                    with checkpoints.writing(self.run, METRICS_FILE):
                        log.append(start | first)
            except UserError as found:
                error = found
        raise_together(self.accelerator, error)
        return log

    def _record(self, log: MetricsLog | None, row: dict[str, Any]) -> UserError | None:
        """Validates where that is due and writes the row; gives what went wrong to all ranks."""
        if log is None:
            return None
        try:
            row |= self.validate()
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
        last = done == self.config.optimization.iterations
        minutes = config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        due = due and self.accelerator.is_main_process  # the ranks' clocks differ
        turn = decide(self.accelerator, Turn(error, StopRequest.requested(), due))
        wanted = turn.due or turn.stop is not None or done % config.every == 0 or last
        if wanted and done > self._saved:
            self.save()
        if turn.stop is not None and not last:
            raise Stopped(turn.stop.text, turn.stop.resume)

    def validate(self) -> dict[str, float]:
        """Mean in-domain rewards on the validation prompts, where they are due now.

        Images are by ODE on the training grid. Only the first rank computes them; their cost is
        not part of the run's counters.
        """
        config = self.config.validation
        done, total = self.progress.iteration, self.config.optimization.iterations
        if config is None or not self.accelerator.is_main_process:
            return {}
        if done % config.every and done != total:
            return {}
        prompts = read_prompts(Path(config.file), config.limit)
        micro_batch = self.config.execution.rollout_micro_batch
        images = sample_ode(self.policy, prompts, self.grid, config.seed, micro_batch)
        texts = [prompt.text for prompt in prompts]
        return {
            f"validation/{name}": float(model.score(images, texts).double().mean())
            for name, model in self.engine.rewards.items()
        }

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
        started = time.perf_counter()
        iteration = self.progress.iteration
        prompts = self.local_prompts()
        rollout = self._rollout(prompts, iteration)
        batch, equal_groups = self._training_batch(rollout, prompts, iteration)
        statistics = self.updater.run(batch, rollout.conditioning, prompts, iteration)
        if self.ema is not None:
            self.ema.step([parameter for _, parameter in self._named])
        return self._metrics(rollout, batch, statistics, equal_groups, started)

    def _rollout(self, prompts: list[Prompt], iteration: int) -> Rollout:
        forest = self.config.method.forest(self.config.shape, iteration)
        rollout, message = None, None
        try:
            rollout = self.engine.run(forest, prompts, iteration)
        except UserError as error:
            message = str(error)
        raise_together(self.accelerator, message)
        assert rollout is not None
        return rollout

    def _training_batch(
        self, rollout: Rollout, prompts: list[Prompt], iteration: int
    ) -> tuple[TrainingBatch, dict[str, int]]:
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
        advantages = group_advantages(grouped, weights, config.advantage)
        recorded_steps = [step.step for step in rollout.recorded]
        trained = [
            [
                config.method.trained_steps(
                    recorded_steps, config.seed, iteration, (prompt.id, sample)
                )
                for sample in range(config.rollout.group_size)
            ]
            for prompt in prompts
        ]
        by_step = [
            step_advantages(
                advantages.values[local], rollout.forest.groups, step, config.advantage.clip
            )
            for step in recorded_steps
        ]
        return collect_transitions(rollout.recorded, by_step, trained), advantages.equal_groups

    def _metrics(
        self,
        rollout: Rollout,
        batch: TrainingBatch,
        statistics: UpdateStatistics,
        equal_groups: dict[str, int],
        started: float,
    ) -> dict[str, Any]:
        """Sums over ranks, advances the counters and describes the iteration."""
        ranks = self.accelerator.num_processes
        images = len(rollout.forest.images) * len(rollout.conditioning)
        sums = {
            "rollout_evaluations": rollout.velocity_evaluations,
            "training_forwards": statistics.forwards,
            "training_backwards": statistics.backwards,
            "images_scored": images,
            "device_seconds": time.perf_counter() - started,
            "clipped": statistics.clipped,
            "transitions": statistics.transitions,
            "kl": statistics.kl,
            "loss": sum(statistics.losses) / len(statistics.losses),
            "advantage": float(batch.advantage.abs().mean()),
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
        row: dict[str, Any] = {
            **vars(progress),
            "seconds": progress.device_seconds / ranks,
            "learning_rate": self.config.optimization.learning_rate,
            "loss": sums["loss"] / ranks,
            "gradient_norm": statistics.gradient_norms[-1],
            "ratio_deviation": statistics.ratio_deviation,
            "clipped_fraction": sums["clipped"] / sums["transitions"],
            "kl": sums["kl"] / sums["transitions"],
            "advantage/absolute_mean": sums["advantage"] / ranks,
        }
        for name, count in equal_groups.items():
            row[f"advantage/{name}/equal_groups"] = count
        for name in self.config.rewards:
            row |= reward_row(sums, name)
        return row


def load_train_config(data: Any, where: str) -> TrainConfig:
    """Builds a :class:`TrainConfig`; :class:`UserError` in one line where it is wrong."""
    return validate(TrainConfig, data, where)

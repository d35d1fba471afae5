"""Credit of each stochastic step: explained reward variance and signal-to-noise of the gradient.

Methods with one stochastic step at a time claim better credit assignment: if every step is noisy,
one reward depends on the noise of all of them, yet trains each. Two numbers measure this on the
untrained policy, for every stochastic step k of a method's rollout:

Share of the reward's variance explained by the noise of step k. Two samples of a prompt share only
the noise of step k; the correlation of their rewards is Var(E[R | noise of k]) / Var(R), Sobol's
first-order index, estimated by pick-freeze (Janon et al., ESAIM: Probability and Statistics 18,
2014). Its square root is the correlation of the reward with the best function of that noise. It is
1 if only one step is noisy.

Signal-to-noise ratio of the gradient. Groups are drawn repeatedly for the same prompts; each gives
the gradient of the step's loss. With unbiased estimates of their mean m and s^2 = E|g - m|^2, the
ratio is |m|^2 / s^2. Its inverse is the number of groups to average until signal equals noise.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.checksums import parse_document, write_document
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import credited_to, recorded_steps
from g2rpo.flow.sweep import INITIAL_NOISE, Noise
from g2rpo.methods.base import iterations_by_rollout
from g2rpo.progress import ProgressReport
from g2rpo.stop import StopRequest
from g2rpo.training.batch import TransitionBatch, training_batch
from g2rpo.training.collective import sum_over_ranks
from g2rpo.training.loop import Trainer
from g2rpo.training.measuring import GradientMoments
from g2rpo.training.rollout import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCredit:
    """Measurements of one stochastic step in one rollout of a method.

    Attributes:
        step: index into the grid.
        sigma: noise level at its start.
        explained: for each reward, the share of its variance explained by the step's noise.
        signal: unbiased squared norm of the mean gradient; may be negative.
        noise: mean squared distance of one group's gradient from the mean.
    """

    step: int
    sigma: float
    explained: dict[str, float]
    signal: float
    noise: float

    @property
    def ratio(self) -> float:
        """Signal-to-noise ratio of one group's gradient."""
        return signal_to_noise(self.signal, self.noise)


@dataclass(frozen=True)
class RolloutCredit:
    """Measurements of one rollout of a method.

    Attributes:
        iteration: the training iteration (from 0) with this rollout.
        steps: its stochastic steps, ascending.
        signal: signal of the gradient over all trained steps.
        noise: noise of the gradient over all trained steps.
        velocity_evaluations: NFE of one group.
    """

    iteration: int
    steps: tuple[StepCredit, ...]
    signal: float
    noise: float
    velocity_evaluations: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "RolloutCredit":
        """The inverse of :meth:`document`."""
        steps = tuple(StepCredit(**step) for step in document["steps"])
        return cls(**{**document, "steps": steps})

    @classmethod
    def read(cls, path: Path) -> "RolloutCredit | None":
        """Reads a saved :meth:`document`; None if it is missing or damaged."""
        try:
            return cls.of(parse_document(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged (%s); measuring it again", path, error)
            return None

    @property
    def ratio(self) -> float:
        """Signal-to-noise ratio of one group's gradient over all trained steps."""
        return signal_to_noise(self.signal, self.noise)


def signal_to_noise(signal: float, noise: float) -> float:
    """``signal / noise``; 0 if both are 0."""
    return signal / noise if noise > 0 else 0.0 if signal == 0 else math.inf


def distinct_rollouts(trainer: Trainer, most: int) -> list[int]:
    """The first iteration of each distinct rollout; at most ``most``, evenly spaced."""
    firsts = list(iterations_by_rollout(trainer.config.method, trainer.config.shape))
    if len(firsts) <= most:
        return firsts
    return [firsts[round(place * (len(firsts) - 1) / max(1, most - 1))] for place in range(most)]


def measure_credit(trainer: Trainer, config: CreditConfig, folder: Path) -> list[RolloutCredit]:
    """Measures a method on the trainer's policy and first prompts; the weights do not change.

    Measured rollouts are saved in ``folder`` and kept when the measurement is resumed.

    Raises:
        UserError: a reward is not finite.
        Stopped: a stop was requested; the rollouts measured so far are kept.
    """
    prompts = trainer.local_prompts()
    iterations = distinct_rollouts(trainer, config.rollouts)
    files = {iteration: folder / f"rollout-{iteration:06d}.json" for iteration in iterations}
    done = {iteration: RolloutCredit.read(path) for iteration, path in files.items()}
    measured = {iteration: credit for iteration, credit in done.items() if credit is not None}
    left = [iteration for iteration in iterations if iteration not in measured]
    name = f"credit {trainer.config.method.name}"
    main = trainer.accelerator.is_main_process
    with ProgressReport(name, len(left) * (1 + config.repeats), enabled=main) as report:
        for iteration in left:
            explained = explained_shares(trainer, prompts, iteration, config.samples)
            report.advance()
            credit = _gradients(trainer, prompts, iteration, config.repeats, explained, report)
            if main:
                write_document(files[iteration], credit.document())
            measured[iteration] = credit
    return [measured[iteration] for iteration in iterations]


# --- the share of the reward's variance ----------------------------------------------------------


def explained_shares(
    trainer: Trainer, prompts: Sequence[Prompt], iteration: int, samples: int
) -> dict[int, dict[str, float]]:
    """For each stochastic step and reward, the share of variance explained by the step's noise."""
    method, shape = trainer.config.method, replace(trainer.config.shape, group_size=samples)
    tree = method.rollout_tree(shape, iteration)
    own = trainer.engine.noise(prompts, iteration)
    starts = {s.sample for s in tree.states if s.parent is None}
    shares: dict[int, dict[str, float]] = {}
    with trainer.weights.rollout():
        first = trainer.engine.run(tree, prompts, iteration, own)
        for step in recorded_steps(tree):
            other = _sharing(own, step, samples, same_start=len(starts) == 1)
            second = trainer.engine.run(credited_to(tree, step), prompts, iteration, other)
            shares[step] = {
                name: _correlation(
                    trainer, _credited(first, name, step), _credited(second, name, step)
                )
                for name in trainer.config.rewards
            }
    return shares


def _sharing(own: Noise, shared: int, samples: int, *, same_start: bool) -> Noise:
    """New noise, except at step ``shared`` and at a start shared by the whole group."""

    def noise(prompt: int, sample: int, step: int) -> Tensor:
        kept = step == shared or (step == INITIAL_NOISE and same_start)
        return own(prompt, sample if kept else sample + samples, step)

    return noise


def _credited(rollout: Rollout, name: str, step: int) -> Tensor:
    """Mean reward over the groups that credit ``step``, [P, samples] float64."""
    groups = rollout.tree.groups
    places = [place for place, group in enumerate(groups) if group.step in (None, step)]
    return rollout.group_rewards(name)[:, places].double().mean(dim=1)


def _correlation(trainer: Trainer, first: Tensor, second: Tensor) -> float:
    """Correlation of paired rewards within prompts, with their variances pooled."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (first, second))
    sums = {"together": float((a * b).sum()), "own": float(((a**2 + b**2) / 2).sum())}
    total = sum_over_ranks(trainer.accelerator, sums)
    return total["together"] / total["own"] if total["own"] > 0 else 0.0


# --- the gradient --------------------------------------------------------------------------------


def _gradients(
    trainer: Trainer,
    prompts: list[Prompt],
    iteration: int,
    repeats: int,
    explained: dict[int, dict[str, float]],
    report: ProgressReport,
) -> RolloutCredit:
    tree = trainer.config.method.rollout_tree(trainer.config.shape, iteration)
    steps = recorded_steps(tree)
    moments = {step: GradientMoments() for step in steps}
    everything = GradientMoments()
    for repeat in range(repeats):
        # An iteration number that no rollout has, so the noise is new.
        number = trainer.config.optimization.iterations + repeat
        with trainer.weights.rollout():
            rollout = trainer.engine.run(tree, prompts, number)
        parts = step_gradients(trainer, rollout, prompts)
        for step, (_, gradient) in parts.items():
            moments[step].add(gradient)
        everything.add(joined_gradient(parts))
        report.advance()
        StopRequest.obey()
    sigmas = trainer.grid.sigmas
    by_step = tuple(
        StepCredit(step, sigmas[step], explained[step], moments[step].signal, moments[step].noise)
        for step in steps
    )
    return RolloutCredit(
        iteration, by_step, everything.signal, everything.noise, tree.velocity_evaluations
    )


def step_gradients(
    trainer: Trainer, rollout: Rollout, prompts: list[Prompt]
) -> dict[int, tuple[int, list[Tensor]]]:
    """For each step, its number of trained transitions and the gradient of their mean loss."""
    trained = training_batch(rollout, prompts, trainer.config, trainer.advantages(rollout))
    if not isinstance(trained, TransitionBatch):
        raise UserError("credit compares stochastic steps; leave out cells that train on images")
    batch, _ = trainer.updater.with_frozen(trained)
    step_of = torch.tensor(batch.steps)[batch.state_of]
    gradients = {}
    for step in sorted(set(batch.steps)):
        members = torch.nonzero(step_of == step).flatten()
        gradients[step] = len(members), trainer.updater.gradient(batch.update(members))[1]
    return gradients


def joined_gradient(parts: dict[int, tuple[int, list[Tensor]]]) -> list[Tensor]:
    """The gradient of the mean loss over all transitions, from the gradients of the steps."""
    total = sum(count for count, _ in parts.values())
    weighted = [[count / total * part for part in gradient] for count, gradient in parts.values()]
    return [torch.stack(list(same)).sum(dim=0) for same in zip(*weighted, strict=True)]

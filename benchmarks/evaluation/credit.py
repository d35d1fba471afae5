"""Which step's noise the reward is owed to, and how clearly a step's gradient says so.

The claim behind stochasticity at one step at a time is about credit: where every step is noisy,
one reward is the doing of all of their noises, and each step is trained with all of it. Two numbers
say how much of that there is, for every stochastic step k of a method's rollout, on the untrained
policy:

Share of the reward's variance that the noise of step k explains. Two samples of a prompt share the
noise of step k and nothing else that is drawn for a sample; the correlation of their rewards is
Var(E[R | noise of k]) / Var(R), the first-order index of Sobol, estimated by pick-freeze (Janon et
al., ESAIM: Probability and Statistics 18, 2014). Its square root is the correlation of the reward
with the best function of that noise. With noise at one step alone it is 1.

Signal-to-noise ratio of the gradient. For the same prompts, groups are drawn again and again; each
gives the gradient of the step's loss. With their mean m and s^2 = E|g - m|^2, both without bias,
the ratio is |m|^2 / s^2. Its inverse is how many groups must be averaged until signal equals noise.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.checksums import parse_document, write_document
from g2rpo.data.prompts import Prompt
from g2rpo.flow.rollout_tree import credited_to, recorded_steps
from g2rpo.flow.sweep import INITIAL_NOISE, Noise
from g2rpo.methods.base import iterations_by_rollout
from g2rpo.progress import ProgressReport
from g2rpo.stop import StopRequest
from g2rpo.training.batch import training_batch
from g2rpo.training.collective import sum_over_ranks
from g2rpo.training.loop import Trainer
from g2rpo.training.rollout import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCredit:
    """What was measured of one stochastic step in one rollout of a method.

    Attributes:
        step: index into the grid.
        sigma: noise level at its start.
        explained: for each reward, the share of its variance that the step's noise explains.
        signal: squared length of the mean gradient, without bias, so it may be below 0.
        noise: mean squared distance of one group's gradient from it.
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
    """What was measured of one rollout of a method.

    Attributes:
        iteration: the training iteration (from 0) that has this rollout.
        steps: its stochastic steps, ascending.
        signal: as for a step, of the gradient over all trained steps.
        noise: as for a step, of the gradient over all trained steps.
        velocity_evaluations: of one group.
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
        """What :meth:`document` gave."""
        steps = tuple(StepCredit(**step) for step in document["steps"])
        return cls(**{**document, "steps": steps})

    @classmethod
    def read(cls, path: Path) -> "RolloutCredit | None":
        """What was kept as :meth:`document`; None where there is nothing, or it is damaged."""
        try:
            return cls.of(parse_document(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); it is measured again", path, error)
            return None

    @property
    def ratio(self) -> float:
        """Signal-to-noise ratio of one group's gradient over all trained steps."""
        return signal_to_noise(self.signal, self.noise)


def signal_to_noise(signal: float, noise: float) -> float:
    """Their ratio; 0 where there is neither."""
    return signal / noise if noise > 0 else 0.0 if signal == 0 else math.inf


def distinct_rollouts(trainer: Trainer, most: int) -> list[int]:
    """Iterations with different rollouts, the first of each; at most ``most``, evenly chosen."""
    found = list(iterations_by_rollout(trainer.config.method, trainer.config.shape))
    if len(found) <= most:
        return found
    return [found[round(place * (len(found) - 1) / max(1, most - 1))] for place in range(most)]


def measure_credit(trainer: Trainer, config: CreditConfig, folder: Path) -> list[RolloutCredit]:
    """Measures a method on the policy that ``trainer`` holds; its weights are left as they are.

    The prompts are those of its first iteration. Each rollout is kept in ``folder``, of this
    measurement alone, and not measured again.

    Raises:
        UserError: a reward is not finite.
        Stopped: the process was asked to stop; the rollouts that were measured are kept.
    """
    prompts = trainer.local_prompts()
    iterations = distinct_rollouts(trainer, config.rollouts)
    files = {iteration: folder / f"rollout-{iteration:06d}.json" for iteration in iterations}
    kept = {iteration: RolloutCredit.read(path) for iteration, path in files.items()}
    found = {iteration: credit for iteration, credit in kept.items() if credit is not None}
    left = [iteration for iteration in iterations if iteration not in found]
    name = f"credit {trainer.config.method.name}"
    main = trainer.accelerator.is_main_process
    with ProgressReport(name, len(left) * (1 + config.repeats), enabled=main) as report:
        for iteration in left:
            explained = explained_shares(trainer, prompts, iteration, config.samples)
            report.advance()
            measured = _gradients(trainer, prompts, iteration, config.repeats, explained, report)
            if main:
                write_document(files[iteration], measured.document())
            found[iteration] = measured
    return [found[iteration] for iteration in iterations]


# --- the share of the reward's variance ----------------------------------------------------------


def explained_shares(
    trainer: Trainer, prompts: Sequence[Prompt], iteration: int, samples: int
) -> dict[int, dict[str, float]]:
    """For each stochastic step and reward: the share of variance that the step's noise explains."""
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
    """Fresh noise, but for step ``shared`` and for a start that a whole group has in common."""

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
    """Of the rewards of pairs, within prompts; their spread, the same in law, is pooled."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (first, second))
    sums = {"together": float((a * b).sum()), "own": float(((a**2 + b**2) / 2).sum())}
    total = sum_over_ranks(trainer.accelerator, sums)
    return total["together"] / total["own"] if total["own"] > 0 else 0.0


# --- the gradient --------------------------------------------------------------------------------


@dataclass
class GradientMoments:
    """Running sums of gradients, from which their mean and their spread follow.

    Attributes:
        total: sum of the gradients, a tensor for each parameter.
        squares: sum of their squared lengths.
        count: how many there were.
    """

    total: list[Tensor] = field(default_factory=list)
    squares: float = 0.0
    count: int = 0

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Takes one more gradient."""
        self.squares += squared_length(gradient)
        self.count += 1
        if not self.total:
            self.total = [part.detach().clone() for part in gradient]
            return
        for place, part in enumerate(gradient):
            self.total[place] += part

    @property
    def noise(self) -> float:
        """E|g - m|^2 without bias."""
        mean_square = squared_length(self.total) / self.count**2
        return max(0.0, (self.squares - self.count * mean_square) / (self.count - 1))

    @property
    def signal(self) -> float:
        """|m|^2 without bias: the mean of ``count`` gradients is still noisy."""
        return squared_length(self.total) / self.count**2 - self.noise / self.count


def squared_length(parts: Sequence[Tensor]) -> float:
    """Sum of all squares, in float64."""
    total = 0.0
    for part in parts:
        square = part.detach().double().pow(2).sum()
        total += float(square.full_tensor() if isinstance(square, DTensor) else square)
    return total


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
        # The noise of a repeat is named by an iteration that no rollout above has.
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
    measured = [
        StepCredit(step, sigmas[step], explained[step], moments[step].signal, moments[step].noise)
        for step in steps
    ]
    return RolloutCredit(
        iteration, tuple(measured), everything.signal, everything.noise, tree.velocity_evaluations
    )


def step_gradients(
    trainer: Trainer, rollout: Rollout, prompts: list[Prompt]
) -> dict[int, tuple[int, list[Tensor]]]:
    """For each step: trained transitions, and the gradient of their mean loss."""
    batch = training_batch(rollout, prompts, trainer.config, trainer.advantages(rollout))
    step_of = torch.tensor(batch.steps)[batch.state_of]
    found = {}
    for step in sorted(set(batch.steps)):
        members = torch.nonzero(step_of == step).flatten()
        trainer.updater.backward(batch.update(members))
        gradient = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in trainer.weights.parameters
        ]
        found[step] = len(members), gradient
        trainer.weights.drop_gradients()
    return found


def joined_gradient(parts: dict[int, tuple[int, list[Tensor]]]) -> list[Tensor]:
    """The gradient of the mean loss over all transitions, from those of the steps."""
    total = sum(count for count, _ in parts.values())
    weighted = [[count / total * part for part in gradient] for count, gradient in parts.values()]
    return [torch.stack(list(same)).sum(dim=0) for same in zip(*weighted, strict=True)]

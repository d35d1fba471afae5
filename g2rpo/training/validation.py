"""In-domain rewards on the validation prompts, which the ranks share."""

from pathlib import Path

import torch
from accelerate import Accelerator

from g2rpo.batching import BatchSize
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.sampling import sample_ode
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import ValidationConfig
from g2rpo.training.rollout import RolloutEngine
from g2rpo.training.weights import TrainedWeights


def shared_prompts(prompts: list[Prompt], rank: int, ranks: int) -> tuple[list[Prompt], int]:
    """A rank's prompts, and how many of them count.

    All ranks get the same number, so that they make the same forwards: a rank with fewer prompts
    repeats the last one.
    """
    mine = prompts[rank::ranks]
    number = -(-len(prompts) // ranks)
    return mine + [prompts[-1]] * (number - len(mine)), len(mine)


def validation_rewards(
    config: ValidationConfig, engine: RolloutEngine, weights: TrainedWeights, micro_batch: BatchSize
) -> dict[str, float]:
    """The mean of each reward over the prompts, on every rank; images are sampled by ODE.

    Raises:
        UserError: on all ranks, if a reward fails on any of them.
    """
    accelerator: Accelerator = weights.accelerator
    prompts = read_prompts(Path(config.file), config.limit)
    ranks = accelerator.num_processes
    mine, counted = shared_prompts(prompts, accelerator.process_index, ranks)
    with weights.rollout():
        images = sample_ode(engine.policy, mine, engine.grid, config.seed, micro_batch)
    texts = [prompt.text for prompt in mine[:counted]]
    scores: dict[str, list[float]] = {name: [] for name in engine.rewards}
    with raise_on_all_ranks(accelerator):
        if counted:
            for name, model in engine.rewards.items():
                scores[name] = model.score(images[:counted], texts).double().tolist()
    every = of_all_ranks(accelerator, scores)
    return {
        f"validation/{name}": float(
            torch.tensor([v for own in every for v in own[name]], dtype=torch.float64).mean()
        )
        for name in scores
    }

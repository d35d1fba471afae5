"""``python -m benchmarks.speed.plain_loop``: a Flow-GRPO iteration, as a plain loop and by ours.

The plain loop is what a training library writes on diffusers' classes: all samples of an iteration
in one batch, one forward for each sample and step, nothing shared. Prompts, noise, weights, reward
and mathematics are ours, so rewards and gradients must agree. On the CPU, in its seconds.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from benchmarks.command import run
from benchmarks.speed.report import markdown_table, write_report
from benchmarks.speed.sizes import UNTOUCHED, Models, Size, size_named
from g2rpo.flow.sweep import INITIAL_NOISE
from g2rpo.policy.cpu_blocks import use_diffusers_blocks
from g2rpo.provenance import provenance
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer

OUTPUT = Path("results/speed")
STEPS, PROMPTS, GROUP_SIZE = 10, 6, 8
BATCHES = (24, 48, 64)
"""States at once that ours is measured with; the plain loop takes all samples."""


def configuration(size: Size, models: Models, states: int) -> TrainConfig:
    """Flow-GRPO with all weights trained, ``states`` at once."""
    return size.config(
        models,
        grid={"steps": STEPS, "shift": 3.0, "timestep": "exact"},
        method={"name": "flow_grpo"},
        lora=None,
        rollout={"group_size": GROUP_SIZE, "prompts_per_iteration": PROMPTS},
        optimization={"learning_rate": UNTOUCHED, "iterations": 1000},
        execution={
            "device": "cpu",
            "trackers": [],
            "rollout_micro_batch": states,
            "training_micro_batch": states,
        },
    )


@dataclass
class Outcome:
    """What an iteration computed: the reward of each sample, and the norm of the gradient."""

    rewards: Tensor
    gradient_norm: float


class PlainLoop:
    """Flow-GRPO on diffusers' transformer and autoencoder; inputs are those of ``trainer``."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.policy = trainer, trainer.policy
        self.transformer = cast(FluxTransformer2DModel, trainer.policy.transformer)
        use_diffusers_blocks(self.transformer)
        vae = trainer.policy.vae.to(memory_format=torch.contiguous_format)
        self.vae = cast(AutoencoderKL, vae)
        self.reward = trainer.engine.rewards["hps"]
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=UNTOUCHED)

    def iteration(self) -> Outcome:
        """Samples, scores and takes one optimiser step."""
        samples = PROMPTS * GROUP_SIZE
        prompts = [p for p in self.trainer.local_prompts() for _ in range(GROUP_SIZE)]
        noise = self.trainer.engine.noise(prompts, self.trainer.progress.iteration)

        def drawn(step: int) -> Tensor:
            shared = step == INITIAL_NOISE
            return torch.stack(
                [noise(i, 0 if shared else i % GROUP_SIZE, step) for i in range(samples)]
            )

        texts = [prompt.text for prompt in prompts]
        each = [index // GROUP_SIZE for index in range(samples)]
        self.conditioning = self.policy.encode(texts[::GROUP_SIZE]).select(each)
        x, states, old = drawn(INITIAL_NOISE), [], []
        with torch.no_grad():
            for step in range(STEPS):
                mean, std = self.step(x, step)
                states.append(x)
                x = mean + std * drawn(step)
                old.append(self.log_prob(x, mean, std))
            states.append(x)
            latents = self.policy.unpack(x) / self.vae.config["scaling_factor"]
            pixels = self.vae.decode(latents + self.vae.config["shift_factor"]).sample
            images = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            rewards = self.reward.score(images.permute(0, 2, 3, 1), texts)
        groups = rewards.view(PROMPTS, GROUP_SIZE)
        centred = groups - groups.mean(1, keepdim=True)
        advantages = (centred / (groups.std(1, keepdim=True) + 1e-8)).clamp(-5, 5).flatten()
        for step in range(STEPS - 1):
            mean, std = self.step(states[step], step)
            ratio = torch.exp(self.log_prob(states[step + 1], mean, std) - old[step])
            clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
            (loss / (STEPS - 1)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(groups, float(norm))

    def step(self, x: Tensor, index: int) -> tuple[Tensor, float]:
        """The mean [B, tokens, channels] and standard deviation of the SDE step ``index``."""
        sigma, after = self.trainer.grid.sigmas[index : index + 2]
        below_one = self.trainer.grid.sigmas[1] if sigma == 1 else sigma
        g, delta = 0.7 * math.sqrt(sigma / (1 - below_one)), after - sigma
        tokens = self.conditioning.prompt_embeds.shape[1]
        velocity = self.transformer(
            hidden_states=x,
            encoder_hidden_states=self.conditioning.prompt_embeds,
            pooled_projections=self.conditioning.pooled_prompt_embeds,
            timestep=torch.full((len(x),), sigma),
            guidance=torch.full((len(x),), self.policy.config.guidance_scale),
            img_ids=cast(Any, self.policy).image_ids,
            txt_ids=torch.zeros(tokens, 3),
        ).sample
        mean = x * (1 + g**2 * delta / (2 * sigma))
        mean = mean + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * delta
        return mean, g * math.sqrt(-delta)

    @staticmethod
    def log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
        """[B], the mean over dimensions."""
        density = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
        return density.mean(dim=(1, 2))


def ours(trainer: Trainer) -> Callable[[], Outcome]:
    """An iteration of the training engine."""

    def iteration() -> Outcome:
        rollouts: list[Any] = []
        run = trainer.engine.run

        def recorded(*arguments: Any) -> Any:
            rollouts.append(run(*arguments))
            return rollouts[-1]

        object.__setattr__(trainer.engine, "run", recorded)
        row = trainer.iterate()
        object.__setattr__(trainer.engine, "run", run)
        trainer.progress.iteration -= 1  # always the same prompts and noise
        return Outcome(rollouts[0].group_rewards("hps")[:, 0], row["gradient_norm"])

    return iteration


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """CPU seconds of each execution, alternating; the first iteration of each is not timed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = size.prepare(folder)

        def trainer(states: int, label: str) -> Trainer:
            return Trainer(configuration(size, models, states), folder / label)

        plain = PlainLoop(trainer(PROMPTS * GROUP_SIZE, "plain"))
        runs = {"plain loop": plain.iteration} | {
            f"ours, {states} states at once": ours(trainer(states, f"ours-{states}"))
            for states in BATCHES
        }
        outcomes = {label: run() for label, run in runs.items()}
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(repeats):
            for label, run in runs.items():
                started = time.process_time()
                run()
                seconds[label].append(time.process_time() - started)
    expected = outcomes["plain loop"]
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        "provenance": provenance({}),
        "settings": {
            "size": size.name, "steps": STEPS, "prompts": PROMPTS, "group_size": GROUP_SIZE,
            "repeats": repeats, "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
        "medians": medians,
        "ratios": {label: medians["plain loop"] / value for label, value in medians.items()},
        "reward_differences": {
            label: float((found.rewards - expected.rewards).abs().max())
            for label, found in outcomes.items()
        },
        "gradient_norms": {label: found.gradient_norm for label, found in outcomes.items()},
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    settings, origin = result["settings"], result["provenance"]
    rows = [
        [label, f"{seconds:.2f}", f"{result['ratios'][label]:.2f}×",
         f"{result['reward_differences'][label]:.0e}", f"{result['gradient_norms'][label]:.5f}"]
        for label, seconds in result["medians"].items()
    ]  # fmt: skip
    conditions = (
        f"{settings['prompts']} prompts, G = {settings['group_size']}, T = {settings['steps']} "
        f"({settings['steps'] - 1} steps trained), all weights trained, HPS. The plain loop calls "
        "diffusers' transformer for all samples of a step at once and shares nothing. Medians of "
        f"{settings['repeats']} alternating repeats, {settings['threads']} thread, torch "
        f"{origin['packages']['torch']}, commit {origin['git_commit']}."
    )
    title = f"# One iteration of Flow-GRPO, size {settings['size']}, against a plain loop"
    head = ["", "CPU s", "speedup", "reward difference", "gradient norm"]
    return "\n".join([title, "", conditions, "", markdown_table(head, rows, "---:"), ""])


def main(
    size: Annotated[str, typer.Option(help="mini or tiny.")] = "mini",
    repeats: Annotated[int, typer.Option(min=1, help="Number of repeats.")] = 5,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time a plain loop against ours and write plain-loop-SIZE.json and plain-loop-SIZE.md."""
    chosen = size_named(size, ("mini", "tiny"))
    torch.set_num_threads(1)  # fastest for such small models
    result = measure(chosen, repeats)
    write_report(output, f"plain-loop-{size}", result, report(result))


if __name__ == "__main__":
    run(main)

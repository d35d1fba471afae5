"""``python -m benchmarks.speed.iteration``: a whole G2RPO iteration, the original way and ours.

One prompt on the same device, with the same weights, noise and reward model: rollouts, decoding,
scoring and a training step, of adapters and, where they fit, of all weights. The original evaluates
one latent at a time, which costs most on small models; ``batched only`` is the same without sharing
but in batches. The last line is ``ratio: X``, the original's seconds over ours.
"""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from benchmarks.command import run
from benchmarks.speed.iteration_report import report
from benchmarks.speed.original import Original, Plan
from benchmarks.speed.report import write_report
from benchmarks.speed.sizes import UNTOUCHED, Models, Size, size_named
from benchmarks.speed.stopwatch import (
    Stopwatch,
    TimedReward,
    counted_evaluations,
    matmul_ceiling,
)
from g2rpo.errors import UserError
from g2rpo.methods.g2rpo import G2RPO
from g2rpo.policy.cpu_blocks import use_diffusers_blocks
from g2rpo.policy.fp8 import has_fp8_kernels
from g2rpo.policy.size import model_size
from g2rpo.provenance import provenance
from g2rpo.rewards.registry import load_reward
from g2rpo.training.batch import TrainingBatch
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.rollout import Rollout

OUTPUT = Path("results/speed")


@dataclass(frozen=True)
class Timing:
    """One execution of the iteration.

    Attributes:
        name: name of the execution.
        seconds: seconds of the whole iteration by phase, extrapolated if only a part was run.
        evaluations: NFE of the whole iteration's rollouts.
        run_evaluations: NFE that were run.
        images: distinct images decoded and scored in the whole iteration.
        training_evaluations: latents passed through a training forward.
        rollout_tflops: TFLOP/s of the rollouts.
        peak_gb: peak memory of the device in GB; None on the CPU.
        rewards: rewards by group and sample; NaN if not run.
    """

    name: str
    seconds: dict[str, float]
    evaluations: int
    run_evaluations: int
    images: int
    training_evaluations: int
    rollout_tflops: float
    peak_gb: float | None
    rewards: list[list[float]]

    @property
    def whole(self) -> float:
        """Seconds of the whole iteration."""
        return sum(self.seconds.values())


class Bench:
    """The executions of one size."""

    def __init__(
        self, size: Size, models: Models, device: torch.device, folder: Path, **settings: Any
    ) -> None:
        """Takes the models of ``size``; ``settings`` replace sections of its configuration."""
        self.size, self.models, self.device, self.folder = size, models, device, folder
        self.settings = settings
        policy = size.config(models).policy
        self.operations = model_size(policy).operations(policy)
        self.runs = 0

    def _trainer(self, config: TrainConfig, watch: Stopwatch) -> Trainer:
        self.runs += 1
        reward = TimedReward(load_reward(config.rewards["hps"].reward, self.device), watch)
        return Trainer(config, self.folder / f"run-{self.runs}", rewards={"hps": cast(Any, reward)})

    def ours(self, name: str, **changes: Any) -> tuple[Timing, TrainingBatch]:
        """The training engine's own iteration; also returns the batch that it trained on."""
        watch = Stopwatch(self.device)
        trainer = self._trainer(self.size.config(self.models, **self.settings, **changes), watch)
        self._warm_up(trainer)
        watch.seconds.clear()
        batches: list[TrainingBatch] = []
        rollouts: list[Rollout] = []
        decode, update, roll_out = (
            trainer.policy.vae.decode, trainer.updater.run, trainer.engine.run,
        )  # fmt: skip

        def timed_decode(*args: Any, **kwargs: Any) -> Any:
            with watch.phase("decode"):
                return decode(*args, **kwargs)

        def timed_update(batch: Any, prompts: Any, iteration: int) -> Any:
            batches.append(batch)
            with watch.phase("training"):
                return update(batch, prompts, iteration)

        def recorded_rollout(*args: Any) -> Any:
            rollouts.append(roll_out(*args))
            return rollouts[-1]

        trainer.policy.vae.decode = timed_decode
        trainer.updater.run = timed_update  # type: ignore[method-assign]
        object.__setattr__(trainer.engine, "run", recorded_rollout)
        self.reset_peak_memory()
        with counted_evaluations(trainer.policy.transformer) as counts:
            started = watch.now()
            trainer.iterate()
            whole = watch.now() - started
        seconds = {phase: watch.seconds[phase] for phase in ("decode", "reward", "training")}
        seconds["rollout"] = whole - sum(seconds.values())
        (rollout,) = rollouts
        return self._timing(
            name=name,
            seconds=seconds,
            evaluations=counts["rollout"],
            run_evaluations=counts["rollout"],
            images=len(rollout.tree.images),
            training_evaluations=counts["training"],
            rewards=rollout.group_rewards("hps")[0].tolist(),
        ), batches[0]

    def original(self, name: str, trained: TrainingBatch, *, batched: bool) -> Timing:
        """The released execution, or the same with batched samples; trains on ``trained``."""
        config = self.original_config(batched=batched)
        watch = Stopwatch(self.device)
        trainer = self._trainer(config, watch)
        if self.device.type == "cpu":
            use_diffusers_blocks(trainer.policy.transformer)
            trainer.policy.vae.to(memory_format=torch.contiguous_format)
        method, engine = config.method, trainer.engine
        assert isinstance(method, G2RPO)
        plan = Plan(
            method.steps_of(config.grid.steps),
            method.granularities,
            config.rollout.group_size,
            engine.settings.transitions,
        )
        every = self.size.every_batched if batched else self.size.every
        original = Original(trainer.policy, engine.rewards["hps"], trainer.grid, plan, watch)
        self.reset_peak_memory()
        prompts, iteration = trainer.local_prompts(), trainer.progress.iteration
        with counted_evaluations(trainer.policy.transformer) as counts:
            noise = engine.noise(prompts, iteration)
            original.run(prompts[0], noise, batched=batched, every=every)
            assert every > 1 or counts["rollout"] == plan.evaluations
            with watch.phase("training"), original.precision():
                batch = replace(trained, conditioning=original.conditioning)
                trainer.updater.run(batch, prompts, iteration)
        images = plan.images / original.images
        seconds = {
            "rollout": watch.seconds["rollout"] * plan.evaluations / counts["rollout"],
            "decode": watch.seconds["decode"] * images,
            "reward": watch.seconds["reward"] * images,
            "training": watch.seconds["training"],
        }
        return self._timing(
            name=name,
            seconds=seconds,
            evaluations=plan.evaluations,
            run_evaluations=counts["rollout"],
            images=plan.images,
            training_evaluations=counts["training"],
            rewards=original.rewards.tolist(),
        )

    def original_config(self, *, batched: bool) -> TrainConfig:
        """Float32 weights and nothing compiled; no ratio check, since it trains on our rollout."""
        policy = self.size.policy | {"source": str(self.models.policy), "dtype": "float32"}
        execution = {
            "trackers": [],
            "rollout_micro_batch": 1,
            "training_micro_batch": self.size.steps if batched else 1,
            "gradient_checkpointing": self.device.type == "cuda",
        }
        optimization = {"learning_rate": UNTOUCHED, "iterations": 4, "ratio_tolerance": 1e9}
        return self.size.config(
            self.models, policy=policy, execution=execution, optimization=optimization,
            **self.settings,
        )  # fmt: skip

    def _warm_up(self, trainer: Trainer) -> None:
        """Compiles the model in a small, untimed iteration."""
        if self.device.type != "cuda":
            return
        whole = trainer.config
        small = whole.rollout.model_copy(update={"group_size": 2})
        trainer.config = whole.model_copy(update={"rollout": small})
        trainer.iterate()
        trainer.config = whole
        trainer.progress.iteration = 0

    def _timing(self, **measured: Any) -> Timing:
        operations = self.operations * measured["evaluations"]
        tflops = operations / measured["seconds"]["rollout"] / 1e12
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        return Timing(rollout_tflops=tflops, peak_gb=peak, **measured)

    def reset_peak_memory(self) -> None:
        """Frees unused memory and resets the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def executions(bench: Bench) -> list[Timing]:
    """The original, the batched original, ours and, where kernels are, with fp8 continuations."""
    ours, trained = bench.ours("ours")
    variants = [ours]
    if has_fp8_kernels(bench.device):
        variants.append(bench.ours("ours, fp8 continuations", approximate_rollout={"fp8": True})[0])
    bench.reset_peak_memory()
    batched = bench.original("batched only", trained, batched=True)
    bench.reset_peak_memory()
    return [bench.original("original", trained, batched=False), batched, *variants]


def largest_difference(first: Timing, second: Timing) -> float:
    """Largest difference between the rewards of two executions, where both were run."""
    difference = (torch.tensor(first.rewards) - torch.tensor(second.rewards)).abs()
    return float(difference[~difference.isnan()].max())


def constants(ours: Timing) -> dict[str, float]:
    """Seconds of each part of our execution, as in ``reproduce/jobs/speeds.yaml``."""
    return {
        "evaluation": ours.seconds["rollout"] / ours.evaluations,
        "training_state": ours.seconds["training"] / ours.training_evaluations,
        "decode": ours.seconds["decode"] / ours.images,
        "hps": ours.seconds["reward"] / ours.images,
    }


def measure(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Times all executions of ``size``, alternating between them in every repeat."""
    trained: dict[str, dict[str, Any]] = {"adapters": {}}
    if device.type == "cpu":
        trained["all weights"] = {"lora": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = size.prepare(folder)
        benches = {
            what: Bench(size, models, device, folder / what, **settings)
            for what, settings in trained.items()
        }
        ceiling = matmul_ceiling(device)
        rounds = [{w: executions(bench) for w, bench in benches.items()} for _ in range(repeats)]
    timed = {what: summary([each[what] for each in rounds]) for what in trained}
    # The profile `mini` trains all weights.
    planned = list(trained)[-1]
    _, _, ours, *_ = median_timings([each[planned] for each in rounds])
    return {
        "provenance": provenance({}),
        "settings": {
            "size": size.name, "steps": size.steps, "group_size": size.group_size,
            "granularities": list(size.granularities), "resolution": size.policy["resolution"],
            "rank": size.rank, "every": size.every, "every_batched": size.every_batched,
            "repeats": repeats, "threads": torch.get_num_threads(), "device": device.type,
        },
        "ceiling_tflops": ceiling,
        "operations": benches["adapters"].operations,
        "constants": constants(ours),
        **timed["adapters"],
        "all_weights": timed.get("all weights"),
    }  # fmt: skip


def median_timings(rounds: Sequence[Sequence[Timing]]) -> list[Timing]:
    """Of each execution the repeat of median total seconds: its phases belong together."""
    ordered = (sorted(each, key=lambda t: t.whole) for each in zip(*rounds, strict=True))
    return [each[(len(each) - 1) // 2] for each in ordered]


def summary(rounds: Sequence[Sequence[Timing]]) -> dict[str, Any]:
    """The medians of the executions, and the seconds of the others over ours."""
    timings = median_timings(rounds)
    original, batched, ours, *_ = timings
    return {
        "ratio": original.whole / ours.whole,
        "ratios": [each[0].whole / each[2].whole for each in rounds],
        "batched_ratio": batched.whole / ours.whole,
        "executions": [
            asdict(timing) | {
                "whole": timing.whole,
                # JSON has no NaN.
                "rewards": [[None if isnan(r) else r for r in group] for group in timing.rewards],
                "reward_difference": largest_difference(timing, ours),
            }
            for timing in timings
        ],
    }  # fmt: skip


def main(
    size: Annotated[
        str, typer.Option(help="flux, mini or tiny; auto is flux on a GPU and mini elsewhere.")
    ] = "auto",
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of repeats; the default depends on the size.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time one iteration each way and write iteration-SIZE.json and iteration-SIZE.md."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = ("flux" if device.type == "cuda" else "mini") if size == "auto" else size
    chosen = size_named(name)
    if name == "flux" and device.type == "cpu":
        raise UserError("--size flux needs a GPU with 80 GB; use --size mini on the CPU")
    if device.type == "cpu":
        torch.set_num_threads(1)  # fastest for such small models
    result = measure(chosen, device, repeats or chosen.repeats)
    write_report(output, f"iteration-{name}", result, report(result))
    for what, found in (("adapters", result), ("all weights", result["all_weights"])):
        if found is not None:
            typer.echo(f"{what}: {found['ratio']:.2f}, batched only {found['batched_ratio']:.2f}")
    typer.echo(f"ratio: {result['ratio']:.2f}")


if __name__ == "__main__":
    run(main)

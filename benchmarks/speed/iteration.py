"""``python -m benchmarks.speed.iteration``: a whole G2RPO iteration, the original way and ours.

One prompt, the same device, weights, noise and reward model in one run: rollouts, decoding, scoring
and a training step of adapters. The last line is ``ratio: X``, the original's seconds over ours.
"""

import gc
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from benchmarks.speed.iteration_report import report
from benchmarks.speed.original import Original, Plan
from benchmarks.speed.report import write_report
from benchmarks.speed.sizes import SIZES, UNTOUCHED, Models, Size
from benchmarks.speed.stopwatch import (
    Stopwatch,
    TimedReward,
    counted_evaluations,
    matmul_ceiling,
)
from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.methods.g2rpo import G2RPO
from g2rpo.policy.size import model_size
from g2rpo.provenance import provenance
from g2rpo.quiet import quiet_libraries
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
        name: of the execution.
        seconds: of the whole iteration by phase, extrapolated where not all was run.
        evaluations: velocity evaluations of the whole iteration's rollouts.
        run_evaluations: how many of them were run.
        images: distinct images decoded and scored for the whole iteration.
        training_evaluations: latents that went through a training forward.
        rollout_tflops: TFLOP/s over the rollout's seconds.
        peak_gb: largest memory of the device, GB; None on the CPU.
        rewards: by group and sample; NaN where not run.
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
        """Seconds of the iteration."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Trained:
    """What a training step is given: the transitions of our rollout, for all executions."""

    batch: TrainingBatch
    prompts: Any


class Bench:
    """The executions of one size."""

    def __init__(self, size: Size, models: Models, device: torch.device, folder: Path) -> None:
        self.size, self.models, self.device, self.folder = size, models, device, folder
        policy = size.config(models).policy
        self.operations = model_size(policy).operations(policy)
        self.runs = 0

    def _trainer(self, config: TrainConfig, watch: Stopwatch) -> Trainer:
        self.runs += 1
        reward = TimedReward(load_reward(config.rewards["hps"].reward, self.device), watch)
        return Trainer(config, self.folder / f"run-{self.runs}", rewards={"hps": cast(Any, reward)})

    def ours(self, name: str, **changes: Any) -> tuple[Timing, Trained]:
        """The engine that trains, through its own iteration."""
        watch = Stopwatch(self.device)
        trainer = self._trainer(self.size.config(self.models, **changes), watch)
        self._warm_up(trainer)
        watch.seconds.clear()
        kept: list[Trained] = []
        decode, update = trainer.policy.vae.decode, trainer.updater.run

        def timed_decode(*given: Any, **options: Any) -> Any:
            with watch.phase("decode"):
                return decode(*given, **options)

        def timed_update(batch: Any, prompts: Any, iteration: int) -> Any:
            kept.append(Trained(batch, prompts))
            with watch.phase("training"):
                return update(batch, prompts, iteration)

        trainer.policy.vae.decode = timed_decode
        trainer.updater.run = timed_update  # type: ignore[method-assign]
        rollouts: list[Rollout] = []
        roll_out = trainer.engine.run

        def kept_rollout(*given: Any) -> Any:
            rollouts.append(roll_out(*given))
            return rollouts[-1]

        object.__setattr__(trainer.engine, "run", kept_rollout)
        self.forget_peak()
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
        ), kept[0]

    def original(self, name: str, trained: Trained, *, batched: bool) -> Timing:
        """The released execution, or that merely batched."""
        config = self.original_config(batched=batched)
        watch = Stopwatch(self.device)
        trainer = self._trainer(config, watch)
        method = config.method
        assert isinstance(method, G2RPO)
        plan = Plan(
            method.steps_of(config.grid.steps),
            method.granularities,
            config.rollout.group_size,
            trainer.engine.settings.diffusion,
            config.seed,
            trainer.progress.iteration,
        )
        every = self.size.every_batched if batched else self.size.every
        reward = trainer.engine.rewards["hps"]
        original = Original(trainer.policy, reward, trainer.grid, plan, watch, batched, every)
        self.forget_peak()
        prompt = trainer.local_prompts()[0]
        with counted_evaluations(trainer.policy.transformer) as counts:
            executed = original.run(prompt)
            assert counts["rollout"] == executed.evaluations
            assert every > 1 or executed.evaluations == plan.evaluations(config.grid.steps)
            with watch.phase("training"), original.precision():
                conditioning = trainer.policy.encode([prompt.text])
                batch = replace(trained.batch, conditioning=conditioning)
                trainer.updater.run(batch, trained.prompts, plan.iteration)
        whole = plan.evaluations(config.grid.steps)
        images = plan.images / executed.images
        seconds = {
            "rollout": watch.seconds["rollout"] * whole / executed.evaluations,
            "decode": watch.seconds["decode"] * images,
            "reward": watch.seconds["reward"] * images,
            "training": watch.seconds["training"],
        }
        return self._timing(
            name=name,
            seconds=seconds,
            evaluations=whole,
            run_evaluations=executed.evaluations,
            images=plan.images,
            training_evaluations=counts["training"],
            rewards=executed.rewards.tolist(),
        )

    def original_config(self, *, batched: bool) -> TrainConfig:
        """Float32 weights, nothing compiled; the rollout of ours is trained on, without a check."""
        policy = self.size.policy | {"source": str(self.models.policy), "dtype": "float32"}
        execution = {
            "trackers": [],
            "rollout_micro_batch": 1,
            "training_micro_batch": self.size.steps if batched else 1,
            "gradient_checkpointing": self.device.type == "cuda",
        }
        optimization = {"learning_rate": UNTOUCHED, "iterations": 4, "ratio_tolerance": 1e9}
        return self.size.config(
            self.models, policy=policy, execution=execution, optimization=optimization
        )

    def _warm_up(self, trainer: Trainer) -> None:
        """Compiles what will be compiled: a small iteration that is not counted."""
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

    def forget_peak(self) -> None:
        """Frees what nobody holds; the largest memory is counted from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def executions(bench: Bench) -> list[Timing]:
    """The original, the original merely batched, ours; ours with fp8 where there are kernels."""
    ours, trained = bench.ours("ours")
    found = [ours]
    if bench.device.type == "cuda":
        found.append(bench.ours("ours, fp8 continuations", approximate_rollout={"fp8": True})[0])
    bench.forget_peak()
    batched = bench.original("original, batched", trained, batched=True)
    bench.forget_peak()
    return [bench.original("original", trained, batched=False), batched, *found]


def median(repeats: Sequence[Timing]) -> Timing:
    """The repeat with the median of the whole seconds: its phases belong together."""
    middle = statistics.median_low([timing.whole for timing in repeats])
    return next(timing for timing in repeats if timing.whole == middle)


def largest_difference(first: Timing, second: Timing) -> float:
    """Of two executions' rewards, where both were run."""
    difference = (torch.tensor(first.rewards) - torch.tensor(second.rewards)).abs()
    return float(difference[~difference.isnan()].max())


def constants(ours: Timing) -> dict[str, float]:
    """Seconds of each part of our execution, as ``reproduce/jobs/speeds.yaml`` has them."""
    return {
        "evaluation": ours.seconds["rollout"] / ours.evaluations,
        "training_state": ours.seconds["training"] / ours.training_evaluations,
        "decode": ours.seconds["decode"] / ours.images,
        "hps": ours.seconds["reward"] / ours.images,
    }


def measure(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """All executions of ``size``, the repeats in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = size.prepare(folder)
        bench = Bench(size, models, device, folder)
        ceiling = matmul_ceiling(device)
        rounds = [executions(bench) for _ in range(repeats)]
    timings = [median(each) for each in zip(*rounds, strict=True)]
    original, _, ours, *_ = timings
    return {
        "provenance": provenance({}),
        "settings": {
            "size": size.name, "steps": size.steps, "group_size": size.group_size,
            "granularities": list(size.granularities), "resolution": size.policy["resolution"],
            "rank": size.rank, "every": size.every, "every_batched": size.every_batched,
            "repeats": repeats, "threads": torch.get_num_threads(), "device": device.type,
        },
        "ceiling_tflops": ceiling,
        "operations": bench.operations,
        "constants": constants(ours),
        "ratio": original.whole / ours.whole,
        "ratios": [each[0].whole / each[2].whole for each in rounds],
        "executions": [
            asdict(timing) | {
                "whole": timing.whole,
                "reward_difference": largest_difference(timing, ours),
            }
            for timing in timings
        ],
    }  # fmt: skip


def main(
    size: Annotated[
        str, typer.Option(help="flux, mini or tiny; auto: flux where there is a GPU, else mini.")
    ] = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Default: the size's.")] = None,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = OUTPUT,
) -> None:
    """Times one iteration each way and writes ``iteration-SIZE.json`` and ``.md``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = ("flux" if device.type == "cuda" else "mini") if size == "auto" else size
    if name not in SIZES:
        raise UserError(f"--size {size!r}: {nearest(size, SIZES)}")
    if name == "flux" and device.type == "cpu":
        raise UserError("--size flux needs a GPU of 80 GB; --size mini runs on the CPU")
    chosen = SIZES[name]
    if device.type == "cpu":
        torch.set_num_threads(1)  # such small models are fastest so, either way
    result = measure(chosen, device, repeats or chosen.repeats)
    write_report(output, f"iteration-{name}", result, report(result))
    typer.echo(f"ratio: {result['ratio']:.2f}")


if __name__ == "__main__":
    quiet_libraries()
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None

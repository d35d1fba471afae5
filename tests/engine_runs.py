"""Small training runs on one or two CPU ranks, and scenarios of two ranks."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import training_runs
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training_runs import Brightness, trainer_for
from two_ranks import on_two_ranks

from g2rpo.config import merge
from g2rpo.data.prompts import Prompt, prompts_of_iteration, read_prompts
from g2rpo.policy import Policy
from g2rpo.stop import Stopped
from g2rpo.training.batch import TrainingBatch, training_batch
from g2rpo.training.collective import of_all_ranks, sum_over_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.weights import build_weights


def config_for(assets: Path, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "policy": {
            "source": str(assets / "policy"), "resolution": 32, "max_sequence_length": 20,
        },
        "rollout": {"group_size": 3, "prompts_per_iteration": 4},
        "optimization": {"iterations": 4, "learning_rate": 1e-3},
        "checkpoints": {"every": 1, "keep_last": 6},
        "execution": {"device": "cpu", "trackers": [], "training_micro_batch": 2},
    }  # fmt: skip
    return training_runs.config_for(assets, **merge(defaults, changes))


GUIDED: dict[str, dict[str, Any]] = {
    "rollouts and training": {},
    "detached": {"detach_unconditional": True},
    "rollouts alone": {"training_scale": 1.0},
    "another in training": {"training_scale": 2.5, "detach_unconditional": True},
}
"""Classifier-free guidance of rollouts, and that of training; the last two not for transitions."""


def guided(assets: Path, which: str, **changes: Any) -> dict[str, Any]:
    """Changes of a configuration to a Stable Diffusion 3 with guidance."""
    policy = {"source": str(assets / "sd3_policy"), "guidance_scale": 4.5}
    return merge({"policy": policy, "guidance": GUIDED[which]}, changes)


def run_to(trainer: Trainer, iteration: int) -> None:
    """Iterates to ``iteration`` and writes a checkpoint, as a run that is stopped there does."""
    while trainer.progress.iteration < iteration:
        trainer.iterate()
    trainer.save()
    trainer.checkpoints.finish()


def whole(tensor: Tensor) -> Tensor:
    """The whole of what may be sharded, in float64; all ranks call it together."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to(torch.float64, copy=True)


def trained_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in trainer.weights.named}


def relative(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor] | None) -> float:
    """The distance of a to b over that of b to start (or to zero)."""
    assert a.keys() == b.keys()
    away = sum(((a[name] - b[name]) ** 2).sum() for name in b)
    moved = sum(((b[name] - (0 if start is None else start[name])) ** 2).sum() for name in b)
    return float((away / moved) ** 0.5)


@contextmanager
def rounded_times(policy: Policy) -> Iterator[None]:
    """Inside of the block a float32 policy is given the times that it would see in bfloat16.

    diffusers rounds 1000 times the time to the dtype of the latents, which random weights are far
    more sensitive to than to all else that bfloat16 changes.
    """
    velocity = policy.velocity

    def rounded(latents: Tensor, times: Tensor, *rest: Any) -> Tensor:
        if policy.config.dtype == "float32":
            times = (times.to(torch.bfloat16) * 1000).float() / 1000
        return velocity(latents, times, *rest)

    policy.velocity = rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        del policy.velocity


@contextmanager
def exhausted_memory(
    policy: Policy, states: int, when: bool = True, *, training: bool = True
) -> Iterator[list[int]]:
    """Inside of the block a forward of more than ``states`` states finds no memory.

    Gives the sizes that were asked for; those of the rollout, where it is not ``training``.
    """
    velocity = policy.velocity
    asked: list[int] = []

    def limited(latents: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled() == training:
            asked.append(len(latents))
            if when and len(latents) > states:
                raise torch.OutOfMemoryError("no memory left")
        return velocity(latents, *rest)

    policy.velocity = limited  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        del policy.velocity


def find(assets: Path, folder: Path, *names: str) -> int:
    """Runs scenarios one after the other on two ranks; the exit code.

    What the first rank finds goes to ``<folder>/<scenario>.json``.
    """
    return on_two_ranks(_find, assets, folder, names)


def _find(assets: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        own = SCENARIOS[name](assets, folder if name.endswith("leg") else folder / name)
        if Accelerator(cpu=True).is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(own))


# Scenarios: what two ranks find.


def gradients(assets: Path, folder: Path) -> dict[str, Any]:
    """Loss and gradients of one iteration, sharded on two ranks, against one plain rank's."""
    plain = trainer_for(off_policy(assets), folder / "plain")
    work = rolled_out(plain)
    found: dict[str, Any] = {"plain": gradient_of(plain, work, folder / "plain.pt")}
    for dtype in ("float32", "bfloat16"):
        execution = {"sharding": "fsdp2"}
        config = off_policy(assets, policy={"dtype": dtype}, execution=execution)
        trainer = trainer_for(config, folder / dtype)
        found[dtype] = gradient_of(trainer, work, folder / f"{dtype}.pt")
        config = config_for(assets, policy={"dtype": dtype}, execution=execution)
        row = trainer_for(config, folder / f"ratio-{dtype}").iterate()
        found[dtype]["ratio"] = row["ratio_deviation"]
    return found


def off_policy(assets: Path, **changes: Any) -> TrainConfig:
    """A configuration whose objective clips nothing, for work that another policy rolled out.

    diffusers rounds 1000 times the guidance to the dtype of the latents; 2000 is a bfloat16.
    """
    optimization = {"ratio_tolerance": 1.0, "clip_range": 0.9}
    policy = {"guidance_scale": 2.0} | changes.pop("policy", {})
    return config_for(assets, optimization=optimization, policy=policy, **changes)


Work = tuple[TrainingBatch, list[Prompt]]


def rolled_out(trainer: Trainer) -> Work:
    """What a trainer's first iteration would learn from."""
    prompts = trainer.local_prompts()
    rollout = trainer.rollout(prompts)
    return training_batch(rollout, prompts, trainer.config), prompts


def gradient_of(trainer: Trainer, work: Work, path: Path) -> dict[str, float]:
    """Loss and gradient norm of ``work``, the same for all; its gradients go to ``path``."""
    held: dict[str, Tensor] = {}
    clip = trainer.weights.clip_gradients

    def keep(max_norm: float) -> float:
        held.update({n: whole(p.grad) for n, p in trainer.weights.named if p.grad is not None})
        return clip(max_norm)

    trainer.weights.clip_gradients = keep  # type: ignore[method-assign]
    with rounded_times(trainer.policy):
        (update,) = trainer.updater.run(*work, 0)
    losses = sum_over_ranks(trainer.accelerator, {"loss": update.loss})
    if trainer.accelerator.is_main_process:
        torch.save(held, path)
    return {"loss": losses["loss"], "norm": update.gradient_norm}


def lifecycle(assets: Path, folder: Path) -> dict[str, Any]:
    """Sharded training is the same resumed, and with weights gathered for rollouts or not."""
    weights = []
    for name, rollout_weights in (("straight", "gathered"), ("sharded", "sharded")):
        execution = {"sharding": "fsdp2", "rollout_weights": rollout_weights}
        config = config_for(
            assets,
            policy={"dtype": "bfloat16"},
            optimization={"ema_decay": 0.5, "kl_coefficient": 0.1},
            execution=execution,
            validation={"file": str(assets / "prompts" / "test.txt"), "limit": 5},
        )
        trainer = trainer_for(config, folder / name)
        if name == "straight":
            first = trainer.validate()
        run_to(trainer, 2)
        resumed = trainer_for(config, folder / name)
        run_to(trainer, 3)
        run_to(resumed, 3)
        weights += [trained_weights(trainer), trained_weights(resumed)]
        assert trainer.ema is not None
        assert resumed.ema is not None
        averages = [[whole(p) for p in one.ema.shadow_params] for one in (trainer, resumed)]
    return {
        "same": [
            all(torch.equal(one[name], weights[0][name]) for name in one) for one in weights
        ],
        "same_average": all(map(torch.equal, *averages)),
        "validation": first,
    }  # fmt: skip


def out_of_memory(assets: Path, folder: Path) -> dict[str, Any]:
    """Memory runs out on the second of two replicated ranks alone, in the second iteration."""
    weights, rows = [], []
    second = Accelerator(cpu=True).process_index == 1
    for name, limit in (("enough", 100), ("short", 2)):
        config = config_for(assets, execution={"training_micro_batch": 4})
        trainer = trainer_for(config, folder / name)
        trainer.iterate()
        with exhausted_memory(trainer.policy, limit, second):
            rows.append(trainer.iterate())
        run_to(trainer, 2)
        weights.append(trained_weights(trainer))
    resumed = trainer_for(config, folder / "short")
    start = {name: whole(p) for name, p in build_weights(config, trainer.accelerator).named}
    return {
        "rows": rows,
        "away": relative(weights[1], weights[0], start),
        "resumed_with": resumed.sizes.training.states,
    }


def out_of_memory_sharded(assets: Path, folder: Path) -> dict[str, Any]:
    """Memory runs out on the second of two sharded ranks, while the first waits for it."""
    config = config_for(assets, execution={"sharding": "fsdp2", "training_micro_batch": 4})
    trainer = trainer_for(config, folder / "run")
    run_to(trainer, 1)
    second = trainer.accelerator.process_index == 1
    with exhausted_memory(trainer.policy, 2, second), pytest.raises(Stopped) as caught:
        trainer.iterate()
    sys.exit(3 if caught.value.resume else 4)


def equal_groups(assets: Path, folder: Path) -> dict[str, Any]:
    """The groups that each rank reports, where three of four prompts have equal rewards."""
    told = {}
    for normalizer in ("group", "global_std"):
        config = config_for(assets, advantage={"normalizer": normalizer})
        prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
        equal = {prompt.text for prompt in prompts_of_iteration(prompts, 4, config.seed, 0)[:3]}
        reward = Brightness(lambda scores, texts, equal=equal: scores * _not_in(texts, equal))
        trainer = trainer_for(config, folder / normalizer, reward)
        row = trainer.iterate()
        own = [row["advantage/hps/zero_std_groups"], row["ratio_deviation"]]
        told[normalizer] = of_all_ranks(trainer.accelerator, own)
    return told


def _not_in(texts: Sequence[str], refused: set[str]) -> Tensor:
    return torch.tensor([float(text not in refused) for text in texts])


def short_rollout(assets: Path, folder: Path) -> dict[str, Any]:
    """Three iterations; memory runs out on the second rank's rollout, in the second of them."""
    config = config_for(assets, execution={"rollout_micro_batch": 8})
    trainer = trainer_for(config, folder / "short")
    second = trainer.accelerator.process_index == 1
    rows = [trainer.iterate()]
    with exhausted_memory(trainer.policy, 3, second, training=False):
        rows.append(trainer.iterate())
    with exhausted_memory(trainer.policy, 3, training=False) as asked:
        rows.append(trainer.iterate())
    run_to(trainer, 3)
    resumed = trainer_for(config, folder / "short")
    plain = trainer_for(config, folder / "enough")
    found = {
        "rows": rows, "expected": [plain.iterate() for _ in range(3)], "largest": max(asked),
        "resumed_with": resumed.sizes.rollout.states,
    }  # fmt: skip
    return {"ranks": of_all_ranks(trainer.accelerator, found)}


def short_rollout_sharded(assets: Path, folder: Path) -> dict[str, Any]:
    """Memory runs out while the first rank waits within a rollout's forward: the run ends."""
    execution = {"sharding": "fsdp2", "rollout_weights": "sharded", "rollout_micro_batch": 8}
    trainer = trainer_for(config_for(assets, execution=execution), folder / "run")
    if trainer.accelerator.process_index == 1:
        with (
            exhausted_memory(trainer.policy, 3, training=False),
            pytest.raises(Stopped) as caught,
        ):
            trainer.iterate()
        (folder / "stopped.json").write_text(json.dumps({"resume": caught.value.resume}))
        sys.exit(3)
    trainer.iterate()
    return {}


def compiled(assets: Path, folder: Path) -> dict[str, Any]:
    """Sharded blocks, traced as for compilation and not; no C++ is compiled."""
    compile_module = nn.Module.compile

    def traced(module: nn.Module, **options: Any) -> None:
        compile_module(module, backend="eager", **options)

    nn.Module.compile = traced  # type: ignore[method-assign,assignment]
    rows = []
    for chosen in (False, True):
        execution = {"sharding": "fsdp2", "rollout_weights": "sharded", "compile": chosen}
        rows.append(
            trainer_for(config_for(assets, execution=execution), folder / str(chosen)).iterate()
        )
    return {"rows": rows, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def first_leg(assets: Path, folder: Path) -> dict[str, Any]:
    return _leg(assets, folder, 1)


def last_leg(assets: Path, folder: Path) -> dict[str, Any]:
    return _leg(assets, folder, 3)


def leg_config(assets: Path, sharding: str = "fsdp2") -> TrainConfig:
    # In float64: Adam turns the rounding of a tiny gradient into a step of the learning rate.
    return config_for(
        assets,
        policy={"dtype": "float64"},
        optimization={"ema_decay": 0.5},
        execution={"sharding": sharding},
    )


def replicated(assets: Path, folder: Path) -> dict[str, Any]:
    trainer = trainer_for(leg_config(assets, "replicated"), folder / "run")
    rows = [trainer.iterate() for _ in range(3)]
    run_to(trainer, 3)
    return {"rows": rows}


def _leg(assets: Path, folder: Path, last: int) -> dict[str, Any]:
    trainer = trainer_for(leg_config(assets), folder / "legs")
    begun = trainer.progress.iteration
    run_to(trainer, last)
    return {"begun": begun, "done": trainer.progress.iteration}


SCENARIOS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        gradients, lifecycle, out_of_memory, out_of_memory_sharded, first_leg, last_leg,
        replicated, equal_groups, short_rollout, short_rollout_sharded, compiled,
    )
}  # fmt: skip

"""What two ranks find out about rollouts whose memory runs out on one of them.

Run under ``torch.distributed.run`` with the assets' folder and a folder of its own, it writes the
findings of each rank to ``<folder>/rank<n>.json``.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from accelerate import Accelerator
from engine_runs import config_for, trainer_for
from torch import Tensor, nn

from g2rpo.policy import FluxPolicy
from g2rpo.stop import Stopped


@contextmanager
def rollouts_of(policy: FluxPolicy, states: int, *, when: bool = True) -> Iterator[list[int]]:
    """Inside of the block a velocity without gradients of more than ``states`` finds no memory.

    Gives the sizes that were asked for.
    """
    velocity = policy.velocity
    asked: list[int] = []

    def limited(latents: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            asked.append(len(latents))
            if when and len(latents) > states:
                raise torch.OutOfMemoryError("as if there were no memory")
        return velocity(latents, *rest)

    policy.velocity = limited  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        del policy.velocity


def replicated(assets: Path, folder: Path, second: bool) -> dict[str, Any]:
    """Three iterations; memory runs out on the second rank, in the second of them."""
    config = config_for(assets, execution={"rollout_micro_batch": 8})
    trainer = trainer_for(config, folder / "short")
    rows = [trainer.iterate()]
    with rollouts_of(trainer.policy, 3, when=second):
        rows.append(trainer.iterate())
    with rollouts_of(trainer.policy, 3) as asked:
        rows.append(trainer.iterate())
    trainer.save()
    trainer.checkpoints.finish()
    resumed = trainer_for(config, folder / "short")
    plain = trainer_for(config, folder / "enough")
    expected = [plain.iterate() for _ in range(3)]
    return {
        "rows": rows, "expected": expected, "largest": max(asked),
        "resumed_with": resumed.sizes.rollout.states,
    }  # fmt: skip


def sharded(assets: Path, folder: Path, second: bool) -> dict[str, Any]:
    """Memory runs out while the first rank waits within a forward: the run ends."""
    execution = {"sharding": "fsdp2", "rollout_weights": "sharded", "rollout_micro_batch": 8}
    trainer = trainer_for(config_for(assets, execution=execution), folder / "sharded")
    if second:
        with rollouts_of(trainer.policy, 3):
            try:
                trainer.iterate()
            except Stopped as stopped:
                (folder / "stopped.json").write_text(json.dumps({"resume": stopped.resume}))
                sys.exit(3)
    trainer.iterate()
    return {}


def compiled(assets: Path, folder: Path, second: bool) -> dict[str, Any]:
    """Sharded blocks, traced as for compilation and not; no C++ is compiled."""
    compile_module = nn.Module.compile

    def traced(module: nn.Module, **options: Any) -> None:
        compile_module(module, backend="eager", **options)

    nn.Module.compile = traced  # type: ignore[method-assign,assignment]
    rows = []
    for chosen in (False, True):
        execution = {"sharding": "fsdp2", "rollout_weights": "sharded", "compile": chosen}
        trainer = trainer_for(config_for(assets, execution=execution), folder / str(chosen))
        rows.append(trainer.iterate())
    stats = torch._dynamo.utils.counters["stats"]
    return {"rows": rows, "graphs": stats["unique_graphs"]}


def main() -> None:
    name, assets, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    rank = Accelerator(cpu=True).process_index
    scenarios = {"replicated": replicated, "sharded": sharded, "compiled": compiled}
    found = scenarios[name](assets, folder, rank == 1)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

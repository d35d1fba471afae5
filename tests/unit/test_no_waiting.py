"""A rollout asks things of the device one after the other, and awaits none on the way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.flow.sweep import SweepSettings, Velocities, sweep
from g2rpo.flow.upload import indices, to_device
from g2rpo.methods import dance_grpo, g2rpo, mix_grpo
from g2rpo.methods.base import Method, RolloutShape
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.seeds import gaussian
from g2rpo.training.continuation import ContinuationPolicy

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.equal.default,
}
"""Operations after which the host knows something that the device has computed."""


class Awaited(TorchDispatchMode):
    """Counts the reads, and copies between devices that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        self.operations += 1
        masks = func is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in READS or masks:
            self.reads.append(str(func))
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            target = options.get("device") if func is aten._to_copy.default else args[0].device
            crosses = target is not None and torch.device(target).type != source.device.type
            if crosses and not (options.get("non_blocking") or args[2:3] == (True,)):
                self.reads.append(f"{func} to {target}")
        return func(*args, **options)


class ListsAsIndices(TorchFunctionMode):
    """Counts indexing by Python lists: on a GPU each is copied there and awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += any(isinstance(part, list) for part in index)
        return func(*args, **(kwargs or {}))


METHODS: dict[str, Callable[[], Method]] = {
    "g2rpo": lambda: g2rpo.G2RPO(granularities=(1, 2)),
    "dance_grpo": dance_grpo.DanceGRPO,
    "mix_grpo_flash": lambda: mix_grpo.MixGRPO(window_size=1, post_window_ratio=0.9),
}


@pytest.fixture(scope="module")
def policy(flux_folder: Path) -> Policy:
    config = PolicyConfig(source=str(flux_folder), resolution=32, max_sequence_length=24)
    return load_policy(config, "cpu")


def noise_for(policy: Policy) -> Callable[[int, int, int], Tensor]:
    def noise(prompt: int, sample: int, step: int) -> Tensor:
        drawn = gaussian(policy.latent_shape, 5, "test", prompt, sample, step)
        return policy.pack(drawn[None])[0]

    return noise


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_read_back_within_the_walk(policy: Policy, name: str) -> None:
    method, grid = METHODS[name](), build_grid(GridConfig(steps=4), policy.image_tokens)
    tree = method.rollout_tree(RolloutShape(4, 3, 10), 0)
    conditioning = policy.encode(["a red circle", "a blue square"])
    settings = SweepSettings(method.transitions(grid.sigmas), 4)

    def velocity(latents: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        return policy.velocity(latents, times, conditioning.select(prompts))

    with Awaited() as awaited:
        sweep(tree, grid, 2, velocity, noise_for(policy), settings)
    assert awaited.operations > 1000
    assert awaited.reads == []


@pytest.mark.parametrize("name", METHODS)
def test_the_walk_needs_no_value_of_any_latent(name: str) -> None:
    """On the meta device tensors have no values: whatever reads one fails there."""
    method, grid = METHODS[name](), build_grid(GridConfig(steps=6), 4)
    tree = method.rollout_tree(RolloutShape(6, 3, 10), 0)
    device = torch.device("meta")
    settings = SweepSettings(method.transitions(grid.sigmas), 4, device=device)
    batches: list[int] = []

    def velocity(latents: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        assert {latents.device, times.device, prompts.device} == {device}
        batches.append(len(latents))
        return torch.tanh(latents)

    def noise(prompt: int, sample: int, step: int) -> Tensor:
        return torch.zeros(4, 8)

    with Awaited() as awaited, ListsAsIndices() as lists:
        swept = sweep(tree, grid, 2, velocity, noise, settings)
    assert awaited.reads == []
    assert lists.found == 0
    assert swept.images.shape == (2, len(tree.images), 4, 8)
    assert swept.images.device == device
    assert sum(batches) == swept.velocity_evaluations == 2 * tree.velocity_evaluations


def test_the_counter_counts() -> None:
    with Awaited() as awaited:
        values = torch.arange(4.0)
        float(values.sum())
        values[values > 2]
        torch.tensor([1]).to("meta")
        to_device(torch.tensor([1]), torch.device("meta"))
        indices([1, 2], torch.device("meta"))
    assert len(awaited.reads) == 3
    with ListsAsIndices() as lists:
        values[[0, 1]]
        values[None, [0, 1]] = 1
        values[indices([0, 1], values.device)]
    assert lists.found == 2


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch.cuda.set_sync_debug_mode sees what the driver waits for; that needs a GPU",
)
@pytest.mark.parametrize("approximate", [False, True])
def test_a_gpu_is_never_awaited_within_the_walk(policy: Policy, approximate: bool) -> None:
    from g2rpo.policy.config import ContinuationConfig

    cuda = load_policy(policy.config.model_copy(update={"dtype": "bfloat16"}), "cuda")
    method, grid = g2rpo.G2RPO(granularities=(1, 2)), build_grid(GridConfig(steps=4), 4)
    tree = method.rollout_tree(RolloutShape(4, 3, 10), 0)
    conditioning = cuda.encode(["a red circle", "a blue square"])
    settings = SweepSettings(method.transitions(grid.sigmas), 4, device=torch.device("cuda"))

    def velocity(latents: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        return cuda.velocity(latents, times, conditioning.select(prompts))

    twin = ContinuationPolicy(cuda, ContinuationConfig(fp8=True))
    with twin.rollout(tree, conditioning) as continuations:
        velocities = Velocities(velocity, continuations if approximate else None)
        sweep(tree, grid, 2, velocities, noise_for(cuda), settings)  # allocates what is cached
        torch.cuda.set_sync_debug_mode("error")
        try:
            sweep(tree, grid, 2, velocities, noise_for(cuda), settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")

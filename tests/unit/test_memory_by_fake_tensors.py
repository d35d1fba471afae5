"""The memory that is planned, against the real modules run on tensors without data.

``FakeTensorMode`` runs the transformer, its backward, FSDP2 and AdamW at the width and length of
FLUX.1-dev and Stable Diffusion 3.5 Medium and allocates nothing. Memory is linear in the number of
blocks of either kind, so three small depths give the whole model's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from engine_runs import config_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from g2rpo.policy import Policy, lora
from g2rpo.policy.conditioning import Conditioning
from g2rpo.policy.decoding import decode_size
from g2rpo.policy.flux import FluxPolicy
from g2rpo.policy.sd3 import SD3Policy
from g2rpo.policy.size import model_size, published
from g2rpo.training import weights as training_weights
from g2rpo.training.batch_sizes import state_bytes
from g2rpo.training.config import TrainConfig
from g2rpo.training.memory import WORKING_BYTES, gpu_bytes
from g2rpo.training.weights import MasterWeights, ShardedWeights, TrainedWeights
from reproduce.experiment import load_profile

RANKS = 16
DEPTHS = ((1, 1), (2, 1), (1, 2))


@dataclass(frozen=True)
class Model:
    """A published model with blocks of two kinds.

    Attributes:
        source: its hub id.
        policy: its class.
        blocks: the number of blocks of either kind.
        depth: the settings of its transformer with other numbers.
    """

    source: str
    policy: type[Policy]
    blocks: tuple[int, int]
    depth: Callable[[int, int], dict[str, Any]]

    def transformer(self, *blocks: int) -> Any:
        settings = published(self.source).transformer | self.depth(*blocks)
        return self.policy.transformer_class(**settings).eval()


FLUX = Model(
    "black-forest-labs/FLUX.1-dev", FluxPolicy, (19, 38),
    lambda double, single: {"num_layers": double, "num_single_layers": single},
)  # fmt: skip
SD35 = Model(
    "stabilityai/stable-diffusion-3.5-medium", SD3Policy, (13, 11),
    lambda dual, plain: {
        "num_layers": dual + plain, "dual_attention_layers": tuple(range(dual))
    },
)  # fmt: skip
SD35_POLICY = {
    "source": SD35.source, "dtype": "bfloat16", "resolution": 512, "guidance_scale": 4.5,
    "max_sequence_length": 256,
}  # fmt: skip
ADAPTERS = {"rank": 32, "alpha": 64}


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that are alive: now, and the most after any operation.

    Set ``peak`` to 0 to have the most from then on, and to None to leave it, which is faster.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak: int | None = None

    @property
    def now(self) -> int:
        # FSDP2 frees a gathered block by resizing its storage, which is no operation.
        return sum(storage.nbytes() for storage in list(self.alive.keys()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # count its local operations
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.alive[tensor.untyped_storage()] = None
        if self.peak is not None:
            self.peak = max(self.peak, self.now)
        return result


class FusedRMSNorm(torch.autograd.Function):
    """A GPU's kernel, which keeps its input for the backward; a CPU keeps several in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return gradient * weight, (gradient * inputs).sum_to_size(weight.shape)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Within the test all tensors are without data, on rank 0 of 16."""
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedRMSNorm.apply(x, self.weight))
    monkeypatch.setattr(lora, "gaussian", lambda shape, *key: torch.zeros(shape))
    monkeypatch.setattr(Policy, "fill_transformer", lambda self: None)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))
    monkeypatch.setattr(training_weights, "init_device_mesh", lambda *args: mesh)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(LiveBytes())


def fake_weights(
    model: Model, config: TrainConfig, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> TrainedWeights:
    sharded = config.execution.sharding == "fsdp2"
    dtype = torch.float32 if sharded else torch.bfloat16
    with default_dtype(dtype):
        transformer = model.transformer(*blocks)
    for name, buffer in list(transformer.named_buffers()):
        place, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(place), last, buffer.to(dtype))
    autoencoder = AutoencoderKL(block_out_channels=(4, 4, 4, 4), latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    policy = model.policy(config.policy, Path(), transformer, autoencoder)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=RANKS)
    if config.execution.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if sharded:
        return ShardedWeights(policy, accelerator, config.execution.rollout_weights)
    if config.lora is not None:
        with monkeypatch.context() as patch, default_dtype(torch.bfloat16):
            # Tensors without data cannot be moved within a module; these need not be.
            patch.setattr(nn.Module, "_apply", lambda self, function, recurse=True: self)
            policy.add_lora(config.lora)
    return MasterWeights(policy, accelerator)


def velocity(policy: Policy, states: int) -> Tensor:
    size = policy.model_size

    def text(prompts: int) -> Conditioning:
        shape = (size.rows(policy.config)["text"], size.joint_attention_dim)
        pooled = torch.empty(prompts, size.pooled_projection_dim, dtype=torch.bfloat16)
        return Conditioning(torch.empty(prompts, *shape, dtype=torch.bfloat16), pooled)

    policy.unconditional = [text(1)]
    latents = policy.pack(torch.empty(states, *policy.latent_shape))
    return policy.velocity(latents, torch.ones(states), text(states))


def of_whole_model(model: Model, at_depth: Callable[[tuple[int, int]], int]) -> int:
    """Extrapolates from three depths to that of ``model``."""
    one, *more = map(at_depth, DEPTHS)
    return one + sum(
        (blocks - 1) * (two - one) for blocks, two in zip(model.blocks, more, strict=True)
    )


def profile_config(assets: Path, name: str) -> TrainConfig:
    """What determines the memory of a profile's training."""
    profile = load_profile(name)
    execution = dict(profile.training["execution"]) | {"device": "cpu"}
    names = ("source", "dtype", "resolution", "max_sequence_length", "guidance_scale")
    return config_for(
        assets,
        policy={key: getattr(profile.policy, key) for key in names},
        lora=profile.training.get("lora"),
        execution=execution,
    )


def sd35_config(assets: Path, **training: Any) -> TrainConfig:
    execution = {"training_micro_batch": 1} | training.pop("execution", {})
    return config_for(assets, policy=SD35_POLICY, execution=execution, **training)


TRAININGS: dict[str, tuple[Model, Callable[[Path], TrainConfig]]] = {
    **{
        name: (FLUX, lambda assets, name=name: profile_config(assets, name))
        for name in ("flux", "flux-lora", "flux-lora-40gb")
    },
    "sd35": (
        SD35, lambda assets: sd35_config(assets, execution={"sharding": "fsdp2"})
    ),
    "sd35-lora": (SD35, lambda assets: sd35_config(assets, lora=ADAPTERS)),
    "sd35-lora-checkpointed": (
        SD35,
        lambda assets: sd35_config(
            assets, lora=ADAPTERS, execution={"gradient_checkpointing": True}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_takes_what_is_planned(
    fake: LiveBytes, smoke_assets: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, made = TRAININGS[name]
    config = made(smoke_assets)
    ranks = RANKS if config.execution.sharding == "fsdp2" else 1
    expected = gpu_bytes(config, model_size(config.policy), ranks)
    expected.pop("reward models", None)  # they are not loaded here

    beside: list[int] = []

    def after_forward(blocks: tuple[int, int]) -> int:
        fake.alive.clear()  # the model before is not yet collected
        weights = fake_weights(model, config, blocks, monkeypatch)
        output = velocity(weights.policy, 1)
        kept = fake.now
        if not beside:
            fake.peak = 0
            output.square().mean().backward()
            beside.append(fake.peak - kept)
            fake.peak = None
        return kept

    # When the backward begins, all activations are there; what it needs beside them is that of a
    # few blocks, however many there are.
    found = of_whole_model(model, after_forward) + beside[0]
    parts = ("weights", "activations", "gathered blocks")
    assert found == pytest.approx(sum(expected.get(part, 0) for part in parts), rel=0.15)
    # A later micro-batch finds gradients and the optimiser's moments, whose sizes are exact.
    whole = found + expected["gradients"] + expected["optimiser states"]
    assert whole == pytest.approx(sum(expected.values()) - WORKING_BYTES, rel=0.15)
    assert whole < sum(expected.values())


def test_an_optimiser_step_takes_what_is_planned(
    fake: LiveBytes, smoke_assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's moments, and the temporary of all parameters that it makes on a GPU."""
    config = profile_config(smoke_assets, "flux-lora")
    weights = fake_weights(FLUX, config, (1, 1), monkeypatch)
    for parameter in weights.parameters:
        parameter.grad = torch.empty_like(parameter)
    trained = sum(parameter.numel() for parameter in weights.parameters)
    optimizer = torch.optim.AdamW(weights.parameters, foreach=True)  # the default on a GPU
    before, fake.peak = fake.now, 0
    optimizer.step()
    assert fake.now - before == pytest.approx(8 * trained, rel=1e-3)
    assert fake.peak - fake.now == pytest.approx(4 * trained, rel=1e-3)


@pytest.mark.parametrize("name", ["flux-lora", "sd35-lora"])
def test_a_rollout_state_takes_less_than_is_reckoned(
    fake: LiveBytes, smoke_assets: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Blocks are run one after the other, so the depth does not matter."""
    model, made = TRAININGS[name]
    weights = fake_weights(model, made(smoke_assets), (1, 1), monkeypatch)
    peaks = []
    for states in (2, 3):
        fake.peak = 0
        with torch.no_grad():
            velocity(weights.policy, states)
        peaks.append(fake.peak)
    assert 0.6 * state_bytes(weights.policy) < peaks[1] - peaks[0] < state_bytes(weights.policy)


def test_decoding_fits_the_margin(fake: LiveBytes) -> None:
    """A slice of the largest size, in bfloat16, without its attention's scores."""
    with default_dtype(torch.bfloat16):
        decoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    images = decode_size(720**2).states
    before, fake.peak = fake.now, 0
    with torch.no_grad():
        decoder.decode(torch.empty(images, 16, 90, 90, dtype=torch.bfloat16))
    assert fake.peak - before < WORKING_BYTES

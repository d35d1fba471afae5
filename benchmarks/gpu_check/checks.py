"""The checks themselves. Each fills in what it measures, and raises :class:`CheckFailedError`."""

import gc
import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from benchmarks.reward_packages import hpsv2_open_clip
from benchmarks.speed import iteration, numerics
from benchmarks.speed.sizes import MINI, SIZES, Models, Size, deepest_flux, random_flux
from benchmarks.speed.stopwatch import Stopwatch
from g2rpo.errors import reason
from g2rpo.files import read_json, write_json
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.policy.kernels import resolve_attention, set_attention
from g2rpo.policy.size import read_size
from g2rpo.quiet import quiet_libraries
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.hps import HPS
from g2rpo.rewards.open_clip_reward import CONFIG_FILE
from g2rpo.seeds import gaussian
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.memory import GIB, gpu_bytes

MOST_DOUBLE_BLOCKS = 6
"""Of 19, with twice as many single blocks: more would not fit into the time."""
GRADIENT_COSINE = 0.95
REWARD_TOLERANCE = 1e-3
RESUME_TOLERANCE = 0.05
"""Distance of a resumed run's weights, as a share of how far training moved them. The backward of
attention may not repeat on a GPU, and Adam's first steps turn rounding into the sign of a step."""
ITERATIONS = 2
Measured = dict[str, float | int | bool | str]


class CheckFailedError(Exception):
    """What was measured is not what it should be."""


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: ``cuda``, or ``cpu`` for tiny models.
        folder: for models and runs.
    """

    device: str
    folder: Path

    @property
    def size(self) -> Size:
        """G2RPO on FLUX's width and length, or on tiny models."""
        if self.device == "cpu":
            return SIZES["tiny"]
        short = {"steps": 8, "group_size": 4, "granularities": (1, 2)}
        return replace(SIZES["flux"], **short, every=4, every_batched=2)  # type: ignore[arg-type]

    @property
    def models(self) -> Models:
        """The models that :func:`write_models` has written."""
        if self.device == "cpu":
            return SIZES["tiny"].prepare(self.folder)  # kept from the first time
        return Models(self.folder / "policy", self.folder / "hps", self.folder / "prompts.txt")

    def policy(self) -> Policy:
        """The policy of :attr:`models`."""
        return load_policy(self.size.config(self.models).policy, self.device)


def require(holds: bool, problem: str) -> None:
    """Raises :class:`CheckFailedError` with ``problem``, unless ``holds``."""
    if not holds:
        raise CheckFailedError(problem)


def write_models(place: Place, found: Measured) -> None:
    """Random weights of FLUX's shape, as deep as they can be trained in full, and a ViT-H."""
    if place.device == "cuda":
        memory = torch.cuda.mem_get_info()[1]
        random_flux(place.folder, deepest_flux(memory, MOST_DOUBLE_BLOCKS))
    config = read_json(place.models.policy / "transformer" / "config.json")
    found["double blocks"] = config["num_layers"]
    found["single blocks"] = config["num_single_layers"]


def autocast_backward(place: Place, found: Measured) -> None:
    """A small model's gradient in bfloat16 and under autocast points where float32's does."""
    config = PolicyConfig(source=str(MINI / "policy"), resolution=32, max_sequence_length=20)
    states = gaussian((64, 16, 64), 1, "gpu check").to(place.device)
    times = torch.linspace(0.1, 1, len(states), device=place.device)

    def gradient(dtype: Any, *, autocast: bool = False) -> Tensor:
        policy = load_policy(config.model_copy(update={"dtype": dtype}), place.device)
        policy.transformer.requires_grad_(True)
        computed = torch.bfloat16 if autocast else getattr(torch, dtype)
        device = torch.device(place.device)
        set_attention(policy.transformer, resolve_attention("auto", device, computed))
        conditioning = policy.encode(["a red circle on black"])
        chosen = conditioning.select(torch.zeros(len(states), dtype=torch.int64).to(place.device))
        context = torch.autocast(place.device, torch.bfloat16) if autocast else nullcontext()
        with context:
            loss = policy.velocity(states, times, chosen).square().mean()
        gradients = torch.autograd.grad(loss, list(policy.transformer.parameters()))
        return torch.cat([each.float().flatten() for each in gradients])

    exact = gradient("float32")
    for name, other in (
        ("autocast", gradient("float32", autocast=True)),
        ("bfloat16", gradient("bfloat16")),
    ):
        cosine = torch.nn.functional.cosine_similarity(exact, other, dim=0)
        found[f"cosine, {name}"] = float(cosine)
    good = all(float(value) >= GRADIENT_COSINE for value in found.values())
    require(good, f"a gradient's cosine with float32's is below {GRADIENT_COSINE}")


def decoding(place: Place, found: Measured) -> None:
    """Seconds and memory of the decoder."""
    policy = place.policy()
    watch = Stopwatch(policy.device)
    for images in (1, 4):
        noise = gaussian((images, policy.image_tokens, 64), 2, "gpu check")
        latents = noise.to(policy.device)
        policy.decode(latents)
        _reset_peak(place)
        with watch.phase(str(images)):
            pixels = policy.decode(latents)
        found[f"ms per image, {images} at once"] = 1000 * watch.seconds[str(images)] / images
        _peak(place, found, f"peak GiB, {images} at once")
        require(float(pixels.float().std()) > 0, "the images are constant")


def reward(place: Place, found: Measured) -> None:
    """HPS scores as hpsv2's own model does."""
    models = place.models
    ours = HPS.load(RewardConfig(model="hps", source=str(models.reward)), place.device)
    published = ours.version != "custom"
    side = 720 if published else 32
    noise = gaussian((16, side, side, 3), 3, "gpu check")
    images = (128 + 50 * noise).clamp(0, 255).to(torch.uint8)
    prompts = [f"{models.prompts.read_text().splitlines()[0]} {i % 4}" for i in range(len(images))]
    with hpsv2_open_clip() as package:
        theirs = package.CLIP(**_architecture(models.reward)).eval()
        theirs.load_state_dict(ours.clip.state_dict(), strict=False)
        theirs.to(place.device)
        transform = package.image_transform(224, is_train=False, resize_longest_max=True)
    if published:
        pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    else:
        pixels = ours.preprocessing(images)
    with torch.no_grad():
        shown = theirs.encode_image(pixels.to(place.device), normalize=True)
        read = theirs.encode_text(ours.tokenizer(prompts).to(place.device), normalize=True)
    expected = (shown * read).sum(-1).float().cpu()
    ours.score(images, prompts)
    watch = Stopwatch(torch.device(place.device))
    with watch.phase("score"):
        scores = ours.score(images, prompts)
    difference, spread = float((scores - expected).abs().max()), float(scores.std())
    found["largest difference"] = difference
    found["ms per image"] = 1000 * watch.seconds["score"] / len(images)
    found["standard deviation of scores"] = spread
    require(spread > REWARD_TOLERANCE, "the scores hardly differ between images")
    require(difference <= REWARD_TOLERANCE, f"scores differ by more than {REWARD_TOLERANCE:g}")


def _architecture(folder: Path) -> dict[str, Any]:
    """The arguments of open_clip's model for the checkpoint in ``folder``."""
    beside = folder / CONFIG_FILE
    if beside.is_file():
        settings = read_json(beside)["model_cfg"]
    else:
        settings = open_clip.get_model_config("ViT-H-14")
    return {key: settings[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}


class _Killed(Trainer):
    """Is killed after the first iteration's checkpoint, as by a node's failure."""

    def _between_iterations(self) -> None:
        super()._between_iterations()
        if self.progress.iteration == 1:
            self.checkpoints.finish()
            os.kill(os.getpid(), signal.SIGKILL)


class _Requeued(Trainer):
    """Is asked to stop and resume in its first iteration, as SLURM does near a time limit."""

    def iterate(self) -> dict[str, Any]:
        StopRequest.request("gpu check", resume=True)
        return super().iterate()


def _interrupted(kind: type[Trainer], config: TrainConfig, run: Path) -> None:
    try:
        kind(config, run).train()
    except Stopped:
        os._exit(0)


def resume(place: Place, found: Measured) -> None:
    """Killed, or stopped to be requeued, and resumed: the weights of an uninterrupted run."""
    short = {"steps": 4, "group_size": 4, "granularities": (1,)}
    config = replace(SIZES["mini"], **short).config(  # type: ignore[arg-type]
        SIZES["mini"].prepare(place.folder),
        lora=None,
        optimization={"learning_rate": 1e-4, "iterations": ITERATIONS},
        checkpoints={"every": 1},
    )
    runs = {name: place.folder / "resume" / name for name in ("killed", "requeued")}
    for kind, run in zip((_Killed, _Requeued), runs.values(), strict=True):
        # Forked before this process has used CUDA.
        child = multiprocessing.get_context("fork").Process(
            target=_interrupted, args=(kind, config, run)
        )
        child.start()
        child.join()
    base = _weights(Trainer(config, place.folder / "resume" / "base"))
    plain = _trained(config, place.folder / "resume" / "plain")
    others = {"another uninterrupted run": place.folder / "resume" / "again"} | runs
    for name, run in others.items():
        weights = _trained(config, run)
        found[f"distance, {name}"] = float((weights - plain).norm() / (plain - base).norm())
        found[f"bit-identical, {name}"] = torch.equal(weights, plain)
    if place.device == "cpu":
        same = all(found[f"bit-identical, {name}"] for name in runs)
        require(same, "a resumed run has other weights")
    near = all(float(found[f"distance, {name}"]) <= RESUME_TOLERANCE for name in runs)
    require(near, f"a resumed run is further than {RESUME_TOLERANCE} away")


def _trained(config: TrainConfig, run: Path) -> Tensor:
    trainer = Trainer(config, run)
    trainer.train()
    return _weights(trainer)


def _weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in trainer.weights.parameters])


def lora_iteration(place: Place, found: Measured) -> None:
    """One iteration as in profile flux-lora: seconds, ratio, and memory against the plan."""
    for checkpointing in (False, True):
        name = "with gradient checkpointing" if checkpointing else "without"
        execution = {
            "trackers": [],
            "rollout_micro_batch": 12,
            "training_micro_batch": 1,
            "gradient_checkpointing": checkpointing,
        }
        config = place.size.config(place.models, execution=execution)
        _reset_peak(place)
        trainer = Trainer(config, place.folder / f"lora-{checkpointing}")
        started = time.monotonic()
        row = trainer.iterate()
        found[f"seconds, {name}"] = time.monotonic() - started
        found[f"ratio deviation, {name}"] = row["ratio_deviation"]
        plan = sum(gpu_bytes(config, read_size(place.models.policy), 1).values())
        peak = _peak(place, found, f"peak GiB, {name}")
        found[f"planned GiB, {name}"] = plan / GIB
        del trainer
        require(peak <= plan, f"it takes more memory than planned, {name}")


def ratio(place: Place, found: Measured) -> None:
    """The ratio before an update in bfloat16: full and adapters, eager and compiled."""
    policy = place.size.policy | {"dtype": "bfloat16"}
    size = replace(place.size, steps=4, group_size=2, granularities=(1, 2), policy=policy, rank=16)
    compiled = (False, True) if place.device == "cuda" else (False,)  # minutes on a CPU
    deviations = numerics.deviations(size, place.models, place.folder / "ratio", compiled)
    found |= deviations
    good = max(deviations.values()) <= numerics.TOLERANCE
    require(good, f"further from 1 than {numerics.TOLERANCE:g}")


def speed(place: Place, found: Measured) -> None:
    """One iteration, the released way and ours, exact and with fp8 where there are kernels."""
    models = place.models
    size = replace(place.size, prepare=lambda _: models)
    result = iteration.measure(size, torch.device(place.device), 1)
    found["TFLOP/s of a matrix product"] = result["ceiling_tflops"]
    for execution in result["executions"]:
        name = execution["name"]
        found[f"seconds, {name}"] = execution["whole"]
        found[f"ms per NFE, {name}"] = (
            1000 * execution["seconds"]["rollout"] / execution["evaluations"]
        )
        rewards = [r for r in itertools.chain(*execution["rewards"]) if r is not None]
        require(all(map(math.isfinite, rewards)), f"{name} has rewards that are not finite")


def _reset_peak(place: Place) -> None:
    if place.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(place: Place, found: Measured, name: str) -> int:
    """Peak memory in bytes since :func:`_reset_peak`, noted as ``name``; 0 on a CPU."""
    peak = int(torch.cuda.max_memory_allocated()) if place.device == "cuda" else 0
    if peak:
        found[name] = peak / GIB
    return peak


@dataclass(frozen=True)
class Check:
    """A check, and its share of the time relative to the others'."""

    name: str
    run: Callable[[Place, Measured], None]
    share: float


CHECKS = (
    Check("random models", write_models, 3),
    Check("autocast backward", autocast_backward, 1),
    Check("decoding", decoding, 1),
    Check("reward", reward, 2),
    Check("resume", resume, 2),
    Check("LoRA iteration", lora_iteration, 3),
    Check("ratio", ratio, 6),
    Check("speed", speed, 6),
)
"""Cheap ones first, so that a slow one at the end takes no other's time."""


def run_check(check: Check, place: Place, output: Path) -> None:
    """Runs ``check`` in this process and writes its problem and measurements to ``output``."""
    os.setsid()  # so that it can be killed with the processes that it starts
    quiet_libraries()
    if place.device == "cpu":
        torch.set_num_threads(1)  # fastest for such small models
    problem, measured = "", Measured()
    try:
        check.run(place, measured)
    except CheckFailedError as failure:
        problem = str(failure)
    except Exception as error:  # whatever it is, the others run
        problem = f"{type(error).__name__}: {reason(error)}"
    # JSON has no NaN.
    shown = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in measured.items()
    }
    write_json(output, {"problem": problem, "measured": shown})

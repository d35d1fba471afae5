"""``python -m benchmarks.speed.approximations``: the effect of approximate continuations.

Two measurements for each approximation, on the mini world's committed models. *Ranking*: Spearman's
correlation, within groups, of the advantages of the same rollouts (policy, prompts, noise) with and
without it, for every reward model. *Curves*: the validation reward of short trainings with and
without it, on the same seeds.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.stats
import torch
import typer
from torch import Tensor

from benchmarks.command import run
from benchmarks.evaluation.statistics import LEVEL, Interval, checkpoint_intervals, method_intervals
from benchmarks.speed.report import markdown_table, write_report
from g2rpo.config import merge, validate
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.policy.fp8 import has_fp8_kernels
from g2rpo.provenance import provenance, source_fingerprint
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.training.advantages import transition_advantages
from g2rpo.training.config import TrainConfig
from g2rpo.training.continuation import ContinuationPolicy
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import read_metrics
from g2rpo.training.rollout import Rollout, RolloutEngine

MINI = "benchmarks/mini_world/assets"
REWARDS = ("hps", "clip", "pick_score", "image_reward", "attributes")
OUTPUT = Path("results/mini/approximations")
LORA = {
    "lora": {"rank": 16, "alpha": 32},
    "policy": {"dtype": "bfloat16"},
    "optimization": {"learning_rate": 1.0e-3},
}
CHUNK = 8
"""Prompts rolled out at once."""
NOISE_ITERATION, OTHER_ITERATION = 0, 1
CHARTED = ("fp8", "first block 0.1", "modulation 0.1", "merged LoRA")


@dataclass(frozen=True)
class Variant:
    """An approximation and the training configuration that it is compared with."""

    continuations: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> Mapping[str, Any]:
        """The approximate training configuration."""
        return merge(self.base, {"approximate_rollout": self.continuations})


def _cache(kind: str, threshold: float) -> Variant:
    return Variant({"step_cache": {"kind": kind, "threshold": threshold}})


VARIANTS: dict[str, Variant] = {
    "fp8": Variant({"fp8": True}),
    **{f"first block {t:g}": _cache("first_block", t) for t in (0.05, 0.1, 0.2, 0.4)},
    **{f"modulation {t:g}": _cache("modulation", t) for t in (0.05, 0.1, 0.2, 0.4)},
    "fp8, first block 0.1": Variant(
        {"fp8": True, "step_cache": {"kind": "first_block", "threshold": 0.1}}
    ),
    "merged LoRA": Variant({"merged_lora": True}, LORA),
    "merged LoRA, fp8": Variant({"merged_lora": True, "fp8": True}, LORA),
}


def reward_config(name: str) -> RewardConfig:
    """A reward model of the mini world."""
    return RewardConfig(model=name, source=f"{MINI}/rewards/{name}", batch_size=128)


def train_config(seed: int, iterations: int, changes: Mapping[str, Any]) -> TrainConfig:
    """The mini world's G2RPO on HPS (the first row of its Table 1) with ``changes``."""
    own: dict[str, Any] = {
        "seed": seed,
        "policy": {"source": f"{MINI}/policy", "resolution": 32, "max_sequence_length": 20},
        "prompts": {"file": f"{MINI}/prompts/train.txt"},
        "validation": {"file": f"{MINI}/prompts/validation.txt", "every": 5},
        "rewards": {"hps": {"reward": reward_config("hps").model_dump()}},
        "grid": {"steps": 8},
        "method": {"name": "g2rpo", "stochastic_steps": [0, 1, 2]},
        "rollout": {"group_size": 8, "prompts_per_iteration": 8},
        "optimization": {"iterations": iterations, "learning_rate": 5.0e-5},
        "checkpoints": {"every": iterations},
        "execution": {
            "rollout_micro_batch": 64, "training_micro_batch": 64, "trackers": [],
        },
    }  # fmt: skip
    return validate(TrainConfig, merge(own, changes), "approximations")


# --- ranking -------------------------------------------------------------------------------------

Advantages = dict[str, Tensor]
"""The advantages of each reward model, [prompts, steps, G]."""


def advantages_of(rollout: Rollout, rewards: Sequence[str], config: TrainConfig) -> Advantages:
    """The advantages that training on each reward alone would use."""
    by_reward = {}
    steps = [step.step for step in rollout.recorded]
    for name in rewards:
        grouped = {name: rollout.group_rewards(name)}
        advantages = transition_advantages(
            grouped, {name: 1.0}, rollout.tree.groups, steps, config.advantage
        )
        by_reward[name] = torch.stack(advantages.by_step, dim=1)
    return by_reward


def roll_out(
    engine: RolloutEngine, config: TrainConfig, prompts: Sequence[Prompt], iteration: int
) -> tuple[Advantages, float]:
    """The advantages of all prompts, and the share of the continuations' NFE that was reused."""
    tree = config.method.rollout_tree(config.shape, iteration)
    parts: list[Advantages] = []
    reused = 0
    for first in range(0, len(prompts), CHUNK):
        rollout = engine.run(tree, prompts[first : first + CHUNK], iteration)
        parts.append(advantages_of(rollout, list(engine.rewards), config))
        reused += rollout.reused_evaluations
    continued = tree.velocity_evaluations - len(tree.policy_states)
    joined = {name: torch.cat([part[name] for part in parts]) for name in engine.rewards}
    return joined, reused / (continued * len(prompts))


def correlation(one: Tensor, other: Tensor) -> tuple[dict[str, Any], int]:
    """Spearman's correlation within groups [P, K, G], averaged over a prompt's, then prompts.

    Returns:
        The mean with its bootstrap interval over prompts, and the number of groups without a
        ranking because all their advantages are equal on either side.
    """
    by_prompt, without = [], 0
    for groups in zip(one.numpy(), other.numpy(), strict=True):
        values = []
        for a, b in zip(*groups, strict=True):
            if np.ptp(a) == 0 or np.ptp(b) == 0:
                without += 1
            else:
                values.append(float(scipy.stats.spearmanr(a, b).statistic))
        if values:
            by_prompt.append(float(np.mean(values)))
    (interval,) = checkpoint_intervals([by_prompt])
    return _ends(interval) | {"prompts": len(by_prompt)}, without


def _ends(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def rankings(
    trainer: Trainer, prompts: Sequence[Prompt], variants: Mapping[str, Variant], label: str
) -> list[dict[str, Any]]:
    """For each variant and reward model, the rank correlation with the exact advantages."""
    config, engine = trainer.config, trainer.engine
    exact, _ = roll_out(engine, config, prompts, NOISE_ITERATION)
    small = replace(engine, settings=replace(engine.settings, micro_batch=7))
    other = {
        f"{label}: control, other batches": roll_out(small, config, prompts, NOISE_ITERATION),
        f"{label}: control, other noise": roll_out(engine, config, prompts, OTHER_ITERATION),
    }
    for name, variant in variants.items():
        settings = train_config(1, 1, variant.changes)
        assert settings.approximate_rollout is not None
        twin = ContinuationPolicy(engine.policy, settings.approximate_rollout)
        approximate = replace(engine, continuations=twin)
        other[name] = roll_out(approximate, config, prompts, NOISE_ITERATION)
        typer.echo(f"ranked: {name}")
    rows = []
    for name, (advantages, reused) in other.items():
        for reward in exact:
            spearman, without = correlation(exact[reward], advantages[reward])
            rows.append(
                {
                    "variant": name, "judge": reward, "spearman": spearman,
                    "groups_without_ranking": without, "reused_share": reused,
                }
            )  # fmt: skip
    return rows


def measure_rankings(prompt_count: int, lora_iterations: int, folder: Path) -> list[dict[str, Any]]:
    """The rankings of all variants; adapters are trained for some iterations first."""
    prompts = read_prompts(Path(f"{MINI}/prompts/validation.txt"), prompt_count)
    rows = []
    for label, base, iterations in (
        ("float32", {}, 1),
        ("LoRA in bfloat16", LORA, lora_iterations),
    ):
        trainer = Trainer(train_config(1, iterations, base), folder / label)
        if base:
            trainer.train()
        scored = {name: load_reward(reward_config(name), "cpu") for name in REWARDS}
        trainer.engine = replace(trainer.engine, rewards=scored)
        chosen = {name: v for name, v in VARIANTS.items() if bool(v.base) == bool(base)}
        rows += rankings(trainer, prompts, chosen, label)
    return rows


# --- learning curves -----------------------------------------------------------------------------


def _curve(
    name: str, changes: Mapping[str, Any], seed: int, iterations: int, folder: Path
) -> list[tuple[int, float]]:
    """The validation reward by iteration of one training."""
    run = folder / f"{name}-{seed}"
    run.mkdir(parents=True)
    changes = merge({"validation": {"every": 2}}, changes)
    Trainer(train_config(seed, iterations, changes), run).train()
    rows = read_metrics(run / "metrics.jsonl")
    return [(r["iteration"], r["validation/hps"]) for r in rows if "validation/hps" in r]


def measure_curves(seeds: Sequence[int], iterations: int, folder: Path) -> list[dict[str, Any]]:
    """Trainings with and without the charted variants; their difference at the last validation."""
    trained: dict[str, Mapping[str, Any]] = {"exact": {}, "exact, LoRA": LORA}
    trained |= {name: VARIANTS[name].changes for name in CHARTED}
    curves: dict[str, np.ndarray[Any, Any]] = {}
    rows = []
    for name, changes in trained.items():
        typer.echo(f"training: {name}")
        # [seeds, validations, (iteration, reward)]
        own = np.array([_curve(name, changes, seed, iterations, folder) for seed in seeds])
        curves[name] = own
        row: dict[str, Any] = {
            "variant": name,
            "iterations": own[0, :, 0].astype(int).tolist(),
            "validation_hps": [[round(v, 6) for v in curve] for curve in own[:, :, 1].tolist()],
        }
        if name in CHARTED:
            exact = curves["exact, LoRA" if "LoRA" in name else "exact"]
            difference = own[:, -1, 1] - exact[:, -1, 1]
            (interval,) = method_intervals([difference.tolist()])
            row["last_difference"] = _ends(interval)
        rows.append(row)
    return rows


# --- the report ----------------------------------------------------------------------------------


def _ranking_table(rows: Sequence[Mapping[str, Any]]) -> str:
    rewards = list(dict.fromkeys(row["judge"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = {row["judge"]: row for row in rows if row["variant"] == name}
        shown = "{mean:.3f} ({low:.3f} to {high:.3f})"
        cells = [shown.format(**own[reward]["spearman"]) for reward in rewards]
        lines.append([name, f"{100 * own[rewards[0]]['reused_share']:.0f} %", *cells])
    return markdown_table(["continuations", "reused", *rewards], lines)


def _curve_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["continuations", "first validation", "last validation", "last, minus exact"]
    lines = []
    for row in rows:
        first, *_, last = np.array(row["validation_hps"]).mean(0)
        end = row.get("last_difference")
        text = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**end) if end else ""
        lines.append([row["variant"], f"{first:.4f}", f"{last:.4f}", text])
    return markdown_table(head, lines)


EMULATED = (
    "emulated on the CPU: weights and inputs are rounded as by the kernel, but products are summed "
    "in float32; the error of the tensor cores' narrower accumulator is not measured here"
)


def report(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    settings, provenance = result["settings"], result["provenance"]
    kernels = "the GPU's own" if settings["fp8_kernels"] else EMULATED
    hardware, seeds = provenance["hardware"], ", ".join(map(str, settings["seeds"]))
    measured = (
        f"Commit {provenance['git_commit']}, {hardware['device']}, torch "
        f"{provenance['packages']['torch']}. Float8 is {kernels}."
    )
    ranking = (
        f"The same rollouts of {settings['prompts']} validation prompts with and without: "
        "Spearman's correlation of the advantages within a group (one prompt, one stochastic "
        f"step), averaged over groups, with its {100 * LEVEL:.0f} % bootstrap interval over "
        "prompts. "
        "`reused` is the share of the continuations' NFE that the step cache saved. `other "
        "batches` is the effect of rounding alone; `other noise` compares unrelated rollouts. The "
        f"adapters of the LoRA rows were trained for {settings['lora_iterations']} iterations on a "
        "bfloat16 base."
    )
    curves = (
        f"{settings['iterations']} iterations of G²RPO on HPS, seeds {seeds}: the mean reward on "
        "the validation prompts, sampled exactly. The last column is paired by seed, with "
        "Student's t interval over the seeds."
    )
    return "\n".join(
        [
            "# Approximate continuations on the mini world",
            *("", measured, "", "## Ranking", "", ranking, ""),
            _ranking_table(result["ranking"]),
            *("", "## Learning curves", "", curves, ""),
            _curve_table(result["curves"]),
            "",
        ]
    )


def main(
    prompts: Annotated[int, typer.Option(min=2, help="Prompts used for the rankings.")] = 32,
    iterations: Annotated[int, typer.Option(min=2, help="Iterations of each training.")] = 10,
    seeds: Annotated[
        str, typer.Option(help="Three or more seeds, comma-separated.")
    ] = "201,202,203",
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Measure every approximation and write approximations.json and approximations.md."""
    torch.set_num_threads(1)  # fastest for such small models
    lora_iterations = 8
    policy = train_config(1, 1, {}).policy
    fingerprint = source_fingerprint(policy.source, policy.revision)
    result: dict[str, Any] = {
        "provenance": provenance({"policy": str(fingerprint)}),
        "settings": {
            "prompts": prompts, "iterations": iterations, "lora_iterations": lora_iterations,
            "seeds": [int(seed) for seed in seeds.split(",")],
            "fp8_kernels": has_fp8_kernels(torch.device("cpu")),
            "lora": LORA,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        result["ranking"] = measure_rankings(prompts, lora_iterations, path)
        result["curves"] = measure_curves(result["settings"]["seeds"], iterations, path)
    write_report(output, "approximations", result, report(result))


if __name__ == "__main__":
    run(main)

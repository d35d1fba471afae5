"""Scores any folder or manifest of images with chosen reward models: ``g2rpo score``."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from benchmarks.scoring import summary
from benchmarks.scoring.engine import Ranks, Scorer
from benchmarks.scoring.items import Source, read_source, refuse_bad
from g2rpo.config import content_hash, merge, nearest, validate
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, sha256_file
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from reproduce import runs
from reproduce.experiment import Profile, judges


@dataclass(frozen=True)
class Request:
    """What is asked to be scored.

    Attributes:
        source: folder of images, or manifest.
        prompts: the prompt set of a folder.
        output: folder of the results.
        skip_bad: leaves out what cannot be scored, and lists it.
    """

    source: Path
    prompts: Path | None
    output: Path
    skip_bad: bool = False


def chosen_rewards(
    profile: Profile,
    names: Sequence[str],
    overrides: Mapping[str, Any],
    batch_size: int | None = None,
) -> dict[str, RewardConfig]:
    """The rewards called ``names`` of ``profile`` (all where none is named), with ``overrides``.

    ``batch_size`` images are scored at a time; None leaves each reward's own.

    Raises:
        UserError: the profile has no such reward, or an override does not fit.
    """
    known = judges(profile)
    for name in (*names, *overrides):
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"profile {profile.name} has no reward {name!r}; {hint}")
    configs = {name: known[name] for name in names or known}
    size = {} if batch_size is None else {"batch_size": batch_size}
    return {
        name: validate(
            RewardConfig,
            merge(config.model_dump(mode="json"), size, overrides.get(name, {})),
            f"reward {name}",
        )
        for name, config in configs.items()
    }


def _device(ranks: Ranks) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{ranks.rank % count}" if count else "cpu"


def judge(request: Request, rewards: Mapping[str, RewardConfig]) -> pd.DataFrame:
    """Scores, writes ``scores.parquet``, ``summary.csv`` and ``manifest.json``, prints a table.

    Started again it goes on where it was; rewards that were added later are scored alone.

    Raises:
        UserError: something cannot be scored, in one line; what is scored is kept.
    """
    ranks = Ranks.launched()
    prompts = None if request.prompts is None else read_prompts(request.prompts)
    source = read_source(request.source, prompts)
    refuse_bad(source, request.skip_bad)
    scorer = Scorer(request.output / "journal", source.items, ranks, request.skip_bad)
    device = (
        f"cuda:{ranks.rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    )
    frames, weights = [], {}
    for name, config in rewards.items():
        model = load_reward(config, device)
        frames.append(scorer.score(name, model))
        weights[name] = model.weights_hash
        del model  # before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    scores = pd.concat(frames, ignore_index=True)
    if ranks.main:
        _write(request, source, scorer, scores, weights)
    return scores


def _write(
    request: Request,
    source: Source,
    scorer: Scorer,
    scores: pd.DataFrame,
    weights: dict[str, str],
) -> None:
    bad = [*source.bad, *scorer.findings.skipped]
    lines = summary.summarise(scores)
    with atomic_path(request.output / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    with atomic_path(request.output / "summary.csv") as temporary:
        summary.as_frame(lines).to_csv(temporary, index=False)
    with atomic_path(request.output / "skipped.csv") as temporary:
        pd.DataFrame(bad, columns=["item", "reason"]).to_csv(temporary, index=False)
    runs.write_manifest(
        request.output,
        {
            "stage": "score",
            "images": len(scorer.items),
            "images_sha256": content_hash(scorer.keys),
            "prompts_sha256": None if request.prompts is None else sha256_file(request.prompts),
            "skipped": len(bad),
            "too_long": scorer.findings.too_long,
            "batch_size": scorer.findings.batch_size,
            "provenance": runs.provenance(weights),
        },
    )
    console = Console(file=sys.stdout)
    summary.show(lines, scorer.findings.too_long, console)
    for name, reason in bad:
        console.print(f"skipped {name}: {reason}", markup=False, highlight=False)
    console.print(f"{request.output / 'scores.parquet'}", markup=False, highlight=False)

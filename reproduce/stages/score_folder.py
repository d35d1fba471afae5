"""Scores a folder or manifest of images with reward models: ``g2rpo score``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
from filelock import FileLock

from benchmarks.evaluation.scoring import summary
from benchmarks.evaluation.scoring.engine import COLUMNS, Ranks, Scorer
from benchmarks.evaluation.scoring.items import Source, first_of, read_source, refuse_bad
from g2rpo.checksums import FILES, problems
from g2rpo.config import content_hash, merge, nearest, validate
from g2rpo.data.prompts import read_prompt_set
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, atomic_write_text, check_writable, sha256_file, write_json
from g2rpo.provenance import provenance
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import REWARDS, load_reward, reward_class
from g2rpo.terminal import literal, wide_console
from g2rpo.text import is_unicode, visible
from reproduce.experiment import Profile, reward_configs
from reproduce.runs.folders import MANIFEST, listed, write_manifest

SCORES = "scores.parquet"
OUTPUTS = (SCORES, "scores.csv", "summary.csv", "summary.json", "skipped.csv")
"""The files of a folder of scores, besides its manifest."""


@dataclass(frozen=True)
class Request:
    """Images to score: a folder with its prompt set, or a manifest; and the output folder.

    With ``skip_bad``, images that cannot be scored are skipped and listed.
    """

    source: Path
    prompts: Path | None
    output: Path
    skip_bad: bool = False


def default_output(source: Path) -> Path:
    """The default output folder: ``SOURCE-scores`` next to the source."""
    whole = source.resolve()
    return whole.with_name(f"{whole.name}-scores")


def chosen_rewards(
    profile: Profile,
    names: Sequence[str],
    overrides: Mapping[str, Any],
    batch_size: int | None = None,
) -> dict[str, RewardConfig]:
    """The reward models called ``names`` in ``profile``, or as published, with ``overrides``.

    Args:
        profile: the profile.
        names: names of rewards; empty for all of the profile.
        overrides: changed settings by reward.
        batch_size: images per batch; None for each reward's default.

    Raises:
        UserError: there is no such reward, or an override is invalid.
    """
    own = reward_configs(profile)
    known: dict[str, dict[str, Any]] = {name: {"model": name} for name in REWARDS}
    known |= {name: config.model_dump(mode="json") for name, config in own.items()}
    for name in (*names, *overrides):
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"profile {profile.name} has no reward {name!r}; {hint}")
    chosen = {name: known[name] for name in names or own}
    for name, changes in overrides.items():
        if name not in chosen:
            raise UserError(f"-s {name}: not among the rewards to score; add it to --rewards")
        if not isinstance(changes, Mapping) or "model" in changes:
            raise UserError(
                f"-s {name}: expected a setting of the reward, e.g. -s {name}.batch_size=8"
            )
    size = {} if batch_size is None else {"batch_size": batch_size}
    return {
        name: validate(
            RewardConfig,
            merge(settings, size, overrides.get(name, {})),
            f"reward {name}",
        )
        for name, settings in chosen.items()
    }


def score(request: Request, rewards: Mapping[str, RewardConfig]) -> pd.DataFrame:
    """Writes :data:`OUTPUTS` and ``manifest.json``, and prints a table.

    An interrupted run resumes. Scores of other rewards from an earlier run are kept if they are of
    the same images and prompts.

    Raises:
        UserError: an image cannot be scored, or imported scores would be lost; finished scores are
            kept.
    """
    ranks = Ranks.launched()
    source = read_items(request, ranks)
    for name, config in rewards.items():
        prompts = [item.prompt for item in source.items]
        source.refuse_prompts(name, reward_class(config).unscorable(config, prompts))
    refuse_bad(source, request.skip_bad)
    if ranks.main:
        earlier_scores(request.output)  # before all images are read
    aspect = min(reward_class(config).largest_aspect for config in rewards.values())
    scorer = Scorer(request.output / "journal", source.items, ranks, request.skip_bad, aspect)
    if ranks.main:
        nothing = np.zeros(len(scorer.items))
        planned = [scorer.rows(name, ("", "", None), scorer.items, nothing) for name in rewards]
        _kept_of_earlier(request.output, pd.concat(planned))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"cuda:{ranks.local % count}" if count else "cpu"
    frames = []
    for name, config in rewards.items():
        model = load_reward(config, device)
        frames.append(scorer.score(name, model))
        del model  # before the next one is loaded
        if count:
            torch.cuda.empty_cache()
    scores = pd.concat(frames, ignore_index=True)
    if ranks.main:
        with writing_alone(request.output):  # another command may have added scores meanwhile
            earlier, dropped = _kept_of_earlier(request.output, scores)
            scores = pd.concat([*earlier, scores], ignore_index=True)
            settings = {name: config.model_dump(mode="json") for name, config in rewards.items()}
            write_scores(request, settings, source, scorer, scores)
        for name in dropped:
            typer.echo(visible(f"dropped earlier scores of {name}: other images or prompts"))
    return scores


def writing_alone(output: Path) -> FileLock:
    """A lock that keeps other commands from writing to ``output`` while its scores change."""
    return FileLock(output / ".writing.lock")


def _kept_of_earlier(output: Path, scores: pd.DataFrame) -> tuple[list[pd.DataFrame], list[str]]:
    """What :func:`still_valid` returns for the earlier scores in ``output``.

    Raises:
        UserError: imported scores, which cannot be scored again, would be replaced or dropped.
    """
    kept, dropped = still_valid(earlier_scores(output), scores)
    imported = {
        name
        for name, settings in listed(output / MANIFEST, "rewards").items()
        if "imported" in settings
    }
    lost = sorted(imported & {*dropped, *scores["reward"]})
    if lost:
        raise UserError(
            f"{output}: has imported scores of {', '.join(lost)}, which would be lost; choose "
            "another --output"
        )
    return kept, dropped


def read_items(request: Request, ranks: Ranks) -> Source:
    """The images to score; prints which columns were read.

    Raises:
        UserError: an image cannot be scored and is not skipped, or none can.
    """
    known = None if request.prompts is None else read_prompt_set(request.prompts)
    source = read_source(request.source, None if known is None else known.prompts)
    if known is not None and known.note:
        source.notes.append(known.note)
    for note in source.notes if ranks.main else ():
        typer.echo(visible(note))
    refuse_bad(source, request.skip_bad)
    return source


def _check_writable(output: Path) -> None:
    """Checks that the results can be written, before anything is loaded."""
    if not is_unicode(str(output.absolute())):  # which Parquet cannot write to
        raise UserError(f"{output}: path is not UTF-8; choose another --output")
    for folder in (output, output / "journal"):
        check_writable(folder, "--output")
    for name in (*OUTPUTS, MANIFEST):
        if (output / name).is_dir():
            raise UserError(f"{output / name}: is a folder; choose another --output")


def earlier_scores(output: Path) -> pd.DataFrame | None:
    """The scores of an earlier run; None if there is none.

    Raises:
        UserError: they are damaged, or results cannot be written to ``output``.
    """
    _check_writable(output)
    path = output / SCORES
    if not path.is_file():
        return None
    for damaged, problem in problems(path.parent, listed(path.with_name(MANIFEST), FILES)):
        if damaged.name == path.name:
            raise UserError(f"{damaged} {problem}; delete it and score again")
    try:
        old = pd.read_parquet(path)
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; delete it and score again") from None
    if not set(COLUMNS) <= set(old.columns):
        raise UserError(f"{path}: not written by `g2rpo score`; choose another --output")
    return old


def still_valid(
    old: pd.DataFrame | None, scores: pd.DataFrame
) -> tuple[list[pd.DataFrame], list[str]]:
    """Earlier rows of other rewards, and the rewards whose rows no longer match."""
    if old is None:
        return [], []
    old = old[~old["reward"].isin(scores["reward"].unique())]
    what = ["id", "prompt", "image_sha256"]
    about = list(COLUMNS[: COLUMNS.index("reward")])  # groups and styles may have changed
    now = scores[about].drop_duplicates("id")
    kept, dropped = [], []
    for reward, rows in old.groupby("reward", sort=False):
        matched = now.merge(rows[[*what, *COLUMNS[len(about) :]]], on=what)
        if len(rows) == len(now) == len(matched):
            kept.append(matched)
        else:
            dropped.append(str(reward))
    return kept, dropped


def write_scores(
    request: Request,
    settings: Mapping[str, Any],
    source: Source,
    scorer: Scorer,
    scores: pd.DataFrame,
) -> None:
    """Writes and prints ``scores``; ``settings``: how this run's rewards were scored."""
    bad = [*source.bad, *scorer.skipped]
    scored = len(scorer.items)
    if scored + len(bad) != source.found:
        raise RuntimeError(f"{source.found} found, but {scored} scored and {len(bad)} skipped")
    lines = summary.summarise(scores)
    skipped = pd.DataFrame(bad, columns=["item", "reason"])
    texts = {
        "scores.csv": summary.exact_csv(scores),
        "summary.csv": summary.as_csv(summary.as_frame(lines)),
        "skipped.csv": summary.as_csv(skipped),
    }
    counts = {"images": scored, "skipped": len(bad)}
    hashes = scores.groupby("reward", sort=False)["weights_hash"].first()
    weights = {str(reward): str(sha256) for reward, sha256 in hashes.items()}
    findings = {
        "rewards": dict(settings),
        "too_long": scorer.too_long,
        "batch_size": scorer.batch_size,
        "waiting": scorer.waiting,
    }
    for section, found in findings.items():
        earlier = listed(request.output / MANIFEST, section)
        kept = {name: value for name, value in earlier.items() if name in weights}
        findings[section] = kept | found
    manifest = {
        "stage": "score",
        **counts,
        "images_sha256": content_hash(scorer.keys),
        "prompts_sha256": None if request.prompts is None else sha256_file(request.prompts),
        **findings,
        "provenance": provenance(weights),
    }
    # Without checksums, so that it matches old and new files if this process is killed now.
    write_manifest(request.output, manifest)
    with atomic_path(request.output / SCORES) as temporary:
        scores.to_parquet(temporary, index=False)
    for name, text in texts.items():
        atomic_write_text(request.output / name, text)
    write_json(request.output / "summary.json", counts | {"lines": summary.as_records(lines)})
    write_manifest(request.output, manifest, [request.output / name for name in OUTPUTS])
    console = wide_console()
    summary.show(lines, scorer.too_long, console)
    for name, reason in bad:
        console.print(literal(f"skipped {name}: {reason}"), soft_wrap=True)
    console.print(literal(str(request.output / SCORES)), soft_wrap=True)
    rest = f"; {len(bad)} skipped: {first_of(bad)}" if bad else ""
    console.print(literal(f"scored {scored} of {source.found}{rest}"), soft_wrap=True)

"""``g2rpo evaluate``: any model against its base, on the prompts and rewards of a suite.

The command writes an experiment of two cells and a profile as YAML, and reproduces them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
import yaml
from pydantic import Field

from g2rpo.config import (
    StrictModel,
    content_hash,
    load_yaml,
    merge,
    nearest,
    parse_overrides,
    validate,
)
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text, check_writable
from g2rpo.terminal import plain_table, wide_console
from reproduce.bundled import absolute, bundled_names, named_file
from reproduce.commands.options import ClusterName, Publish, Results, layout_of
from reproduce.commands.run import Detach, Jobs, reproduce

if TYPE_CHECKING:
    from g2rpo.hub.catalogue import Artifact
    from g2rpo.policy import CheckpointConfig
    from reproduce.experiment import Profile

DEFAULT_PROFILES = ("flux", "sd35")
"""The profiles of published bases, one for each architecture."""
SLUG_LENGTH = 40


class Suite(StrictModel):
    """Prompts and the rewards that score their images."""

    description: str
    prompts: str
    """The prompt file, relative to the YAML, else to the current folder or the repository."""
    fetch: str | None = None
    """The command that fetches it."""
    rewards: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name, what to change of the profile's reward of that name, else of the published one."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Changes to the profile's protocol."""


class Evaluated(NamedTuple):
    """A model and its base.

    Attributes:
        label: the model's name in the table.
        base: pipeline folder or hub id; the model itself if it is a whole pipeline without a base.
        checkpoint: the model's weights over the base; None if it is a whole pipeline.
        train: its training rewards, if known.
        published: its entry in the catalogue, if it has one.
    """

    label: str
    base: str | None
    checkpoint: "CheckpointConfig | None" = None
    train: tuple[str, ...] = ()
    published: "Artifact | None" = None


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Pipeline folder, LoRA, transformer, run folder, or a published model's name."
        ),
    ],
    suite: Annotated[
        str, typer.Option(help=f"{', '.join(bundled_names('suites'))}, or a YAML file.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Pipeline folder or hub id of its base; default: the recorded one."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(bundled_names('protocols'))}; default: the profile's."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Profile with precision, hardware and rewards; default: the base's."),
    ] = None,
    cluster: ClusterName = "auto",
    jobs: Jobs = None,
    detach: Detach = False,
    results: Results = Path("results"),
    publish: Publish = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Evaluation setting, e.g. -s images=4; repeatable."),
    ] = None,
) -> None:
    """Sample and score a model and its base, and compare them prompt by prompt.

    If interrupted, run the same command to resume.
    """
    settings = parse_overrides(overrides or [])  # before the imports, which take seconds
    from reproduce.jobs.runner import build_assets

    file = named_file("suites", suite)
    chosen_suite = validate(Suite, load_yaml(file), f"suite {file}")
    found = find_model(model, base)
    chosen = _profile(found, profile)
    if protocol is not None:
        named_file("protocols", protocol)
    prompts = prompt_file(chosen_suite, file)
    chosen_suite = chosen_suite.model_copy(update={"prompts": prompts})
    layers = [chosen_suite.evaluation, {"preset": protocol}, settings]
    data = _profile_data(chosen, chosen_suite, found, layers, file)
    name = f"{_slug(Path(suite).stem)}-{_slug(found.label)}"
    digest = content_hash([model, data["policy"], data["prompts"], data["evaluation"]])
    experiment = _experiment_data(f"{name}-{digest[:6]}", found, data, suite)
    check_writable(results, "--results")
    build_assets(chosen)
    _check(found, data)
    layout = layout_of(results, publish=publish)
    folder = layout.experiment(chosen.name, experiment["name"])
    for stem, content in (("experiment", experiment), ("profile", data)):
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        atomic_write_text(folder / f"{stem}.yaml", text)
    reproduce(
        str(folder / "experiment.yaml"),
        str(folder / "profile.yaml"),
        cluster=cluster,
        jobs=jobs,
        detach=detach,
        results=results,
        publish=publish,
    )
    if not detach and found.checkpoint is not None:
        _print_differences(folder / f"{experiment['name']}.json")


def prompt_file(suite: Suite, file: Path) -> str:
    """The prompts of the suite in ``file``: beside it, or else here or in the repository.

    Raises:
        UserError: there is no such file.
    """
    beside = str(file.parent / suite.prompts)
    for path in (beside, suite.prompts):
        if Path(absolute(path)).exists():
            return path
    if suite.fetch is not None:
        raise UserError(f"{suite.prompts}: no such prompt file; run `{suite.fetch}`")
    places = " or ".join(dict.fromkeys((beside, suite.prompts)))
    raise UserError(f"{places}: no such prompt file; correct prompts in {file}")


def find_model(name: str, base: str | None) -> Evaluated:
    """What ``name`` is, and its base: ``base`` if given.

    Raises:
        UserError: there is no such model.
    """
    from g2rpo.hub.catalogue import catalogue
    from g2rpo.policy import CheckpointConfig
    from g2rpo.policy.folder import HUB_ID
    from reproduce.experiment.fingerprint import checkpoint_run
    from reproduce.runs.folders import read_settings

    path = Path(name).expanduser()
    label = path.resolve().name if path.exists() else name
    run = checkpoint_run(CheckpointConfig(source=name))
    if run is not None:
        settings = read_settings(run) or {}
        base = base or settings["policy"]["source"]
        return Evaluated(label, base, CheckpointConfig(source=name), tuple(settings["rewards"]))
    known = {a.name: a for a in catalogue().artifacts if a.purpose in ("policy", "checkpoint")}
    named = () if path.exists() else known.values()
    entry = next((a for a in named if name in (a.name, a.repo)), None)
    if (path / "model_index.json").is_file() or (entry and entry.purpose == "policy"):
        source, inside = (entry.repo, "transformer") if entry else (name, None)
        if base is None:
            return Evaluated(label, source)
        return Evaluated(label, base, CheckpointConfig(source=source, subfolder=inside))
    if entry is not None:
        weights = next(Path(f.path) for f in entry.files if f.path.endswith(".safetensors"))
        inside = str(weights.parent) if weights.parent != Path() else None
        checkpoint = CheckpointConfig(source=entry.repo, subfolder=inside, file=weights.name)
        return Evaluated(label, base or entry.base, checkpoint, published=entry)
    weights_folder = path / "transformer" if (path / "transformer").is_dir() else path
    if path.is_dir() and not any(weights_folder.glob("*.safetensors*")):
        raise UserError(
            f"{name}: no model: it contains no *.safetensors; give a pipeline folder, a LoRA, a "
            "transformer, a run folder, a published model's name, or a hub id with --base"
        )
    if path.exists() or (base is not None and HUB_ID.fullmatch(name)):
        return Evaluated(label, base, CheckpointConfig(source=name))
    raise UserError(
        f"{name}: no such folder or file, and not a published model ({nearest(name, known)}); "
        "another model on the hub also needs --base"
    )


def _profile(found: Evaluated, name: str | None) -> "Profile":
    """The profile ``name``, else the one of the base's architecture."""
    from g2rpo.policy.size import pipeline_of
    from reproduce.experiment import load_profile

    if name is not None:
        return load_profile(name)
    if found.base is None:
        raise UserError(
            f"{found.label}: weights without a base; name it with --base, e.g. --base "
            "black-forest-labs/FLUX.1-dev"
        )
    profiles = [load_profile(default) for default in DEFAULT_PROFILES]
    policy = profiles[0].policy.model_copy(update={"source": found.base})
    return next(one for one in profiles if pipeline_of(one.policy) == pipeline_of(policy))


def _profile_data(
    profile: "Profile",
    suite: Suite,
    found: Evaluated,
    layers: Sequence[Mapping[str, Any]],
    file: Path,
) -> dict[str, Any]:
    """The profile with the model's base, and with the prompts, rewards and protocol of ``file``."""
    from g2rpo.rewards.registry import REWARDS
    from reproduce.experiment.profile import with_preset
    from reproduce.experiment.resolving import given

    data = given(profile)
    if found.base not in (None, profile.policy.source):
        data["policy"] |= {"source": found.base, "revision": None, "pipeline": None}
    rewards = {
        name: merge(data["rewards"].get(name, {"model": name}), changes)
        for name, changes in suite.rewards.items()
    }
    for name, config in rewards.items():
        if config["model"] not in REWARDS:
            hint = nearest(config["model"], REWARDS)
            raise UserError(
                f"suite {file}: rewards.{name}: no reward model {config['model']!r}; {hint}"
            )
    # Every prompt of the suite, and only what it scores.
    whole = {"split": "test", "limit": None, "diversity": None, "drift": None}
    evaluation = merge(data["evaluation"], whole, *map(with_preset, layers))
    files = data["prompts"] | {"test": suite.prompts}
    changed = {"prompts": files, "rewards": rewards, "evaluation": evaluation, "truth": None}
    return data | changed


def _experiment_data(
    name: str, found: Evaluated, profile: Mapping[str, Any], suite: str
) -> dict[str, Any]:
    """An experiment with the base and the model as cells; with the model alone if it has none."""
    cells: dict[str, Any] = {"model": {"label": found.label}}
    if found.checkpoint is not None:
        trained = [reward for reward in found.train if reward in profile["rewards"]]
        checkpoint = found.checkpoint.model_dump(exclude_none=True)
        cells["model"] |= {"group": "", "train": trained, "checkpoint": checkpoint}
        cells = {"base": {"label": f"Base: {Path(profile['policy']['source']).name}"}, **cells}
    table = {
        "title": f"{found.label}, suite {suite}",
        "row_label": "Model",
        "focus": ["model"],
        "baseline": "base" if "base" in cells else None,
        "costs": [],
    }
    return {"name": name, "cells": cells, "table": table}


def _check(found: Evaluated, data: Mapping[str, Any]) -> None:
    """Refuses what would only fail once the base has been sampled.

    Raises:
        UserError: a setting is invalid, weights are missing, or they do not fit the base.
    """
    from g2rpo.data.prompts import read_prompts
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state
    from g2rpo.policy.checkpoint import find_checkpoint
    from g2rpo.policy.size import assumption
    from g2rpo.rewards.registry import check_prompts
    from g2rpo.rewards.server import read_key
    from reproduce.experiment import Profile, reward_configs
    from reproduce.experiment.fingerprint import checkpoint_run
    from reproduce.experiment.weights import missing_weights

    profile = validate(Profile, data, "evaluation")
    texts = [prompt.text for prompt in read_prompts(Path(absolute(profile.prompts.test)))]
    rewards = reward_configs(profile)
    for name, config in rewards.items():
        if config.server is not None:
            read_key(config.server.api_key_env, f"rewards.{name}.server.api_key_env")
    check_prompts(rewards.values(), texts)
    policy = profile.policy.model_copy(update={"source": absolute(profile.policy.source)})
    if (problem := assumption(policy)) is not None:
        if Path(policy.source).exists():
            raise UserError(f"{policy.source}: no model_index.json; --base is a pipeline folder")
        raise UserError(
            f"{problem.partition(', so')[0]}; correct --base, or fetch it with `hf download "
            f"{policy.source}`"
        )
    absent = [state.artifact.name for state in missing_weights(profile)]
    if found.published is not None and not artifact_state(found.published, read_lock()).is_whole:
        absent.append(found.published.name)
    if absent:
        raise UserError(
            f"weights are missing or damaged; run `g2rpo weights fetch {' '.join(absent)}`"
        )
    if found.checkpoint is not None and checkpoint_run(found.checkpoint) is None:
        from g2rpo.policy.load import check_checkpoint  # slow: model libraries

        check_checkpoint(policy, find_checkpoint(found.checkpoint))


def _print_differences(path: Path) -> None:
    """Prints the model's differences from its base, paired over prompts, of a rendered table."""
    from benchmarks.evaluation.statistics import p_text, signed
    from reproduce.tables.model import Table

    table = Table.model_validate_json(path.read_text(encoding="utf-8"))
    shown = plain_table("Model - base, by prompt", "Difference", "95% interval", "p (Holm)")
    for one in table.asked("baseline"):
        column = table.column(one.reward)
        ends = " to ".join(signed(end, column.digits) for end in (one.low, one.high))
        shown.add_row(column.label, signed(one.difference, column.digits), ends, p_text(one.p_holm))
    wide_console().print(shown)


def _slug(text: str) -> str:
    """``text`` as part of the name of a folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:SLUG_LENGTH].strip("-")
    return slug or "model"

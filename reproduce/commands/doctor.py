"""``g2rpo doctor``: whether a cluster profile fits its cluster, and what a scale needs is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError

if TYPE_CHECKING:
    from reproduce.experiment import Profile
    from slurm.doctor.finding import Finding, Options
    from slurm.graph import Needs

DISK_GB = {"replicated": 1.0, "lora": 50.0, "sharded": 300.0}
"""Free space that is worth a warning, by engine. A checkpoint of all of FLUX.1 to go on from (12 G
parameters and AdamW's two moments in float32) is about 144 GB; two are there at times."""
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    cluster: Annotated[
        str,
        typer.Option("--cluster", help="auto, slurm, local, debug, a bundled profile, or a YAML."),
    ] = "auto",
    profile: Annotated[
        str, typer.Option("--profile", help="The scale that is to run: smoke, mini, flux, a YAML.")
    ] = "mini",
    results: Annotated[
        Path, typer.Option("--results", help="The folder that jobs will write to.")
    ] = Path("results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Submit no job: only ask SLURM, and look here.")
    ] = False,
) -> None:
    """Check that a cluster profile fits its cluster, with a tiny job that looks around there.

    Nothing is left behind. Exit code 2 where something would keep jobs from running.
    """
    from reproduce.experiment import load_profile
    from slurm.cluster import load_cluster
    from slurm.doctor.examine import examine

    chosen = load_profile(profile)
    place = load_cluster(cluster, gpus=chosen.hardware.gpus)
    weights, cached = examine_weights(profile)
    options = options_of(chosen, cached, quick=quick)
    findings = [*examine(place, wanted_by(chosen), results, options), *weights]
    print_findings(findings)
    conclude(findings, f"cluster {place.name}, profile {chosen.name}")


def wanted_by(profile: "Profile") -> dict[str, "Needs"]:
    """The devices of each kind of stage of a profile."""
    from slurm.graph import Needs

    hardware = profile.hardware
    evaluation = Needs(1, hardware.evaluation_devices)
    return {
        "embed": evaluation,
        "train": Needs(hardware.training_ranks, hardware.gpus),
        "sample": evaluation,
        "score": evaluation,
        "credit": Needs(hardware.training_ranks, hardware.gpus),
        "render": Needs(),
    }


def options_of(profile: "Profile", cached: Sequence[str], *, quick: bool) -> "Options":
    """What else is looked for.

    Args:
        profile: the profile.
        cached: published weights that it needs and that are cached here.
        quick: whether no job is submitted.
    """
    from slurm.doctor.finding import Options

    return Options(
        shares=profile.hardware.evaluation_shares,
        gpu_memory_gb=profile.hardware.gpu_memory_gb,
        disk_gb=DISK_GB[profile.hardware.engine],
        modules=("reproduce.stages.cell_stages", "g2rpo.training.loop"),
        files=needed_files(profile),
        artifacts=tuple(cached),
        quick=quick,
        tell=lambda line: typer.echo(line, err=True),
    )


def needed_files(profile: "Profile") -> tuple[Path, ...]:
    """The prompt files, and the folders of weights that are no published ones."""
    from reproduce.experiment import ROOT

    if profile.build is not None:  # it makes its own when it runs
        return ()
    prompts = profile.prompts
    sources = [profile.policy.source, *(config.source for config in profile.rewards.values())]
    local = [each for each in sources if each is not None and (ROOT / each).exists()]
    named = dict.fromkeys([prompts.train, prompts.validation, prompts.test, *local])
    return tuple(ROOT / each for each in named)


def examine_weights(profile: str) -> tuple[list["Finding"], list[str]]:
    """Whether the published weights of a profile are cached here, and those that are by name."""
    from g2rpo.hub.catalogue import catalogue
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state
    from reproduce.commands.weights import WEIGHTS, needed_by_profile
    from slurm.doctor.finding import Finding, listed

    needed = needed_by_profile(profile, catalogue().select([], WEIGHTS))
    if not needed:
        return [Finding("ok", "weights", "no published ones are needed")], []
    lock = read_lock()
    words = {artifact.name: artifact_state(artifact, lock).word for artifact in needed}
    cached = [name for name, word in words.items() if word in ("cached", "locked")]
    absent = [f"{name} ({word})" for name, word in words.items() if name not in cached]
    if not absent:
        return [Finding("ok", "weights", f"all {len(words)} cached here")], cached
    found = f"{len(cached)} of {len(words)} cached here; not {listed(absent)}"
    mend = f"`g2rpo weights fetch --profile {profile}` where there is a network"
    return [Finding("failed", "weights", found, mend)], cached


def print_findings(findings: Sequence["Finding"]) -> None:
    """A table on standard output; nothing is cut where it is not a terminal."""
    from reproduce.commands.console import literal, plain_table, wide_console

    table = plain_table("", "what", "found", "how to mend it")
    for finding in findings:
        word = literal(finding.word, COLOURS[finding.word])
        table.add_row(word, finding.what, finding.found, finding.mend)
    wide_console().print(table)


def conclude(findings: Sequence["Finding"], what: str) -> None:
    """Prints the verdict.

    Raises:
        UserError: something failed.
    """
    failed = [finding for finding in findings if finding.word == "failed"]
    warnings = sum(finding.word == "warning" for finding in findings)
    if failed:
        first = failed[0]
        mend = f"; {first.mend}" if first.mend else ""
        raise UserError(
            f"{what}: {len(failed)} of {len(findings)} checks failed; the first: {first.what}: "
            f"{first.found}{mend}"
        )
    told = "1 warning" if warnings == 1 else f"{warnings or 'no'} warnings"
    typer.echo(f"{what}: ready, {told}")

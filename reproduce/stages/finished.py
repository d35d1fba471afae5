"""Whether a stage of a cell is done: what later stages need of it is there and undamaged.

Nothing here imports a model library: plans and states are asked for on login nodes.
"""

import re
from pathlib import Path
from typing import Any

from g2rpo.checksums import FILES
from reproduce.experiment import ResolvedCell, judges
from reproduce.experiment import fingerprint as runs
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import (
    read_document,
    read_manifest,
    read_scored,
    read_trained,
    sound,
)
from reproduce.stages.shares import WHOLE, Share


def is_trained(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether the cell needs no (more) training."""
    return cell.train is None or sound(read_trained, layout.training(cell)) is not None


def has_training_record(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether what tables tell of the training is there: all of it but its weights."""
    return cell.train is None or sound(read_manifest, layout.training(cell)) is not None


def is_sampled(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> bool:
    """Whether the held-out images of ``share`` are there, or were and have been scored."""
    folder = layout.evaluation(cell)
    # Once scored, most images are deleted on purpose.
    if is_scored(cell, layout, share) or sampled_files(folder, share) is not None:
        return True
    # All of them may have been sampled in another number of shares.
    names = (path.name for path in sampled_path(folder, share).parent.glob("*-images.json"))
    found = (re.fullmatch(r"\d+-of-0*([1-9]\d*)-images\.json", name) for name in names)
    counts = {int(match[1]) for match in found if match}
    return any(
        all(sampled_files(folder, Share(index, count)) is not None for index in range(count))
        for count in counts
    )


def sampled_files(folder: Path, share: Share) -> dict[str, Any] | None:
    """What the sampling of ``share`` has recorded when it was complete; None where it is not."""
    return sound(lambda path: read_document(path, (FILES,)), sampled_path(folder, share))


def wanted_rewards(cell: ResolvedCell) -> dict[str, Any]:
    """What every judge of the profile is, by its name in tables."""
    return {name: runs.reward_inputs(config) for name, config in judges(cell.profile).items()}


def is_scored(cell: ResolvedCell, layout: Layout, share: Share | None = None) -> bool:
    """Whether every judge of the profile has scored the cell's images, or those of ``share``."""
    folder = layout.evaluation(cell)
    manifests = [sound(read_scored, folder)]
    if share is not None:  # scored anew by other judges, and not yet put together
        manifests.append(share_manifest(folder, share))
    # What the judges are is asked last: nothing is scored where their weights are not here yet.
    return any(
        found is not None and found.get("rewards") == wanted_rewards(cell) for found in manifests
    )


def share_stem(folder: Path, share: Share) -> Path:
    """The path, less its suffix, of the scores of a share of the evaluation in ``folder``."""
    return folder / "shares" / str(share)


def sampled_path(folder: Path, share: Share) -> Path:
    """The document that completes the sampling of a share of the evaluation in ``folder``."""
    return folder / "shares" / f"{share}-images.json"


def share_manifest(folder: Path, share: Share) -> dict[str, Any] | None:
    """The manifest of a share's scores; None while they are not all there, or one is damaged."""
    path = share_stem(folder, share).with_suffix(".json")
    return sound(lambda found: read_document(found, ("rewards", "provenance")), path)

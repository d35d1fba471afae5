"""Whether a stage of a cell is complete. Nothing here imports a model library, unless images that
are half there have to be looked at: plans and states are asked for on login nodes.
"""

from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from reproduce import runs
from reproduce.experiment import ResolvedCell, judges
from reproduce.layout import Layout
from reproduce.run_folders import read_document, sound_manifest
from reproduce.shares import WHOLE, Share


def is_trained(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether the cell needs no (more) training."""
    return cell.train is None or sound_manifest(layout.training(cell)) is not None


def is_sampled(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> bool:
    """Whether the held-out images of ``share`` are there, or were and have been scored."""
    folder = layout.evaluation(cell)
    if not folder.exists():
        return False
    # Once scored, most images are deleted on purpose.
    if is_scored(cell, layout, share):
        return True
    from reproduce.stages import are_images_there  # imports the model libraries: seconds

    return are_images_there(cell, layout, share)


def wanted_rewards(cell: ResolvedCell) -> dict[str, Any]:
    """What every judge of the profile is, by its name in tables."""
    return {name: runs.reward_inputs(config) for name, config in judges(cell.profile).items()}


def is_scored(cell: ResolvedCell, layout: Layout, share: Share | None = None) -> bool:
    """Whether every judge of the profile has scored the cell's images, or those of ``share``."""
    folder = layout.evaluation(cell)
    manifests = [sound_manifest(folder)]
    if share is not None:  # scored anew by other judges, and not yet put together
        manifests.append(share_manifest(folder, share))
    # What the judges are is asked last: nothing is scored where their weights are not here yet.
    return any(
        found is not None and found.get("rewards") == wanted_rewards(cell) for found in manifests
    )


def share_stem(folder: Path, share: Share) -> Path:
    """The path, less its suffix, of the scores of a share of the evaluation in ``folder``."""
    return folder / "shares" / str(share)


def share_manifest(folder: Path, share: Share) -> dict[str, Any] | None:
    """The manifest of a share's scores; None while they are not all there, or it is damaged."""
    path = share_stem(folder, share).with_suffix(".json")
    try:
        return read_document(path, ("rewards", "provenance"))
    except UserError:
        return None

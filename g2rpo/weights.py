"""Checks the tensors of a weights file against those of a model."""

from collections.abc import Mapping, Sequence

from g2rpo.errors import UserError


def check_shapes(
    given: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], label: str, fix: str
) -> None:
    """Compares the names and shapes of tensors in a file with those in a model.

    Raises:
        UserError: they differ; names ``label``, the first difference and the ``fix``.
    """
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise UserError(
            f"{label}: not the weights of this model: {what} ({len(missing)} tensors missing, "
            f"{len(unknown)} unknown); {fix}"
        )
    for key, shape in given.items():
        if list(shape) != list(wanted[key]):
            raise UserError(
                f"{label}: {key} has shape {list(shape)}, expected {list(wanted[key])}; {fix}"
            )

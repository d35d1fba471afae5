"""The objectives by name: what a run minimises, on its transitions or on the forward process."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from g2rpo.config import nearest
from g2rpo.training.forward import AWM, DGPO, NFT
from g2rpo.training.objective import DPPO, Clipped, Guard

AnyObjective = Clipped | Guard | DPPO | NFT | AWM | DGPO
OBJECTIVES: dict[str, type[AnyObjective]] = {
    kind.model_fields["name"].default: kind for kind in get_args(AnyObjective)
}


def parse_objective(value: Any) -> AnyObjective:
    """Builds an objective from its configuration mapping, by its ``name``.

    Raises:
        ValueError: no name, or an unknown objective (with the closest match).
        pydantic.ValidationError: a field is invalid.
    """
    if isinstance(value, BaseModel):
        return value  # type: ignore[return-value]
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError("expected a mapping with a name: " + ", ".join(OBJECTIVES))
    name = str(value["name"])
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name].model_validate(value)

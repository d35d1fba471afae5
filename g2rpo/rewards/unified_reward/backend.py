"""What answers questions: a model in this process or a server, behind one protocol."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Backend(Protocol):
    """Answers questions about images."""

    model: str
    """The model's name."""
    weights_hash: str
    """SHA-256 of the weights, or ``server:<model>`` where they cannot be seen."""
    settings: dict[str, Any]
    """All else that answers depend on, as JSON values."""

    def prepare(self, images: Sequence[Tensor], questions: Sequence[str]) -> Any:
        """What :meth:`ask` needs of N uint8 images ``[H, W, 3]``, on the CPU; thread-safe."""
        ...

    def ask(self, inputs: Any) -> list[str]:
        """The N answers.

        Raises:
            UserError: no answer can be had; says why.
        """
        ...

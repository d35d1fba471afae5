"""What one check found, and what all of them together say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Word = Literal["ok", "note", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        word: ``note`` is how things are, ``warning`` may get in the way of something,
            ``failed`` must be mended.
        found: what is there, or what is wrong.
        mend: how to mend it; empty where nothing has to be.
        seconds: how long it took, where that says something.
        memory: the most memory that it took, in bytes.
    """

    name: str
    word: Word
    found: str
    mend: str = ""
    seconds: float | None = None
    memory: int | None = None

    def row(self) -> tuple[str, str, str, str, str]:
        """The cells of its line in the report."""
        text = f"{self.found}: {self.mend}" if self.mend else self.found
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        memory = "" if self.memory is None else gibibytes(self.memory)
        return self.name, self.word, text, seconds, memory


def gibibytes(size: int) -> str:
    """Bytes for people: ``7.5 GiB``, ``64 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def sentence(findings: Sequence[Finding]) -> tuple[str, bool]:
    """The last line of the report, and whether everything that must work does."""
    failed = [finding.name for finding in findings if finding.word == "failed"]
    warnings = [finding.name for finding in findings if finding.word == "warning"]
    warned = f"; {len(warnings)} to look at: {', '.join(warnings)}" if warnings else ""
    if failed:
        return f"verdict: failed, to be mended: {', '.join(failed)}{warned}", False
    return f"verdict: ready{warned}", True

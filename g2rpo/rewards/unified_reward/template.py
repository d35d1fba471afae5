"""The question: a text with ``{prompt}`` where the caption goes, and the scale of its scores.

A template file may start with a header, ``scale: 1 to 5`` and a line ``---``; without one the
scale is 1 to 5. The hash is of the whole file, so that one number names all that is asked.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from g2rpo.rewards.unified_reward.config import QuestionConfig

OWN = "own"
OWN_FILE = Path(__file__).parent.parent / "templates" / "unified_reward_own.txt"
BESIDE_THE_MODEL = "question_template.txt"
PLACEHOLDER = "{prompt}"
PUBLISHERS = "CodeGoat24/"
_HEADER = re.compile(r"scale: ([0-9.]+) to ([0-9.]+)\r?\n---\r?\n")


@dataclass(frozen=True)
class Template:
    """A question's text (without its header), the SHA-256 of its file, and its scale."""

    text: str
    sha256: str
    low: float = 1.0
    high: float = 5.0

    def question(self, prompt: str) -> str:
        """The question about an image of ``prompt``."""
        # Not str.format: braces in the template or the prompt are ordinary characters.
        return self.text.replace(PLACEHOLDER, prompt)

    @classmethod
    def read(cls, path: Path) -> "Template":
        """Reads a template file.

        Raises:
            UserError: it is missing, not UTF-8, has no placeholder, or an impossible scale.
        """
        try:
            data = path.read_bytes()
            text = data.decode()
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a template ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: a template must be UTF-8 text") from None
        low, high = 1.0, 5.0
        header = _HEADER.match(text)
        if header is not None:
            text = text[header.end() :]
            try:
                low, high = float(header[1]), float(header[2])
            except ValueError:
                raise UserError(f"{path}: {header[0].splitlines()[0]!r} is no scale") from None
        if not low < high:
            raise UserError(f"{path}: the scale {low:g} to {high:g} is empty")
        if PLACEHOLDER not in text:
            raise UserError(f"{path}: the template has no {PLACEHOLDER} where the caption goes")
        return cls(text, hashlib.sha256(data).hexdigest(), low, high)


def choose_template(config: QuestionConfig, model: str, folder: Path | None = None) -> Template:
    """The template that ``config`` names for ``model``, whose files are in ``folder`` if any.

    Raises:
        UserError: none is named and the model brings none, it cannot be read, or it does not
            hash to what the configuration says.
    """
    if config.template == OWN:
        path = OWN_FILE
    elif config.template is not None:
        path = Path(config.template).expanduser()
    elif folder is not None and (folder / BESIDE_THE_MODEL).is_file():
        path = folder / BESIDE_THE_MODEL
    elif model.startswith(PUBLISHERS):
        raise UserError(
            f"reward unified_reward: {model} was trained on its authors' question, which is not "
            f"part of this project; save it as a file with {PLACEHOLDER} where the caption goes "
            "and set question.template to its path (see docs/unified_reward.md)"
        )
    else:
        raise UserError(
            f"reward unified_reward: no question is known for {model}; set question.template to "
            f"a file, or to {OWN!r} for the project's own question"
        )
    template = Template.read(path)
    if config.template_sha256 not in (None, template.sha256):
        raise UserError(
            f"{path}: the template's SHA-256 is {template.sha256}, not the configured "
            f"{config.template_sha256}; fetch the right one or correct question.template_sha256"
        )
    return template


def question_inputs(config: QuestionConfig) -> dict[str, Any]:
    """All of ``config`` that determines scores: the template by its hash, no addresses.

    A template that the model's folder brings is None here: it belongs to the folder's own hash.
    """
    inputs = config.model_dump(mode="json", include={"aggregate", "max_answer_tokens", "dtype"})
    named = config.template is not None
    inputs["template"] = choose_template(config, "").sha256 if named else None
    inputs["server"] = None if config.server is None else config.server.model
    return inputs

"""The question: a text with ``{prompt}`` in place of the caption, and the scale of its scores.

A template file may start with the header ``scale: 1 to 5`` and a line ``---``; the default scale is
1 to 5. Its hash covers the whole file.

The authors' question is not part of this project. It is in one of their example scripts, which is
fetched like weights and parsed; the script is never run.
"""

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from g2rpo.hub.fetch import fetched_file
from g2rpo.rewards.question import QuestionConfig

OWN, PUBLISHED = "own", "published"
QUESTION_ARTIFACT = "unified-reward-question"
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
    def of(cls, text: str) -> "Template":
        """A template of ``text`` alone, with the hash of ``text``."""
        return cls(text, hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def read(cls, path: Path) -> "Template":
        """Reads a template file.

        Raises:
            UserError: it is missing, not UTF-8, has no placeholder or an invalid scale.
        """
        try:
            data = path.read_bytes()
            text = data.decode()
        except OSError as error:
            raise UserError(f"{path}: cannot read the template ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        low, high = 1.0, 5.0
        header = _HEADER.match(text)
        if header is not None:
            text = text[header.end() :]
            try:
                low, high = float(header[1]), float(header[2])
            except ValueError:
                raise UserError(
                    f"{path}: {header[0].splitlines()[0]!r} is not a valid scale"
                ) from None
        if not low < high:
            raise UserError(f"{path}: the scale {low:g} to {high:g} is empty")
        if PLACEHOLDER not in text:
            raise UserError(f"{path}: no {PLACEHOLDER} for the caption")
        return cls(text, hashlib.sha256(data).hexdigest(), low, high)


def choose_template(
    config: QuestionConfig,
    model: str,
    folder: Path | None = None,
    default: Template | None = None,
) -> Template:
    """The template for ``model``, whose files are in ``folder`` if it is a local one.

    ``default``: the reward's own, where neither ``config`` nor ``folder`` has one.

    Raises:
        UserError: neither ``config`` nor the model has a template, it cannot be read, or its hash
            is not the configured one.
    """
    if config.template == PUBLISHED:
        return _checked(published_question(fetched_file(QUESTION_ARTIFACT)), PUBLISHED, config)
    if config.template == OWN:
        path = OWN_FILE
    elif config.template is not None:
        path = Path(config.template).expanduser()
    elif folder is not None and (folder / BESIDE_THE_MODEL).is_file():
        path = folder / BESIDE_THE_MODEL
    elif default is not None:
        return _checked(default, "the reward's question", config)
    elif model.startswith(PUBLISHERS):
        raise UserError(
            f"reward unified_reward: {model} was trained on its authors' question, which is not "
            f"part of this project; run `g2rpo weights fetch {QUESTION_ARTIFACT}` and set "
            f"question.template to {PUBLISHED!r}, or set it to a file"
        )
    else:
        raise UserError(
            f"reward unified_reward: no default question for {model}; set question.template to a "
            f"file, or to {OWN!r} for the project's own question"
        )
    return _checked(Template.read(path), str(path), config)


def _checked(template: Template, where: str, config: QuestionConfig) -> Template:
    if config.template_sha256 not in (None, template.sha256):
        raise UserError(
            f"{where}: the template's SHA-256 is {template.sha256}, but "
            f"question.template_sha256 is {config.template_sha256}; fix one of them"
        )
    return template


def parsed(script: Path) -> ast.Module:
    """The syntax tree of the authors' code, which is never run.

    Raises:
        UserError: it cannot be parsed.
    """
    try:
        return ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{script}: cannot be parsed ({error}); fetch it again") from None


def published_question(script: Path) -> Template:
    """The question in an example script: its only f-string with the variable ``prompt``.

    The hash covers the question alone, not the code around it.

    Raises:
        UserError: the script cannot be parsed, or does not have exactly one such f-string.
    """
    texts = {
        text
        for node in ast.walk(parsed(script))
        if isinstance(node, ast.JoinedStr) and (text := _template_text(node)) is not None
    }
    if len(texts) != 1:
        raise UserError(
            f"{script}: found {len(texts)} questions, expected 1; save the right one as a file and "
            "set question.template to it"
        )
    (text,) = texts
    return Template.of(text)


def _template_text(node: ast.JoinedStr) -> str | None:
    """The text with the placeholder for ``{prompt}``; None if it has other variables."""
    parts = []
    for value in node.values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            parts.append(value.value)
        elif (
            isinstance(value, ast.FormattedValue)
            and isinstance(value.value, ast.Name)
            and value.value.id == "prompt"
        ):
            parts.append(PLACEHOLDER)
        else:
            return None
    text = "".join(parts)
    return text if PLACEHOLDER in text else None


def question_inputs(config: QuestionConfig) -> dict[str, Any]:
    """The part of ``config`` that affects scores, with the template's hash.

    None stands for the template in the model's folder, which the folder's own hash covers.
    """
    inputs = config.model_dump(mode="json", include={"aggregate", "max_answer_tokens", "dtype"})
    named = config.template is not None
    inputs["template"] = choose_template(config, "").sha256 if named else None
    inputs["server"] = None if config.server is None else config.server.model
    if config.questions is not None:
        inputs["questions"] = sha256_file(Path(config.questions).expanduser())
    return inputs

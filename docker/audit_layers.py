"""Looks for secrets in every layer of an image and in its configuration.

A file that a later layer deletes is still in the image for whoever unpacks it, so the layers are
looked at one by one.

usage: audit_layers.py INSPECTED.json [--secret FILE]...
    INSPECTED.json  what `podman image inspect IMAGE` printed (overlay storage)
    --secret FILE   each line of FILE must not occur anywhere
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = re.compile(
    r"(^|/)(\.git|\.netrc|_netrc|\.pypirc|\.git-credentials|\.aws|\.ssh|\.env|id_(rsa|dsa|ecdsa|ed25519)"
    r"|\.docker/config\.json|\.cache/huggingface/(token|stored_tokens))$"
)
"""Files and folders that hold a caller's credentials or history."""
SETTINGS = re.compile(r"(^|/)(pip\.conf|\.?pip/pip\.conf|\.npmrc|uv\.toml)$")
"""Settings that may hold an index's password; the empty file under a mount does not."""
CONTENT = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{60,}\b"
    rb"|\bAKIA[0-9A-Z]{16}\b|\bpypi-AgE[\w-]{50,}"
    rb"|-----BEGIN (RSA |EC |OPENSSH |DSA |ENCRYPTED )?PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64,}"
)
"""Tokens of the Hugging Face hub, GitHub, AWS and PyPI, and private keys."""
VARIABLES = re.compile(r"^\w*(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|INDEX_URL)\w*=.", re.IGNORECASE)
LARGEST = 2**21
"""Bytes up to which a file's content is read: secrets are in small files."""
PUBLISHED = re.compile(r"/(site|dist)-packages/|/usr/share/doc/")
"""Published packages, installed by hash: what looks like a key there is one for their own tests."""


def layers_of(image: dict[str, Any]) -> list[Path]:
    """The folders of the layers in overlay storage."""
    data = image["GraphDriver"]["Data"]
    joined = ":".join(filter(None, (data.get("UpperDir"), data.get("LowerDir"))))
    return [Path(path) for path in joined.split(":")]


def problems_of_config(image: dict[str, Any], secrets: Sequence[str]) -> Iterator[str]:
    """Secrets in variables, labels, commands and history."""
    for variable in image["Config"].get("Env") or ():
        if VARIABLES.match(variable):
            yield f"configuration: variable {variable.partition('=')[0]}"
    text = json.dumps(image)
    if CONTENT.search(text.encode()) or any(secret in text for secret in secrets):
        yield "configuration or history: a secret"


def problems_of_layer(layer: Path, secrets: Sequence[str]) -> Iterator[str]:
    """Secrets among the names and contents of one layer's files."""
    needles = [secret.encode() for secret in secrets]
    for path in layer.rglob("*"):
        name = "/" + path.relative_to(layer).as_posix()
        if NAMES.search(name):
            yield f"{name}: is not for an image"
        if path.is_symlink() or not path.is_file():
            continue
        size = path.stat().st_size
        if SETTINGS.search(name) and size:
            yield f"{name}: settings of the caller"
        if not 0 < size <= LARGEST:
            continue
        content = path.read_bytes()
        if any(needle in content for needle in needles):
            yield f"{name}: holds a value that was only for the build"
        elif CONTENT.search(content) and not PUBLISHED.search(name):
            yield f"{name}: looks like a token or a private key"


def main() -> int:
    """Prints each problem; the exit code is 1 where there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("inspected", type=Path)
    parser.add_argument("--secret", type=Path, action="append", default=[])
    given = parser.parse_args()
    secrets = [
        line for file in given.secret for line in file.read_text().splitlines() if line.strip()
    ]
    image = json.loads(given.inspected.read_text())[0]
    layers = layers_of(image)
    problems = list(problems_of_config(image, secrets))
    for layer in layers:
        problems += problems_of_layer(layer, secrets)
    for problem in problems:
        sys.stdout.write(problem + "\n")
    sys.stdout.write(f"{len(layers)} layers, {len(problems)} secrets found\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

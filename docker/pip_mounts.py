"""What a build needs so that pip inside of it fetches as the caller's does, and nothing more.

Merges the caller's pip configuration, files and environment alike, into one file, and prints the
``--volume`` options that put it and the local folders it names into a build's RUN steps. Mounts do
not become part of an image.

usage: pip_mounts.py FOLDER     the merged configuration is written to FOLDER/pip.conf
"""

import configparser
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

INSIDE = "/run/caller-pip"
FETCHING = (
    "cert", "constraint", "default-timeout", "extra-index-url", "find-links", "index-url",
    "no-index", "proxy", "retries", "timeout", "trusted-host",
)  # fmt: skip
"""Settings that say where packages come from; others, as ``user``, are not for the image."""


def caller_settings(listing: str) -> dict[str, str]:
    """The settings of ``pip config list``, the environment's before the files'."""
    found: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, quoted = line.partition("=")
        section, _, key = name.rpartition(".")
        if key in FETCHING and section in ("global", "install", ":env:"):
            value = " ".join(shlex.split(quoted))
            if section == ":env:" or key not in found:
                found[key] = value
    return found


def local_path(word: str) -> Path | None:
    """The existing file or folder that a word of a setting names, as a path or a file: URL."""
    if word.startswith("file:"):
        word = unquote(urlsplit(word).path)
    path = Path(word)
    return path if path.is_absolute() and path.exists() else None


def mounts_of(settings: dict[str, str]) -> tuple[dict[str, str], dict[Path, str]]:
    """The settings with local paths as they are inside, and where each path is mounted.

    The pages of a local index link to files beside it, so that the folder above it is mounted.
    """
    inside: dict[Path, str] = {}
    moved = {}
    for key, value in settings.items():
        words = []
        for word in value.split():
            path = local_path(word)
            if path is None:
                words.append(word)
                continue
            source = path.parent if word.startswith("file:") else path
            target = inside.setdefault(source, f"{INSIDE}/{len(inside)}")
            suffix = f"/{path.name}" if source != path else ""
            words.append(("file://" if word.startswith("file:") else "") + target + suffix)
        moved[key] = "\n".join(words)
    return moved, inside


def main(folder: Path) -> None:
    """Writes the configuration and prints one option a line."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    # A caller without pip has no settings for it either.
    listing = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
    settings, mounts = mounts_of(caller_settings(listing))
    merged = configparser.RawConfigParser()
    merged["global"] = settings
    path = folder / "pip.conf"
    with path.open("w") as file:
        merged.write(file)
    volumes = {path: "/etc/pip.conf", **mounts}
    for source, target in volumes.items():
        sys.stdout.write(f"--volume={source}:{target}:ro\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

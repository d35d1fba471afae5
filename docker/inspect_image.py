"""Whether an image says what it is: labels, user, health check, and the list of its packages.

usage: inspect_image.py INSPECTED.json REVISION SBOM.json LOCK
    INSPECTED.json  what `podman image inspect IMAGE` printed
    REVISION        the commit that it was built from
    SBOM.json       the image's CycloneDX list of packages
    LOCK            the lock file that they were installed from
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ELSEWHERE = re.compile(r";.*sys_platform == '(win32|emscripten|darwin)'")
"""Marks a locked package that is not for Linux."""


def problems_of_config(image: dict[str, Any], revision: str) -> Iterator[str]:
    """What is missing in the image's configuration."""
    config = image["Config"]
    labels = config.get("Labels") or {}
    for name in ("title", "description", "licenses", "revision", "version", "created"):
        if not labels.get(f"org.opencontainers.image.{name}"):
            yield f"no label org.opencontainers.image.{name}"
    labelled = str(labels.get("org.opencontainers.image.revision"))
    if labelled.removesuffix("-dirty") != revision:
        yield f"it is labelled with commit {labelled} and was built from {revision}"
    if f"G2RPO_GIT_COMMIT={labelled}" not in config["Env"]:
        yield "G2RPO_GIT_COMMIT does not say its commit"
    if config.get("User") in (None, "", "0", "root"):
        yield "it runs as root"
    health = config.get("Healthcheck") or image.get("Healthcheck") or {}
    if "health" not in health.get("Test", ()):
        yield "it has no health check"


def plain(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> set[tuple[str, str]]:
    """Name and version of what a lock file installs on Linux."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)(.*)$", text, re.MULTILINE)
    return {(plain(name), version) for name, version, rest in lines if not ELSEWHERE.search(rest)}


def problems_of_packages(sbom: dict[str, Any], lock: str) -> Iterator[str]:
    """Packages that are locked and not listed."""
    if sbom.get("bomFormat") != "CycloneDX":
        yield "its list of packages is not CycloneDX"
    listed = {(plain(part["name"]), part.get("version")) for part in sbom.get("components", ())}
    for name, version in sorted(locked(lock) - listed):
        yield f"its list of packages lacks {name} {version}"


def main(inspected: str, revision: str, sbom_file: str, lock_file: str) -> int:
    """Prints each problem; the exit code is 1 where there is one."""
    image = json.loads(Path(inspected).read_text())[0]
    sbom = json.loads(Path(sbom_file).read_text())
    problems = [
        *problems_of_config(image, revision),
        *problems_of_packages(sbom, Path(lock_file).read_text()),
    ]
    for problem in problems:
        sys.stdout.write(problem + "\n")
    size, layers = image["Size"] / 1e9, len(image["RootFS"]["Layers"])
    packages = len(sbom.get("components", ()))
    sys.stdout.write(f"{size:.1f} GB in {layers} layers, {packages} packages listed\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

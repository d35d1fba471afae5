"""The files of a folder of images, whatever links are in it."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        folder: where they are.
        files: all but hidden ones and what archives of macOS add, sorted; those of linked folders
            under the name of the link.
        aliases: of links to other ``files``, which file they stand for.
        broken: links to nothing and folders that cannot be read: pairs of a name and a reason.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    aliases: dict[Path, Path] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """What a file is called in results: its path inside of the folder."""
        return path.relative_to(self.folder).as_posix()


def list_files(folder: Path) -> Listing:
    """All files below ``folder``, each once.

    Linked folders are entered after all others, each once; those that are listed already, or that
    the link stands in, are not, so that cycles end.
    """
    found, root = Listing(folder), folder.resolve()
    links: list[Path] = []
    seen: set[Path] = set()
    waiting = deque([folder])
    while waiting:
        place = waiting.popleft()
        real = place.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(place) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            found.broken.append((found.name(place), f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                is_file, is_folder = entry.is_file(), entry.is_dir()
            except OSError as error:  # a link to itself, or a folder that may not be entered
                found.broken.append((found.name(path), f"cannot be read ({error.strerror})"))
                continue
            if is_file:
                found.files.append(path)
                links += [path] if entry.is_symlink() else []
            elif not is_folder:
                found.broken.append((found.name(path), _no_file(path)))
            elif not entry.is_symlink():
                waiting.appendleft(path)
            elif path.resolve() not in {real, root, *real.parents, *root.parents}:
                waiting.append(path)
    found.files.sort()
    if links:
        own = {path.resolve(): path for path in set(found.files) - set(links)}
        found.aliases = {link: own[link.resolve()] for link in links if link.resolve() in own}
    return found


def _no_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there"
    return "no file, but a pipe, socket or device"

"""Listing of a folder of images that may contain links."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        folder: the folder.
        files: its files, sorted, without hidden ones and ``__MACOSX``; files of linked folders are
            listed under the name of the link.
        aliases: links to other ``files``, with their targets.
        broken: broken links and unreadable folders: pairs of a name and a reason.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    aliases: dict[Path, Path] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The name of a file in results: its path relative to the folder."""
        return path.relative_to(self.folder).as_posix()


def list_files(folder: Path) -> Listing:
    """All files below ``folder``, each once.

    Linked folders are entered last and once. Those already listed and parents of the link are
    skipped, so cycles end.
    """
    listing, root = Listing(folder), folder.resolve()
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
            listing.broken.append((listing.name(place), f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                is_file, is_folder = entry.is_file(), entry.is_dir()
            except OSError as error:  # a link to itself, or no permission
                listing.broken.append((listing.name(path), f"cannot be read ({error.strerror})"))
                continue
            if is_file:
                listing.files.append(path)
                links += [path] if entry.is_symlink() else []
            elif not is_folder:
                listing.broken.append((listing.name(path), _no_file(path)))
            elif not entry.is_symlink():
                waiting.appendleft(path)
            elif path.resolve() not in {real, root, *real.parents, *root.parents}:
                waiting.append(path)
    listing.files.sort()
    if links:
        own = {path.resolve(): path for path in set(listing.files) - set(links)}
        listing.aliases = {link: own[link.resolve()] for link in links if link.resolve() in own}
    return listing


def _no_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"broken link to {path.readlink()}"
    return "not a regular file"

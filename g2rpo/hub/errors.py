"""What can go wrong with a download, each in one line."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from g2rpo.errors import UserError

# The base of all errors of the HTTP library (httpx or its successor) that huggingface_hub uses.
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True)
class Wanted:
    """What is being fetched, for messages."""

    what: str
    """The file or repository."""
    page: str
    """Where it is described, and access to it granted."""
    otherwise: str
    """What to do where it cannot be fetched from there."""
    server: str = field(default_factory=lambda: constants.ENDPOINT)
    folder: Path = field(default_factory=lambda: Path(constants.HF_HUB_CACHE))
    """The cache that it goes into."""


@contextmanager
def one_line(wanted: Wanted) -> Iterator[None]:
    """Raises whatever keeps ``wanted`` from being fetched in the block as :class:`UserError`."""
    try:
        with warnings.catch_warnings():
            # huggingface_hub only warns of it, and downloads until the disk is full.
            warnings.filterwarnings("error", "Not enough free disk space")
            yield
    except UserError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP client and hf_xet raise many kinds
        raise UserError(f"{wanted.what}: {_explain(error, wanted)}") from None


def _explain(error: Exception, wanted: Wanted) -> str:
    # Not a subclass, which says what files are missing.
    if type(error) is LocalEntryNotFoundError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept huggingface_hub from asking the server
    server, page, otherwise = wanted.server, wanted.page, wanted.otherwise
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    code = error.errno if isinstance(error, OSError) else None
    text = f"{reason}; run the same command again, or {otherwise}"
    if isinstance(error, GatedRepoError):
        text = f"it is gated; accept its licence on {page}, then {LOG_IN}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = f"it is not in the cache and offline mode is on (HF_HUB_OFFLINE); {otherwise}"
    elif isinstance(error, RevisionNotFoundError):
        text = f"{server} has no such revision; correct it, or delete it from the lock file: {page}"
    elif isinstance(error, RemoteEntryNotFoundError) or (
        status == 404 and not isinstance(error, RepositoryNotFoundError)
    ):
        text = f"{server} has no such file (404); see {page}"
    elif status in (401, 403, 404):
        text = (
            f"it is neither a folder here nor a repository that you can see on {server} "
            f"({status}); correct the name, or {LOG_IN} if it is private or gated: {page}"
        )
    elif status is not None:
        text = f"{server} answers with an error ({reason}); try again later, or {otherwise}"
    elif isinstance(error, FileMetadataError):
        text = f"{server} does not answer like a model hub ({reason}); {otherwise}"
    elif isinstance(error, HTTP_ERROR):
        text = (
            f"{server} cannot be reached or stopped answering ({reason}); check the network and "
            f"run the same command again, or {otherwise}"
        )
    elif isinstance(error, UserWarning) or code in (errno.ENOSPC, errno.EDQUOT):
        text = (
            f"the disk of {wanted.folder} is full ({reason}); free some space or move the cache "
            "to another disk (HF_HOME, G2RPO_CACHE), then run the same command again"
        )
    elif code is not None:
        text = f"{reason}; check {wanted.folder}, or move the cache (HF_HOME, G2RPO_CACHE)"
    return text

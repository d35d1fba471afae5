"""One-line error messages for failed downloads."""

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

# Base of all errors of the HTTP client that huggingface_hub uses (httpx or its successor).
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True)
class Wanted:
    """A download, for error messages."""

    what: str
    """The file or repository."""
    page: str
    """Its web page."""
    otherwise: str
    """The alternative to fetching it from ``server``."""
    server: str = field(default_factory=lambda: constants.ENDPOINT)
    folder: Path = field(default_factory=lambda: Path(constants.HF_HUB_CACHE))
    """The cache it is written to."""


@contextmanager
def one_line(wanted: Wanted) -> Iterator[None]:
    """Turns every error in the block into a :class:`UserError` about ``wanted``."""
    try:
        with warnings.catch_warnings():
            # huggingface_hub only warns and then fills the disk.
            warnings.filterwarnings("error", "Not enough free disk space")
            yield
    except UserError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP client and hf_xet raise many kinds
        raise UserError(f"{wanted.what}: {_explain(error, wanted)}") from None


def _explain(error: Exception, wanted: Wanted) -> str:
    # Not its subclasses, which name the missing files.
    if type(error) is LocalEntryNotFoundError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the server could not be asked
    server, page, otherwise = wanted.server, wanted.page, wanted.otherwise
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    code = error.errno if isinstance(error, OSError) else None
    text = f"{reason}; run the same command again, or {otherwise}"
    if isinstance(error, GatedRepoError):
        text = f"access is gated; accept the licence on {page}, then {LOG_IN}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = f"not in the cache, and offline mode is on (HF_HUB_OFFLINE); {otherwise}"
    elif isinstance(error, RevisionNotFoundError):
        text = f"{server} has no such revision; correct it, or remove it from the lock file: {page}"
    elif isinstance(error, RemoteEntryNotFoundError) or (
        status == 404 and not isinstance(error, RepositoryNotFoundError)
    ):
        text = f"{server} has no such file (404); see {page}"
    elif status in (401, 403, 404):
        text = (
            f"neither a local folder nor a repository you can access on {server} ({status}); "
            f"correct the name, or {LOG_IN} if it is private or gated: {page}"
        )
    elif status is not None:
        text = f"{server} returned an error ({reason}); try again later, or {otherwise}"
    elif isinstance(error, FileMetadataError):
        text = f"{server} is not a model hub ({reason}); {otherwise}"
    elif isinstance(error, HTTP_ERROR):
        text = (
            f"cannot reach {server}, or it stopped responding ({reason}); check the network and "
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

"""Talking with the Hub: who may, and what a person is told where it fails.

The login is the Hub's own (`hf auth login`, or HF_TOKEN); no token passes through swlora's flags,
files or messages.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swlora.errors import RunFailedError, UserError, brief
from swlora.hub import hub_reachable, offline_variable
from swlora.library_noise import quiet_libraries

LOG_IN = "`hf auth login` logs in"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repo_name(repo: str) -> None:
    """Refuse what is no OWNER/NAME of the Hub; nothing is asked of it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {error}") from error
    if not REPO.fullmatch(repo):
        raise UserError(f"{repo!r} is no name of a repository; give OWNER/NAME, as in mary/my-lora")


def check_reachable() -> None:
    """Raise UserError in offline mode, and RunFailedError where the Hub does not answer."""
    if variable := offline_variable():
        raise UserError(f"{variable} keeps swlora off the Hub; unset it to go on")
    if not hub_reachable():
        raise RunFailedError("the Hugging Face Hub cannot be reached; try again when it can")


def check_login() -> None:
    """Raise UserError where this machine has no login for the Hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"there is no login for the Hub on this machine; {LOG_IN}")


@contextmanager
def hub_errors(repo: str, revision: str | None, *, writes: bool) -> Iterator[None]:
    """Turn what the Hub's library raises in the body into one line; keep its notes quiet.

    Raises UserError for what a person can put right (login, name, revision, access) and
    RunFailedError where the Hub or the way to it failed.
    """
    notes = logging.getLogger("huggingface_hub")
    level = notes.level
    try:
        notes.setLevel(logging.CRITICAL)
        with quiet_libraries():
            yield
    except UserError:
        raise
    except Exception as error:  # httpx's, the library's own, those of the Xet client
        raise _explained(error, repo, revision, writes=writes) from error
    finally:
        notes.setLevel(level)


def _explained(error: Exception, repo: str, revision: str | None, *, writes: bool) -> UserError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    found = _in_chain(error)
    if isinstance(found, GatedRepoError):
        return UserError(f"{repo} is gated: ask for access on its page on the Hub, and {LOG_IN}")
    if isinstance(found, RevisionNotFoundError):
        return UserError(
            f"{repo} has no revision {revision or 'main'}; give a branch, tag or commit"
        )
    if isinstance(found, RepositoryNotFoundError):
        return UserError(f"there is no model {repo} on the Hub, or it is private: {LOG_IN}")
    status = getattr(getattr(found, "response", None), "status_code", None)
    if status is not None:
        return _of_status(status, found, repo, writes=writes)
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return RunFailedError(f"cannot write or read a file: {error.strerror}")
    then = "; nothing was published, run it again" if writes else "; run it again"
    return RunFailedError(f"the connection to the Hub broke ({_said(error)}){then}")


def _of_status(status: int, error: Any, repo: str, *, writes: bool) -> UserError:
    if status == 401:
        return UserError(f"the Hub does not take this machine's login; {LOG_IN} anew")
    if status == 403:
        what = f"write to {repo}: it takes a token that may write, and a member of its owner"
        return UserError(f"this login may not {what if writes else f'read {repo}'} ({LOG_IN})")
    if status == 404:
        return UserError(f"the Hub has nothing there for {repo}: {_said(error)}")
    if status in (409, 412):
        return RunFailedError(f"{repo} was changed at the same time; run it again")
    if status == 429:
        return RunFailedError("the Hub takes no more requests for now; run it again later")
    if status >= 500:
        return RunFailedError(f"the Hub failed (status {status}); run it again later")
    return RunFailedError(f"the Hub refuses (status {status}): {_said(error)}")


def _in_chain(error: BaseException) -> BaseException:
    """Return the error of HTTP behind an error, where there is one: uploads wrap theirs."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "response", None) is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _said(error: BaseException) -> str:
    """Return what the Hub said, or else what the error is, without addresses."""
    said = getattr(error, "server_message", None)
    return re.sub(r"https?://\S+", "...", " ".join(said.split())[:200] if said else brief(error))

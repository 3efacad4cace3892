"""Whether the Hugging Face Hub can be reached, asked once a process and answered fast.

Without this, a machine without a network waits minutes in the retries of the client libraries.
"""

import os
from functools import cache

from swlora.errors import UserError

TIMEOUT_S = 5.0  # for the Hub to answer that it is there
# Those of huggingface_hub, transformers and datasets; any of them keeps all of swlora offline.
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def offline_variable() -> str | None:
    """Return the environment variable that asks for offline mode; None where none does."""
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"}:
            return name
    return None


@cache
def hub_reachable() -> bool:
    """Say whether the Hub answers within TIMEOUT_S; False in offline mode.

    A proxy that refuses the way there (403, 407) counts as no answer.
    """
    if offline_variable():
        return False
    from huggingface_hub import constants, get_session

    try:
        status = get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S).status_code
    except Exception:  # any failure of name lookup, proxy, TLS or socket means the same here
        return False
    return status < 500 and status not in (403, 407)


def cached_file(repo_id: str, filename: str, revision: str | None = None) -> str | None:
    """Return the path of a file of `repo_id` in the local Hub cache, or None.

    Raises UserError for a name that can be no Hub id.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, filename, revision=revision)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is neither a folder nor a Hub id such as openai-community/gpt2"
        ) from error
    return found if isinstance(found, str) else None

"""Whether the Hugging Face Hub can be reached, asked once a process and answered fast.

Without this, a machine without a network waits minutes in the retries of the client libraries.
"""

import os
from functools import cache


@cache
def hub_reachable(timeout_s: float = 5.0) -> bool:
    """Say whether the Hub answers within `timeout_s` seconds; False in offline mode."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout_s)
    except Exception:  # any failure of name lookup, proxy, TLS or socket means the same here
        return False
    return True


def cached_file(repo_id: str, filename: str, revision: str | None = None) -> str | None:
    """Return the path of a file of `repo_id` in the local Hub cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, filename, revision=revision)
    return found if isinstance(found, str) else None

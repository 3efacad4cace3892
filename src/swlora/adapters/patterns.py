"""Keys of rank_pattern and alpha_pattern, which PEFT takes for regular expressions.

An expression from a file of somebody else can take for ever. So only a part of the language is
taken, in which nothing that repeats stands within anything that repeats: names, dots, `.*` up to
three times, numbers (`\\d+`, `[0-9]+`) and choices without repetition (`(q|v)_proj`).
"""

import re
from collections.abc import Mapping
from typing import Any

from swlora.errors import UserError

_PLAIN = re.compile(
    r"\^?(?:[\w-]|\\\.|\.\*|\.(?![*+?{])|\\d\+|\[0-9\]\+|\([\w.|\\]+\)(?![*+?{]))*\$?"
)
MAX_CHARACTERS, MAX_WILDCARDS, MAX_KEYS = 500, 3, 20_000


def check_patterns(config: Mapping[str, Any]) -> None:
    """Raise UserError where a pattern of an adapter_config.json has keys that are not taken."""
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = config.get(pattern) or {}
        if not isinstance(values, dict) or len(values) > MAX_KEYS:
            raise UserError(f"its {pattern} is no mapping of module names")
        for key in values:
            if not is_plain(key):
                raise UserError(f"its {pattern} has the expression {key[:60]!r}; name the modules")


def is_plain(key: str) -> bool:
    """Say whether an expression is one that is matched at once, whatever the name."""
    if len(key) > MAX_CHARACTERS or key.count(".*") > MAX_WILDCARDS:
        return False
    return _PLAIN.fullmatch(key) is not None


def matching_keys(values: Mapping[str, Any], module: str) -> list[str]:
    """Return the keys that stand for a module, by its full name; in PEFT the first one counts.

    The keys must be plain.
    """
    return [key for key in values if re.match(rf"(.*\.)?({key})$", module)]

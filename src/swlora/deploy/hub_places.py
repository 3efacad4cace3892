"""Paths of this machine in what would be published: they mean nothing elsewhere, and are nobody's
business.

A folder of the Hub's cache is called by its name on the Hub, and notes that no library reads are
left out; any other path is refused, with the place where it stands.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swlora.adapters.saved import DIGESTS, FACTS
from swlora.errors import UserError
from swlora.paths import may_be_path

BASE = "base_model_name_or_path"
# Where a configuration came from: written by transformers, and read by nobody
_NOTES = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")
NOTES = frozenset((*_NOTES, "special_tokens_map_file"))
_NO_PLACES = ("token", "tokens", "content", "template")  # ends of keys: /think is a token
_WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TEXTS = (".json", ".jinja", ".txt", ".md", "")  # LICENSE and NOTICE have no ending

_SNAPSHOT = re.compile(  # a folder of the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
    r"(?:[A-Za-z]:)?[\w./\\~@+-]*models--([\w.-]+)[/\\]snapshots[/\\](\w+)"
    r"(?:[/\\](?![\w.-]))?"  # a last stroke names the same folder
)
_WHOLE = re.compile(r"(?:file://)?(?:/|~/|[A-Za-z]:[\\/]|\\\\)[^\s/\\][^\n]*")
_INSIDE = re.compile(
    r"(?:file://|(?<![\w./\\<~-]))((?:/[\w.@+-]+){2,})|(?<!\w)([A-Za-z]:\\[\w.@+-]+\\[\w.@+\\-]+)"
)
_OF_PEOPLE = ("home", "Users", "root", "tmp", "mnt", "media", "content", "workspace", "scratch")
_OF_SYSTEMS = ("usr", "bin", "sbin", "lib", "etc", "dev", "proc", "sys", "opt")


def published_text(path: Path) -> tuple[str | None, list[str]]:
    """Return the text that goes in place of a small file, None where it goes as it is.

    The list says what was replaced. Raises UserError for a path that has no other name.
    """
    if path.suffix not in _TEXTS or path.name in _WORDS:
        return None, []
    text = path.read_text(encoding="utf-8", errors="replace")
    named, changes = _with_hub_names(text, path.name)
    if path.suffix == ".json":
        try:
            tree = json.loads(named)
        except ValueError:
            pass  # as any other text
        else:
            dropped = [f"{path.name} goes without {key}" for key in _drop_notes(tree)]
            _check_tree(path, tree)
            if dropped or changes:
                _add_revision(tree, text)
                if path.name == FACTS and isinstance(tree.get(DIGESTS), dict):
                    tree[DIGESTS].pop(FACTS, None)  # it is of what it was
                return json.dumps(tree, indent=2, ensure_ascii=False) + "\n", [*changes, *dropped]
            return None, []
    for number, line in enumerate(named.splitlines(), start=1):
        for place in places_in(line):
            raise UserError(
                f"{path}, line {number}, names a folder of this machine, {place}: write there what "
                "means something elsewhere, or take it out"
            )
    return (named, changes) if changes else (None, [])


def _with_hub_names(text: str, name: str) -> tuple[str, list[str]]:
    """Call folders of the Hub's cache by their names on the Hub; say which."""
    found = dict.fromkeys(map(_hub_id, _SNAPSHOT.finditer(text)))
    changes = [f"{name} goes with {hub_id} in place of its folder here" for hub_id in found]
    return _SNAPSHOT.sub(_hub_id, text), changes


def _hub_id(match: re.Match[str]) -> str:
    return match[1].replace("--", "/")


def _add_revision(tree: Any, text: str) -> None:
    """Keep the commit that the folder of an adapter's base was of."""
    found = _SNAPSHOT.search(text)
    if found and isinstance(tree, dict) and tree.get(BASE) == _hub_id(found):
        tree["revision"] = tree.get("revision") or found[2]


def _drop_notes(tree: Any) -> Iterator[str]:
    """Take out notes that are paths, and yield their keys."""
    if isinstance(tree, dict):
        for key in [k for k, v in tree.items() if k in NOTES and is_place(v)]:
            del tree[key]
            yield key
    for inner in _inner(tree):
        yield from _drop_notes(inner)


def _inner(tree: Any) -> list[Any]:
    return list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []


def _check_tree(path: Path, tree: Any, key: str = "") -> None:
    if isinstance(tree, str):
        is_whole = is_place(tree) or (key == BASE and tree.startswith(("./", "../", ".\\", "..\\")))
        places = [tree] if is_whole else places_in(tree)
        if places and (key == BASE or not key.endswith(_NO_PLACES)):
            what = (
                "write the base model's name on the Hub there"
                if key == BASE
                else "take that out of it first"
            )
            raise UserError(f"{path} names a folder of this machine ({key}: {places[0]}); {what}")
    elif isinstance(tree, dict):
        for name, value in tree.items():
            _check_tree(path, value, str(name))
    elif isinstance(tree, list):
        for value in tree:
            _check_tree(path, value, key)


def is_place(value: Any) -> bool:
    """Say whether a value is the absolute path of a file or folder, on whatever machine."""
    return isinstance(value, str) and _WHOLE.fullmatch(value) is not None


def places_in(text: str) -> list[str]:
    """Return the paths in a text that belong to a person, or are on this machine.

    Others may be examples (/path/to/model) or addresses without their server (/v1/models).
    """
    found = []
    for match in _INSIDE.finditer(text):
        place = (match[1] or match[2]).rstrip(".")
        top = Path(place).parts[1] if match[1] else ""
        is_here = top not in _OF_SYSTEMS and may_be_path(place) and Path(place).exists()
        if match[2] or top in _OF_PEOPLE or is_here:
            found.append(place)
    return found

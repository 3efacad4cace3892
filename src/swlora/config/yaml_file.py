"""Configurations as YAML: read with what is wrong and where, written, changed by dotted names."""

from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from swlora.bounded_read import MAX_DEPTH, items
from swlora.errors import UserError

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, without its empty sections; UserError otherwise."""
    try:
        with path.open("rb") as file:  # which may be a pipe: a person named it
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is longer than {MAX_BYTES:,} bytes: it is no configuration")
    try:
        tree = parse_yaml(content) or {}
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f", line {at.line + 1}, column {at.column + 1}" if at else ""
        detail = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{path}{place} is not valid YAML: {detail}") from error
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {detail}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping such as 'adapter: {{rank: 4}}'")
    return {key: value for key, value in tree.items() if value is not None}


class _Loader(yaml.SafeLoader):
    """A SafeLoader without merge keys, which copy what they merge: a short text, a large tree."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse `<<`, which nothing written here uses."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not read", node.start_mark
            )


def parse_yaml(content: str | bytes) -> Any:
    """Return what a YAML text holds; yaml.YAMLError or ValueError where it is none, or too large.

    Aliases are counted as if they were written out, so that a short text is no large tree.
    """
    try:
        tree = yaml.load(content, _Loader)
    except RecursionError:
        raise ValueError(f"it is deeper than {MAX_DEPTH} levels") from None
    level, n_values = [tree], 0
    for _ in range(MAX_DEPTH):
        n_values += len(level)
        if n_values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        level = list(islice((item for value in level for item in items(value)), MAX_VALUES + 1))
        if not level:
            return tree
    raise ValueError(f"it is deeper than {MAX_DEPTH} levels")


def dump_yaml(spec: BaseModel) -> str:
    """Write a specification as YAML that `load_spec` reads back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def set_dotted(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set the value of a dotted name such as `adapter.rank` in a tree of mappings."""
    *sections, last = dotted.split(".")
    for key in sections:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"'{key}' must be a mapping in the configuration")
        tree = child
    tree[last] = value

"""Configurations as YAML: read with what is wrong and where, written, changed by dotted names."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from swlora.errors import UserError


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, without its empty sections; UserError otherwise."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f", line {at.line + 1}, column {at.column + 1}" if at else ""
        detail = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{path}{place} is not valid YAML: {detail}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {detail}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping such as 'adapter: {{rank: 4}}'")
    return {key: value for key, value in tree.items() if value is not None}


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

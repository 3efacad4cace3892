"""The schemas for editors, as a validator of them reads them."""

from typing import Any

import pytest


def validated(tree: Any, schema: dict[str, Any]) -> list[str]:
    """Return what is wrong with a configuration by a schema."""
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator
    checker.check_schema(schema)
    return [error.message for error in checker(schema).iter_errors(tree)]

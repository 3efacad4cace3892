"""JSON schemas of the configurations, for editors that check and complete YAML."""

from typing import Any

from pydantic import BaseModel

from swlora.config import RunSpec
from swlora.study.spec import SHORT, StudySpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def run_schema() -> dict[str, Any]:
    """Return the schema of a run's configuration, as `--config` reads it."""
    return _schema(RunSpec, "a run of swlora")


def study_schema() -> dict[str, Any]:
    """Return the schema of a study, as `swlora compare` reads it.

    Arms may be bare names, and hold settings of theirs beside the name; of several models there
    may be a list.
    """
    schema = _schema(StudySpec, "a study of swlora")
    arm = schema["$defs"]["ArmSpec"]
    arm["properties"] |= {name: {"description": f"short for {SHORT[name]}"} for name in SHORT}
    arm["patternProperties"] = {r"^(adapter|train)\.": {}}
    either = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ArmSpec"}]}
    arms = schema["properties"]["arms"]
    arms["items"] = either
    schema["properties"]["arms"] = {"anyOf": [arms, {"type": "string"}]}
    schema["properties"]["models"] = {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelSpec"}]},
        "description": "several models in place of `model`: a study of each",
    }
    return schema


def _schema(spec: type[BaseModel], title: str) -> dict[str, Any]:
    """Return a specification's schema, in which a section may be empty."""
    schema = {"$schema": DIALECT, **spec.model_json_schema(), "title": title}
    for name, section in schema["properties"].items():
        if "$ref" in section:
            schema["properties"][name] = {"anyOf": [{"$ref": section["$ref"]}, {"type": "null"}]}
    schema["$defs"]["AdapterSpec"]["properties"]["layers"]["default"] = "all"
    return schema

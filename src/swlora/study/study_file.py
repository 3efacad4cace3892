"""Reading a study file, and saying all that is wrong with it at once.

A file may list `models` instead of one `model`: that makes one study of each. Where a part of the
file is wrong, the rest is still looked at, so that one reading shows every problem. Nothing here
loads a model or data; `swlora.study.check` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swlora.config import RunSpec
from swlora.config.yaml_file import read_mapping, set_dotted
from swlora.errors import UserError
from swlora.settings import Problem, problem_lines, problems_in
from swlora.study.arms import arms_of, expected_controls
from swlora.study.spec import RATE, ArmSpec, StudySpec

# What all arms of a study share, or what the study itself decides
SHARED = {
    "train.learning_rate": "give the arm `rates`",
    "train.find_learning_rate": "a study tries the `rates` of an arm itself",
    "train.batch_size": "all arms have the same effective batch",
    "train.order": "all arms see the data in the same order",
}
CONSTANT = "train.schedule: constant ends on noise; a study needs one that decays, linear or cosine"


@dataclass(frozen=True)
class StudyFile:
    """One study of a file: what is valid of it (None: nothing), and what is wrong."""

    name: str
    spec: StudySpec | None
    problems: list[str]


def read_studies(path: Path, overrides: Mapping[str, Any]) -> list[StudyFile]:
    """Read a study file, one study for each of its models.

    `overrides` are dotted names as in `swlora.config.load_spec`. Raises UserError for a file that
    is no mapping, or whose `models` are no list of different ones.
    """
    tree = read_mapping(path)
    for dotted, value in overrides.items():
        if value is not None:
            set_dotted(tree, dotted, value)
    if "models" not in tree:
        return [_parse(path.stem, tree)]
    models = tree.pop("models")
    if "model" in tree or not isinstance(models, list) or not models:
        raise UserError(f"in {path}: models: give a list of models, and no model beside it")
    sections = [model if isinstance(model, dict) else {"name": model} for model in models]
    names = [str(s.get("name")).rstrip("/").rpartition("/")[2] for s in sections]
    if len(set(names)) < len(names):
        raise UserError(f"in {path}: models: two of them have the same last name")
    pairs = zip(names, sections, strict=True)
    return [_parse(name, {**tree, "model": section}) for name, section in pairs]


def arm_problems(spec: StudySpec, arm: ArmSpec) -> list[str]:
    """List what is wrong with an arm's settings, as far as that is known without the model."""
    problems = []
    for dotted in arm.overrides:
        if dotted in SHARED:
            problems.append(f"{dotted}: cannot be an arm's own; {SHARED[dotted]}")
        elif dotted.split(".")[0] not in ("adapter", "train"):
            problems.append(f"{dotted}: an arm changes settings of adapter and train only")
    if problems:
        return problems
    try:
        run = spec.run_spec(arm.overrides)
    except ValidationError as error:
        return problem_lines(error, RunSpec)
    except UserError as error:
        return [str(error)]
    if arm.control_seeds and not run.adapter.layers.needs_search:
        problems.append("control_seeds: it has no controls, which layers that are found have")
    if arm.overrides.get("train.schedule") == "constant":
        problems.append(CONSTANT)
    return problems


def _parse(name: str, tree: dict[str, Any]) -> StudyFile:
    arms = tree.get("arms")
    left = {**tree, "arms": arms.split(",") if isinstance(arms, str) else arms}
    names = _names(left["arms"])
    problems: list[str] = []
    while True:
        try:
            spec = StudySpec.model_validate(left)
        except ValidationError as error:
            problems += [
                _with_arm_name(problem, left["arms"]) for problem in problems_in(error, StudySpec)
            ]
            left = _without_wrong_parts(left, error)
            if not left.get("arms"):
                return StudyFile(name, None, problems)
        else:
            return StudyFile(name, spec, [*problems, *_problems(spec, names)])


def _without_wrong_parts(tree: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Leave out every arm and every setting in which pydantic found a problem."""
    kept, wrong_arms = dict(tree), set()
    for place in (problem["loc"] for problem in error.errors()):
        section, inner = str(place[0]), place[1] if len(place) > 1 else None
        if section == "arms" and inner is not None:
            wrong_arms.add(inner)
        elif isinstance(kept.get(section), dict) and inner in kept[section]:
            kept[section] = {k: v for k, v in kept[section].items() if k != inner}
        else:
            kept.pop(section, None)
    if "arms" in kept:
        kept["arms"] = [arm for i, arm in enumerate(kept["arms"]) if i not in wrong_arms]
    return kept


def _with_arm_name(problem: Problem, arms: Any) -> str:
    """Write a problem; of an arm as "arm dora: rank: ...", or "arm number 4" without a name."""
    match problem.place:
        case ("arms", int(number), *inner):
            name = next(iter(_names([arms[number]])), f"number {number + 1}")
            said = Problem(tuple(inner), problem.said).line() if inner else problem.said
            return f"arm {name}: {said}"
    return problem.line()


def _names(arms: Any) -> list[str]:
    """Return the names that a file gives its arms, wrong ones too."""
    listed = arms if isinstance(arms, list) else []
    names = [arm.get("name") if isinstance(arm, dict) else arm for arm in listed]
    return [name for name in names if isinstance(name, str)]


def _problems(spec: StudySpec, names_in_file: list[str]) -> list[str]:
    """List what is wrong with settings that are valid each for itself."""
    names = [arm.name for arm in spec.arms]
    known = {*names, *names_in_file}
    seeds = {s for a in spec.arms for s in (*(a.seeds or spec.seeds), *(a.control_seeds or ()))}
    problems = [f"arm {name}: listed twice" for name in sorted(known) if names.count(name) > 1]
    if spec.baseline not in known:
        problems.append(f"baseline: there is no arm {spec.baseline!r}")
    controls = {control for arm in spec.arms for control in _control_names(spec, arm)}
    problems += [
        f"beam: there is no arm {name!r}" for name in spec.beam.arms if name not in known | controls
    ]
    problems += [f"beam: no arm has seed {s}" for s in spec.beam.seeds or [] if s not in seeds]
    if spec.rate.seed in seeds and any(map(spec.chooses_rate, spec.arms)):
        problems.append(f"rate.seed: {spec.rate.seed} is a seed of an arm; take one that none has")
    if spec.train.schedule == "constant":
        problems.append(CONSTANT)
    if spec.train.learning_rate != RATE:
        problems.append("train.learning_rate: a study chooses it; give rate.grid")
    if spec.train.find_learning_rate:
        problems.append("train.find_learning_rate: a study tries the rates of rate.grid itself")
    if spec.rate.extend and not any(map(spec.chooses_rate, spec.arms)):
        problems.append("rate.extend: no arm has several rates, so there is no edge to go beyond")
    for arm in spec.arms:
        problems += [f"arm {arm.name}: {line}" for line in arm_problems(spec, arm)]
    return problems


def _control_names(spec: StudySpec, arm: ArmSpec) -> list[str]:
    """Return the names of the controls that an arm will have; none for an arm that is wrong."""
    if arm_problems(spec, arm):
        return []
    (resolved,) = arms_of(spec.model_copy(update={"arms": [arm]}), None)
    return [control.name for control in expected_controls(resolved, spec)]

"""The file of results: a case for each recipe and seed, written as soon as it is there."""

import json
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.recipes.recipe import Recipe
from swlora.errors import UserError
from swlora.files import write_json

Case = dict[str, Any]


class Results:
    """The cases of one model in one file.

    With `add` those of the file stay, else it must not be there. A model in a folder is known by
    its own name: where it lies says nothing elsewhere. Raises UserError where the file is of
    something else, or of another model.
    """

    def __init__(self, path: Path, model: str, *, add: bool) -> None:
        self._path, self._model = path, known_as(model)
        self.cases: list[Case] = []
        self._machines: list[dict[str, Any]] = []
        if not path.exists():
            return
        if not add:
            raise UserError(f"{path} is there already: --add keeps its cases and adds others")
        report = read(path)
        if report["model"] != self._model:
            raise UserError(f"{path} is of the model {report['model']}, not of {self._model}")
        self.cases, self._machines = report["cases"], report["machines"]

    def has(self, recipe: Recipe, seed: int, *, with_test: bool) -> bool:
        """Say whether a case is there, measured on the test rows too where that is asked."""
        case = self._find(recipe, seed)
        return case is not None and ("test" in case or "error" in case or not with_test)

    def add(self, recipe: Recipe, seed: int, found: dict[str, Any], load: list[float]) -> None:
        """Write a case to the file, in the place of the one that it has."""
        machine = runner.machine()
        if machine not in self._machines:
            self._machines.append(machine)
        case = {"recipe": str(recipe), "seed": seed, "settings": recipe.settings()}
        case |= {"machine": self._machines.index(machine)}
        case |= {"load_average": {"start": load, "end": runner.load()}, **found}
        before = self._find(recipe, seed)
        self.cases = [c for c in self.cases if c is not before] + [case]
        report = {"benchmark": "recipes", "model": self._model, "machines": self._machines}
        write_json(self._path, report | {"cases": self.cases})

    def _find(self, recipe: Recipe, seed: int) -> Case | None:
        same = (c for c in self.cases if Recipe(**c["settings"]) == recipe and c["seed"] == seed)
        return next(same, None)


def known_as(model: str) -> str:
    """Return how a model is called in results: a folder or file by its name, not where it lies."""
    return Path(model).resolve().name if Path(model).exists() else model


def read(path: Path) -> dict[str, Any]:
    """Read a file of results; UserError where it is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if report["benchmark"] == "recipes" and "model" in report:
            for case in report["cases"]:
                case["settings"] = Recipe(**case["settings"]).settings()
                if not {"recipe", "seed"} <= case.keys() or not {"dev", "error"} & case.keys():
                    raise UserError(f"{path} holds a case without recipe, seed or outcome")
            return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of recipes: {error}") from error
    raise UserError(f"{path} holds no cases of recipes")

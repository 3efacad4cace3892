"""A person's own metric, from a file that was named on the command line: `FILE.py:function`.

    function(predictions: list[str], references: list[list[str]]) -> number, or numbers by name

The file is run as a program is, with all rights of the one who runs it. So its name comes from
the command line alone, never from a configuration, a run folder or a request.
"""

import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from swlora.errors import UserError, brief
from swlora.evaluation.evaluated import Evaluated
from swlora.paths import expanded, may_be_path


class MetricError(UserError):
    """A metric of one's own that failed, after everything else was measured: `evaluated` is that.

    Its `texts` hold the predictions and references that the function was called with.
    """

    code = "metric_failed"

    def __init__(self, message: str, evaluated: Evaluated) -> None:
        super().__init__(message)
        self.evaluated = evaluated


@dataclass(frozen=True)
class UserMetric:
    """A function and the name it was asked for by."""

    name: str
    function: Callable[[list[str], list[list[str]]], Any]

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """Return its numbers by name; UserError where it fails or returns another thing."""
        try:
            found = self.function(list(predictions), [list(refs) for refs in references])
        except (Exception, SystemExit) as error:  # of another's code, so of any kind
            raise UserError(f"--metrics {self.name} failed: {brief(error)}") from error
        values = found if isinstance(found, dict) else {self.name.rpartition(":")[2]: found}
        if not values:
            raise UserError(f"--metrics {self.name} returned no number: return one or several")
        for name, value in values.items():
            is_number = isinstance(value, numbers.Real) and _is_finite(value)
            if not isinstance(name, str) or not is_number:
                raise UserError(
                    f"--metrics {self.name} returned {value!r:.60}: return a finite number, or "
                    "numbers by name"
                )
        return {name: float(value) for name, value in values.items()}


def with_own_metric(evaluated: Evaluated, metric: UserMetric) -> Evaluated:
    """Return what was evaluated with the numbers of `metric`; MetricError where it fails."""
    texts = evaluated.texts
    if texts is None:
        return evaluated
    try:
        return replace(evaluated, own=metric(texts.predictions, texts.references))
    except UserError as error:
        left = "the error's `evaluated` has the texts, scores and losses"
        if (path := evaluated.predictions) is not None:
            left = f"the texts are in {path}, scores and losses in result.json beside it"
        raise MetricError(f"{error}; {left}", evaluated) from error


def load_metric(name: str) -> UserMetric:
    """Load FILE.py:function; UserError, in one line, where that cannot be done."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"--metrics {name!r} is not FILE.py:function")
    path = expanded(file)
    if not (may_be_path(path) and path.is_file()):
        raise UserError(f"--metrics {name}: there is no file {file}")
    module = _run(path, name)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--metrics {name}: {file} has no function {function!r}")
    return UserMetric(name, found)


def _run(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"swlora_metrics_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise UserError(f"--metrics {name} cannot be loaded: {brief(error)}") from error
    return module


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False

"""Types of the fixtures that make models: see tests/conftest.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

MakeModel = Callable[..., Any]  # make_model: (model_type, seed=0, **changes) -> a tiny model
ModelFolder = Callable[[str], Path]  # model_folder: model_type -> the folder of that model

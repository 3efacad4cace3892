"""A small training in Python, and the command that does the same."""

import json
from pathlib import Path
from typing import Any

from swlora.cli import main

TRAINING = {"rank": 3, "epochs": 2, "batch_size": 3, "learning_rate": 0.02, "layers": "last:2"}


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for n, v in settings.items() for word in (f"--{n.replace('_', '-')}", str(v))]


def run_command(command: str, settings: dict[str, Any], *more: str) -> Any:
    """Run the command line; return its --json."""
    target = Path("..") / f"{command}.json"
    main([command, *flags(settings), "--json", str(target), *more])
    return json.loads(target.read_text())

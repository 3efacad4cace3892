"""How often a training writes a checkpoint: `500steps`, `30s`, `5min` or `2h`."""

import re
from dataclasses import dataclass

_SECONDS_OF = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TEXT = re.compile(r"(?P<n>\d{1,9}(?:\.\d{1,9})?) ?(?P<unit>steps?|s|min|h)")


@dataclass(frozen=True)
class SaveEvery:
    """Every so many steps or seconds; one of the two is None."""

    steps: int | None = None
    seconds: float | None = None

    def is_due(self, step: int, since_s: float) -> bool:
        """Say whether to save after `step`, counted from 1, `since_s` seconds after the last time.

        It is the number of the step that counts, so that a resumed run saves at the same ones.
        """
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and since_s > self.seconds


def parse_save_every(text: str) -> SaveEvery:
    """Read such a text; ValueError where it is none, or comes to nothing."""
    match = _TEXT.fullmatch(text.strip())
    if match is None or float(match["n"]) == 0:
        raise ValueError(f"{text!r} is not how often to save; write 500steps, 30s, 5min or 2h")
    if match["unit"].startswith("step"):
        if "." in match["n"]:
            raise ValueError(f"{text!r} is no whole number of steps")
        return SaveEvery(steps=int(match["n"]))
    return SaveEvery(seconds=float(match["n"]) * _SECONDS_OF[match["unit"]])

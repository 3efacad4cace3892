"""Flipped bits and cut files of a run, an adapter and the prefix cache: noticed, or harmless."""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fault_trials import Outcome, go_on, train_in
from tests.support.small_runs import Heard

from swlora.config import RunSpec, load_spec
from swlora.errors import UserError
from swlora.paths import cache_dir

STOPPED_AFTER = 3  # steps
Use = Callable[[Path], str | None]  # a damaged copy -> what was silently wrong with it


@dataclass
class Damage:
    """What became of damaged files: how many were noticed or harmless, and which were not."""

    n_good: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        """How many were damaged."""
        return self.n_good + len(self.failures)


class StopsEarly(Heard):
    """Ends a training after so many steps, with a checkpoint of each."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        super().advance(amount, note)
        if len(self.notes) > STOPPED_AFTER:  # the first is of no steps
            raise KeyboardInterrupt


def damage_all(
    settings: Mapping[str, Any], folder: Path, n_flips: int, n_cuts: int, seed: int = 0
) -> Damage:
    """Damage every file of a stopped run, of its cache and of an adapter, so often each."""
    spec, drawn, damage = load_spec(None, dict(settings)), random.Random(seed), Damage()
    with _cache(folder / "cache"):
        train_in(folder / "whole", spec)
        expected = Outcome.of(folder / "whole")
        with suppress(KeyboardInterrupt):
            train_in(folder / "stopped", spec, StopsEarly())
    ways = [(folder / "stopped", _resumed(spec, expected, folder / "cache"))]
    ways.append((folder / "whole" / "adapter", _loaded(spec, folder / "whole" / "adapter")))
    ways.append((folder / "cache", _trained_from(spec, expected)))
    for number, (source, use) in enumerate(ways):
        for name, way, content in _damaged_files(source, n_flips, n_cuts, drawn):
            copy = Path(shutil.copytree(source, folder / f"damaged-{number}"))
            (copy / name).write_bytes(content)
            wrong = _looked_at(use, copy)
            if wrong is None:
                damage.n_good += 1
            else:
                damage.failures.append(f"{source.name}/{name}, {way}: {wrong}")
            shutil.rmtree(copy)
    return damage


def _damaged_files(
    source: Path, n_flips: int, n_cuts: int, drawn: random.Random
) -> Iterator[tuple[str, str, bytes]]:
    """Yield (name, way, bytes) of damaged files."""
    for path in sorted(source.rglob("*")):
        if not path.is_file() or not (content := path.read_bytes()):
            continue
        name = path.relative_to(source).as_posix()
        for _ in range(n_flips):
            bit = drawn.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            yield name, f"bit {bit} flipped", bytes(flipped)
        for _ in range(n_cuts):
            n_bytes = drawn.randrange(len(content))
            yield name, f"cut to {n_bytes} bytes", content[:n_bytes]


def _looked_at(use: Use, copy: Path) -> str | None:
    try:
        return use(copy)
    except UserError as error:  # noticed: one line
        return None if len(str(error).splitlines()) == 1 else f"many lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _resumed(spec: RunSpec, expected: Outcome, cache: Path) -> Use:
    def use(copy: Path) -> str | None:
        heard = Heard()
        with _cache(cache):
            go_on(copy, spec, heard)
        difference = expected.difference(copy)
        is_said = any("damaged" in line for line in heard.lines)
        return None if is_said and difference == "its metrics are others" else difference

    return use


def _loaded(spec: RunSpec, whole: Path) -> Use:
    """Load an adapter: it is the same, with the same facts, or refused."""
    from swlora.adapters.saved import adapter_folder, load_adapter, read_facts
    from swlora.models.load import load_model

    def content(folder: Path) -> tuple[dict[str, bytes], Any]:
        adapted = load_adapter(load_model(spec.model).model, adapter_folder(folder))
        tensors = {n: p.numpy().tobytes() for n, p in adapted.named_parameters() if "lora" in n}
        return tensors, read_facts(folder)

    expected = content(whole)

    def use(copy: Path) -> str | None:
        tensors, facts = content(copy)
        if tensors != expected[0]:
            return "other weights are loaded"
        is_same = all(facts.get(name) == value for name, value in expected[1].items())
        return None if is_same else "other facts are read"

    return use


def _trained_from(spec: RunSpec, expected: Outcome) -> Use:
    def use(copy: Path) -> str | None:
        with _cache(copy):
            train_in(copy / "run", spec)
        return expected.difference(copy / "run")

    return use


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Take `folder` as the cache folder."""
    before = os.environ.get("SWLORA_CACHE")
    os.environ["SWLORA_CACHE"] = str(folder)
    assert cache_dir() == folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["SWLORA_CACHE"]
        else:
            os.environ["SWLORA_CACHE"] = before

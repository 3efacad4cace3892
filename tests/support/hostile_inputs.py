"""Models, adapters, data, configurations and runs that must not be handed to a library, and what
`swlora` says of them: small stand-ins, none of which harms other software.
"""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tests.support.damage import StopsEarly
from tests.support.fault_trials import train_in, write_inputs
from tests.support.hostile_folders import TEXTS, spoil
from tests.support.kills import Process

from swlora.config import load_spec

MAX_S, MAX_BYTES = 5.0, 10**9
GENERIC = "(--debug shows where)"  # ends an error that nobody foresaw
KINDS = (*TEXTS, "pipe", "link to itself")
INDEXED = ("../other.safetensors", "/dev/zero", "sub/a.safetensors", "a.bin", "model.pkl", 3, None)
COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
NO_COUNTS = (0, -1, 10**9, 10**30, 1.5, "2")
ROW = b'{"prompt": "a", "completion": "b"}\n'
DATA = {
    "deep.jsonl": b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b"}",
    "no text.jsonl": b"\xff\xfe\x00",
    "list.jsonl": b"[1, 2]\n",
    "null.jsonl": b"null\n",
    "empty.jsonl": b"",
    "torn.jsonl": ROW + b'{"prompt": "a", "comple',
    "other fields.jsonl": b'{"a": 1, "b": 2}\n',
    "number.jsonl": b'{"prompt": 1e999, "completion": "b"}\n',
    "long.jsonl": b'{"prompt": "' + b"x" * (2 << 20) + b'", "completion": "b"}\n',
    "word.json": b'"text"',
    "open.json": b"[" + ROW,
    "utf-16.csv": "prompt,completion\na,b\n".encode("utf-16"),
    "semicolons.csv": b"prompt;completion\na;b\n",
    "ragged.csv": b"prompt,completion\na\n",
    "cut.jsonl.gz": b"\x1f\x8b\x08\x00",
    "none.parquet": b"PAR1 nonsense PAR1",
    "none.arrow": b"nonsense",
    "unknown.xyz": ROW,
}
YAML = {
    "deep": b"a: " + b"[" * 80 + b"]" * 80,
    "digits": b"seed: " + b"9" * 5000,
    "no text": b"\xff\xfe\x00",
    "code": b"x: !!python/object:os.system {}",
    "merged": b"a: &a {rank: 2}\nadapter: {<<: *a}\n",
    "list": b"- 1\n",
    "words": b"just words",
    "open": b"adapter: {rank: 4",
    "unknown": b"adapter: {rnak: 4}\n",
    "long": b"# " + b"x" * (4 << 20),
    "infinite": b"train: {learning_rate: .inf}\n",
    "null": b"train: null\nmodel: {name: null}\n",
}


@dataclass(frozen=True)
class Inputs:
    """What is whole: a model, a stopped run, an adapter."""

    settings: dict[str, Any]
    model: Path
    stopped: Path
    adapter: Path


@dataclass(frozen=True)
class Hostile:
    """A command that is given something hostile."""

    kind: str
    name: str
    arguments: list[str]


def prepare_inputs(folder: Path) -> Inputs:
    """Write the inputs that are whole."""
    settings = write_inputs(folder)
    spec = load_spec(None, settings)
    train_in(folder / "whole", spec)
    with suppress(KeyboardInterrupt):
        train_in(folder / "stopped", spec, StopsEarly())
    return Inputs(settings, folder / "model", folder / "stopped", folder / "whole" / "adapter")


def hostile_inputs(inputs: Inputs, folder: Path) -> Iterator[Hostile]:
    """Write one after the other into `folder`, and yield the command for it."""
    text = ["--prompt", "a", "--max-new-tokens", "2", "--device", "cpu", "--dtype", "float32"]
    for name, change in (_models() | _weights("model.safetensors")).items():
        place = _changed(inputs.model, folder / "model", change, inputs.model)
        yield Hostile("model", name, ["generate", "--model", str(place), *text])
    for name, content in _gguf_files():
        (folder / "a.gguf").write_bytes(content)
        yield Hostile("model", name, ["generate", "--model", str(folder / "a.gguf"), *text])
    model = ["--model", str(inputs.model)]
    for name, change in _adapters().items():
        place = _changed(inputs.adapter, folder / "adapter", change, inputs.adapter)
        yield Hostile("adapter", name, ["generate", *model, "--adapter", str(place), *text])
    for name, content in DATA.items():
        (folder / name).write_bytes(content)
        yield Hostile("data", name, ["data", *model, "--dataset", str(folder / name)])
    for name, content in YAML.items():
        (folder / "c.yaml").write_bytes(content)
        asked = ["train", "--config", str(folder / "c.yaml"), "--output", str(folder / "out")]
        yield Hostile("yaml", name, asked)
    for name, change in _runs().items():
        place = _changed(inputs.stopped, folder / "run", change, inputs.stopped)
        yield Hostile("run", name, ["train", "--resume", "--output", str(place)])


@dataclass(frozen=True)
class Tried:
    """What a command came to; `wrong` says in what that is not one line within the bounds."""

    seconds: float
    peak_bytes: int
    wrong: str = ""


def try_input(hostile: Hostile, folder: Path) -> Tried:
    """Run the command in a process that has imported the libraries, with its files in `folder`."""
    start_s = time.monotonic()
    process = Process(hostile.arguments, folder / "cache", folder / "log")
    try:
        code, said = process.ends(deadline_s=6 * MAX_S)
    except TimeoutError as error:
        return Tried(time.monotonic() - start_s, 0, str(error))
    seconds, peak_bytes = time.monotonic() - start_s, process.peak_bytes
    errors = said.partition("swlora: ")[2].splitlines()
    is_one_line = len(errors) == 1 and GENERIC not in said and "Traceback" not in said
    if code in (1, 2) and is_one_line and seconds < MAX_S and 0 < peak_bytes < MAX_BYTES:
        return Tried(seconds, peak_bytes)
    shown = " ".join(said.split())[-300:]
    bounds = f"{seconds:.1f} s, {peak_bytes / 1e6:.0f} MB, exit code {code}"
    return Tried(seconds, peak_bytes, f"{hostile.kind}, {hostile.name}: {bounds}: {shown}")


def try_inputs(inputs: Inputs, folder: Path, *, every: int = 1) -> list[Tried]:
    """Try every n-th of the hostile inputs, which are written into `folder`."""
    Process(["--help"], folder / "cache", folder / "log").ends()  # the first one imports
    found = enumerate(hostile_inputs(inputs, folder))
    return [try_input(hostile, folder) for number, hostile in found if number % every == 0]


Change = Callable[[Path, Path], None]  # of a copy, beside what is whole


def _changed(source: Path, copy: Path, change: Change, whole: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    change(copy, whole)
    return copy


def _spoils(name: str, kind: str) -> Change:
    return lambda copy, whole: spoil(copy / name, kind, whole)


def _writes(name: str, content: Callable[[bytes], bytes]) -> Change:
    def change(copy: Path, _whole: Path) -> None:
        path = copy / name
        path.write_bytes(content(path.read_bytes() if path.exists() else b""))

    return change


def _json(name: str, **values: Any) -> Change:
    return _writes(name, lambda old: json.dumps(json.loads(old) | values).encode())


def _indexed(file_name: object) -> Change:
    def change(copy: Path, _whole: Path) -> None:
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
        index = {"weight_map": {"model.norm.weight": file_name}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _spoiled(names: tuple[str, ...], kinds: tuple[str, ...] = KINDS) -> dict[str, Change]:
    return {f"{name}, {kind}": _spoils(name, kind) for name in names for kind in kinds}


def _models() -> dict[str, Change]:
    counts = {f"{n} {v}": _json("config.json", **{n: v}) for n in COUNTS for v in NO_COUNTS}
    indexed = {f"index {name}": _indexed(name) for name in INDEXED}
    spoiled = _spoiled(("config.json", "tokenizer.json"))
    taken = ("infinite", "link to itself")  # an object without what is looked for; no file at all
    kinds = tuple(kind for kind in KINDS if kind not in taken)
    spoiled |= _spoiled(("tokenizer_config.json",), kinds)
    other = {"unknown family": _json("config.json", model_type="nonesuch")}
    return counts | indexed | spoiled | other


def _weights(name: str) -> dict[str, Change]:
    """Return damaged safetensors files: cut, with absurd headers, of other tensors."""

    def with_header(n_bytes: int, header: bytes) -> bytes:
        return struct.pack("<Q", n_bytes) + header

    absurd = b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}'
    contents: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda _old: b"",
        "cut": lambda old: old[: len(old) // 2],
        "no header": lambda _old: bytes(64),
        "endless header": lambda old: with_header(1 << 60, old[8:]),
        "absurd shape": lambda _old: with_header(len(absurd), absurd + bytes(4)),
        "header of a list": lambda _old: with_header(2, b"[]"),
    }
    changes = {f"{name}, {what}": _writes(name, content) for what, content in contents.items()}

    def not_finite(copy: Path, _whole: Path) -> None:
        from safetensors.numpy import load_file

        tensors = load_file(copy / name)
        first = sorted(tensors)[0]
        save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, copy / name)

    return changes | {f"{name}, not finite": not_finite} | _spoiled((name,), KINDS[-2:])


def _gguf_files() -> Iterator[tuple[str, bytes]]:
    """Yield beginnings of .gguf files that cannot be."""
    for name, counts in {"tensors": (1 << 60, 0), "metadata": (0, 1 << 60), "none": (0, 0)}.items():
        yield f"gguf, {name}", b"GGUF" + struct.pack("<IQQ", 3, *counts)
    yield "gguf, other file", b"GGUX" + bytes(60)
    yield "gguf, old", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)
    yield "gguf, empty", b""


def _adapters() -> dict[str, Change]:
    """Return changes of an adapter, whose hashes would notice most of them before it is looked at:
    they are of one without.
    """

    def pickled(copy: Path, _whole: Path) -> None:
        (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")

    def without_hashes(change: Change) -> Change:
        def changed(copy: Path, whole: Path) -> None:
            (copy / "swlora.json").unlink()
            change(copy, whole)

        return changed

    config = "adapter_config.json"
    changes = {
        **_spoiled((config,)),
        **_weights("adapter_model.safetensors"),
        "other rank": _json(config, r=5),
        "no rank": _json(config, r="3"),
        "negative rank": _json(config, r=-1),
        "other targets": _json(config, target_modules=["nonesuch"]),
        "other type": _json(config, peft_type="NONESUCH"),
        "pickled": pickled,
    }
    foreign = {name: without_hashes(change) for name, change in changes.items()}
    return foreign | _spoiled(("swlora.json",), KINDS[:-1])  # a link that ends nowhere is no file


def _runs() -> dict[str, Change]:
    return _spoiled(("run.json", "config.yaml")) | _spoiled(("metrics.jsonl",), ("pipe",))

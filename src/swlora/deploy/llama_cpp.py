"""llama.cpp at work on a GGUF file: log-probabilities, greedy continuations, token ids.

It runs in a process of its own, through the npm package node-llama-cpp, which brings built
binaries. On the CPU alone: nothing is downloaded, built or sent.
"""

import json
import math
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swlora.errors import RunFailedError, UserError
from swlora.models.gguf_header import read_gguf_table
from swlora.paths import expanded

PACKAGE = "node-llama-cpp"
TESTED_VERSION = "3.21.1"
OLDEST_NODE = 20  # older ones do not know its regular expressions
INSTALL = f"npm install {PACKAGE}@{TESTED_VERSION}"
VARIABLE = "SWLORA_LLAMA_CPP"
SCRIPT = Path(__file__).with_suffix(".mjs")
CACHED = Path(".cache") / "llama-cpp"  # where the Makefile installs it
TIMEOUT_S = 1800.0
LEAST_LOG_PROBABILITY = -100.0  # smaller ones are rounded to zero in its float32 probabilities


@dataclass(frozen=True)
class LlamaCpp:
    """An installation: the `node` to run, the package's folder and its version."""

    node: Path
    package: Path
    version: str

    @property
    def name(self) -> str:
        """What a report calls it."""
        return f"{PACKAGE} {self.version}"


@dataclass(frozen=True)
class Question:
    """What is asked of one file: token ids of texts, log-probabilities, continuations of prompts.

    `lora` is an adapter as GGUF on the `model`; sequences and prompts are lists of token ids.
    """

    model: Path
    lora: Path | None = None
    texts: Sequence[str] = ()
    sequences: Sequence[Sequence[int]] = ()
    prompts: Sequence[Sequence[int]] = ()
    n_new_tokens: int = 0
    threads: int = 1  # more than are free wait for one another, on a busy machine without an end

    @property
    def context_tokens(self) -> int:
        """The length that the longest of them comes to."""
        lengths = [len(sequence) for sequence in self.sequences]
        lengths += [len(prompt) + self.n_new_tokens for prompt in self.prompts]
        return max(lengths, default=0) + 8


@dataclass(frozen=True)
class Answer:
    """What llama.cpp said.

    `log_probabilities` has a float32 (tokens, vocabulary) for each sequence, in nats: row i is of
    the token behind token i. `tokens` are the ids of each text, without BOS.
    """

    release: str
    n_vocab: int
    bos: int | None
    eos: int | None
    add_bos: bool
    tokens: list[list[int]]
    continuations: list[list[int]]
    log_probabilities: list[Tensor]


def find_llama_cpp(named: Path | None = None) -> LlamaCpp | None:
    """Return the installation at `named` or in SWLORA_LLAMA_CPP, else one in or above the current
    folder; None where there is none.

    A place is the package's folder, a node_modules, or a folder with one. Raises UserError for a
    place that was named and holds none, or where a `node` that is new enough is missing for it.
    """
    variable = os.environ.get(VARIABLE)
    place = named if named is not None else Path(variable) if variable else None
    node = _node()
    if place is not None:
        package = _package_in(expanded(place))
        flag = "--llama-cpp" if named is not None else VARIABLE
        if package is None:
            raise UserError(f"{flag}: {place} holds no {PACKAGE}; `{INSTALL}` there installs it")
        if node is None:
            raise UserError(f"{flag} needs `node` on the path, Node.js {OLDEST_NODE} or newer")
        return _installation(node, package)
    package = next(filter(None, map(_package_in, _usual_places())), None)
    return _installation(node, package) if node and package else None


def _node() -> Path | None:
    """Return the Node.js on the path; None where it is missing, too old or does not run."""
    node = shutil.which("node")
    if node is None:
        return None
    try:
        said = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.match(r"v(\d+)\.", said.stdout)
    return Path(node) if version and int(version[1]) >= OLDEST_NODE else None


def _usual_places() -> Iterator[Path]:
    """Yield the current folder and those above it, as far as nobody else writes in them."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        found = folder.stat()
        is_open = os.name == "posix" and (
            found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.getuid())
        )
        if is_open:
            return  # what lies there or above may be another person's, and would be run
        yield folder
        yield folder / CACHED


def _package_in(place: Path) -> Path | None:
    for folder in (place, place / PACKAGE, place / "node_modules" / PACKAGE):
        if folder.name == PACKAGE and (folder / "dist" / "index.js").is_file():
            return folder.resolve()
    return None


def _installation(node: Path, package: Path) -> LlamaCpp:
    try:
        version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{package} is a damaged {PACKAGE}; `{INSTALL}` installs it") from error
    return LlamaCpp(node, package, str(version))


def ask(llama_cpp: LlamaCpp, question: Question, *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Run llama.cpp on a file and return what it says.

    Raises UserError for a damaged file, which is never given to it: node-llama-cpp's own reader
    takes gigabytes for one. Raises RunFailedError where llama.cpp cannot load or compute, or is not
    done in `timeout_s`.
    """
    for path in filter(None, (question.model, question.lora)):
        read_gguf_table(path)
    with tempfile.TemporaryDirectory(prefix="swlora-llama-cpp-") as scratch:
        output = Path(scratch) / "log_probabilities"
        request = {
            "package": (llama_cpp.package / "dist" / "index.js").as_uri(),
            "model": str(question.model.absolute()),
            "lora": str(question.lora.absolute()) if question.lora else None,
            "texts": list(question.texts),
            "sequences": [list(sequence) for sequence in question.sequences],
            "prompts": [list(prompt) for prompt in question.prompts],
            "n_new": question.n_new_tokens,
            "context_tokens": question.context_tokens,
            "threads": question.threads,
            "output": str(output),
        }
        said = _run(llama_cpp, request, question.model, timeout_s)
        rows = _log_probabilities(output, question.sequences, said["n_vocab"])
    return Answer(log_probabilities=rows, **said)


def _run(llama_cpp: LlamaCpp, request: dict[str, Any], model: Path, timeout_s: float) -> Any:
    command = [str(llama_cpp.node), str(SCRIPT)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            f"llama.cpp was not done with {model.name} in {timeout_s:.0f} s; try it again while "
            "nothing else runs, or with a smaller model"
        ) from None
    except OSError as error:
        raise RunFailedError(f"{llama_cpp.node} cannot be run: {error}") from error
    try:
        said = json.loads(done.stdout)
    except ValueError:  # it crashed, or this is no Node.js that knows modules
        lines = done.stderr.decode(errors="replace").split("\n")
        detail = next(filter(None, map(str.strip, reversed(lines))), "it said nothing")[:200]
        raise RunFailedError(
            f"llama.cpp broke off on {model.name} with code {done.returncode}: {detail}"
        ) from None
    if problem := said.get("error"):
        detail = " ".join(str(problem).split())[:400]
        raise RunFailedError(f"llama.cpp ({llama_cpp.name}) on {model.name}: {detail}")
    return said


def _log_probabilities(
    output: Path, sequences: Sequence[Sequence[int]], n_vocab: int
) -> list[Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    if not any(lengths):
        return []
    values = np.fromfile(output, dtype=np.float32)
    if values.size != sum(lengths) * n_vocab:
        raise RunFailedError(f"llama.cpp wrote {values.size} log-probabilities, not those asked")
    if not math.isfinite(float(values.max())):
        raise RunFailedError("llama.cpp gave no finite log-probability")
    return list(torch.from_numpy(values).view(-1, n_vocab).split(lengths))

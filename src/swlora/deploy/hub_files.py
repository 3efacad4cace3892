"""Which files of a folder go to the Hub and come from it, and whether they are whole.

Weights are safetensors or GGUF; beside them go configurations, the tokenizer, reports and the card.
Checkpoints, logs, data and code stay where they are.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from swlora.adapters.saved import CONFIG, FACTS, WEIGHTS, adapter_folder
from swlora.deploy.hub_places import is_place, published_text
from swlora.deploy.merge_report import MERGE_REPORT
from swlora.errors import UserError, brief
from swlora.models.gguf_header import read_gguf_table
from swlora.models.model_folder import CONFIG as MODEL_CONFIG
from swlora.models.model_folder import check_model_folder, check_regular_files
from swlora.models.weight_source import INDEX, SINGLE, open_weights, weight_files

Kind = Literal["adapter", "model"]

CARD = "README.md"
PULLED = "swlora-pull.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    "chat_template.jinja",
)
BESIDE = re.compile(r"LICEN[SC]E(\.\w+)?|NOTICE(\.\w+)?|[\w.-]+\.gguf(\.report\.json)?")
OF_KIND: dict[Kind, tuple[str, ...]] = {
    "adapter": (CONFIG, FACTS, *TOKENIZER),
    "model": (MODEL_CONFIG, "generation_config.json", *TOKENIZER, MERGE_REPORT, FACTS),
}
# What is taken from the Hub: plain data by the ends of its names, and no folders
READABLE = re.compile(
    r"[A-Za-z0-9_][\w.-]*\.(safetensors|json|txt|jinja|gguf|md)"
    r"|tokenizer\.model|spiece\.model|LICEN[SC]E|NOTICE"
)


@dataclass(frozen=True)
class Contents:
    """What of a folder goes to the Hub, without the card: names and sizes, and what stays.

    `replaced` are the texts that go in place of files, and `changes` say what is other in them.
    """

    kind: Kind
    folder: Path
    n_bytes: dict[str, int]
    left_out: list[str]
    replaced: dict[str, str]
    changes: list[str]


def adapter_contents(path: Path) -> Contents:
    """List the files of an adapter (or of the one in a run folder); UserError where it is none."""
    folder = adapter_folder(path)
    check_regular_files(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
    except Exception as error:  # of safetensors and torch, without a common kind
        raise UserError(f"{folder / WEIGHTS} is damaged: {brief(error)}") from error
    return _contents("adapter", folder, [WEIGHTS])


def model_contents(folder: Path) -> Contents:
    """List the files of a plain transformers folder; UserError where it is incomplete or none."""
    if not (folder / MODEL_CONFIG).is_file():
        raise UserError(
            f"{folder} is no model folder: it holds no {MODEL_CONFIG}; `swlora merge` makes one"
        )
    check_model_folder(folder)
    open_weights(folder)
    weights = list(weight_files(folder))
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise UserError(f"{folder} holds no tokenizer, without which nobody can use the model")
    return _contents("model", folder, [*weights, *([INDEX] if weights != [SINGLE] else [])])


def _contents(kind: Kind, folder: Path, weights: Sequence[str]) -> Contents:
    contents = Contents(kind, folder, {}, [], {}, [])
    wanted = {*OF_KIND[kind], *weights}
    for path in sorted(folder.iterdir()):
        is_ours = path.name in wanted or BESIDE.fullmatch(path.name)
        if path.name == CARD:
            continue
        if path.is_file() and is_ours:
            _check_own(path)
            if _is_fit(path, contents):
                continue
        contents.left_out.append(path.name + ("/" if path.is_dir() else ""))
    for name in contents.n_bytes:
        if name.endswith(".gguf"):
            _check_gguf(folder / name)
    return contents


def _check_own(path: Path) -> None:
    """Refuse a link out of the folder: it may lead to what nobody wants to publish.

    All files of a snapshot in the Hub's cache are links, to the blobs beside it.
    """
    folder, target = path.parent.resolve(), path.resolve()
    is_snapshot = folder.parent.name == "snapshots"
    own = [folder, folder.parent.parent / "blobs"] if is_snapshot else [folder]
    if not any(target.is_relative_to(place) for place in own):
        raise UserError(f"{path} is a link out of its folder: put the file itself there")


def _is_fit(path: Path, contents: Contents) -> bool:
    """Add a file to what is published; False for a report that names folders of this machine."""
    try:
        text, changes = published_text(path)
    except UserError:
        if path.name.endswith(".report.json"):
            return False
        raise
    contents.n_bytes[path.name] = path.stat().st_size if text is None else len(text.encode())
    if text is not None:
        contents.replaced[path.name] = text
        contents.changes.extend(changes)
    return True


def _check_gguf(path: Path) -> None:
    for key, value in read_gguf_table(path).facts.items():
        if is_place(value) and not key.startswith("tokenizer."):
            raise UserError(
                f"{path} names a folder of this machine in its metadata ({key}: {value})"
            )


def git_sha1_of(path: Path) -> str:
    """Return the name that git, and so the Hub, gives to a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def kind_of(names: Sequence[str]) -> str:
    """Say what files of these names are together; UserError where nothing there can be used."""
    if CONFIG in names and WEIGHTS in names:
        return "adapter"
    if MODEL_CONFIG in names and any(name.endswith(".safetensors") for name in names):
        return "model"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files"
    raise UserError(
        "it holds neither a model nor an adapter in safetensors, nor GGUF files; other formats of "
        "weights are not taken"
    )

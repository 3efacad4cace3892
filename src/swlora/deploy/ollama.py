"""A folder for Ollama: a Modelfile beside the GGUF files that it names.

The template is written out and not left to Ollama, which takes one of its own that resembles the
one in the file, with other words in places, or passes the prompt on as it is.
"""

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.config import ModelSpec
from swlora.deploy.go_template import GoTemplate, translate
from swlora.deploy.hub_files import MERGE_REPORT
from swlora.deploy.new_folder import check_new, new_folder
from swlora.errors import UserError
from swlora.files import read_json, write_text
from swlora.models.gguf_header import GgufHeader, read_gguf_table

MODELFILE = "Modelfile"
PLAIN_TEMPLATE = "{{ .Prompt }}"
MOST_CONTEXT_TOKENS = 8192  # by default: the cache of a long context takes gigabytes


@dataclass(frozen=True)
class Settings:
    """What a person chooses; None leaves it to the model, and the temperature to Ollama.

    `is_chat` says whether prompts are written as chats, `template` is a Go template of one's own.
    """

    is_chat: bool | None = None
    template: Path | None = None
    system: str | None = None
    temperature: float | None = None
    num_ctx: int | None = None


@dataclass(frozen=True)
class Packaged:
    """The folder, how each file came there ("link" or "copy"), what Ollama will be told.

    `template` is a text in Go's language; `stops` are texts that end an answer. `notes` are for a
    person to read.
    """

    folder: Path
    files: dict[str, str]
    is_chat: bool
    template: str
    stops: list[str]
    num_ctx: int
    notes: list[str]

    @property
    def commands(self) -> list[str]:
        """Return the commands that make the model and run it."""
        name = re.sub(r"[^a-z0-9._-]+", "-", self.folder.resolve().name.lower()).strip("-._")
        name = name or "tuned"
        modelfile = shlex.quote(str(self.folder / MODELFILE))
        return [f"ollama create {name} -f {modelfile}", f"ollama run {name}"]


def package(
    gguf: Path, lora: Path | None, model: ModelSpec, output: Path, settings: Settings
) -> Packaged:
    """Write the new folder `output`: a Modelfile and the files that it names.

    `model` is the one that the GGUF file was made of; its tokenizer, template and end tokens are
    read, and no weights. Raises UserError for files that are no such GGUF, and for a chat template
    that cannot be translated exactly.
    """
    from swlora.models.load import load_skeleton

    check_new(output)
    header = _check(gguf, lora)
    loaded = load_skeleton(model)
    tokenizer, notes = loaded.tokenizer, list[str]()
    is_chat = settings.is_chat
    if is_chat is None:
        is_chat = bool(tokenizer.chat_template) and _was_trained_on_chats(Path(model.name))
    if settings.template is not None:
        template = GoTemplate(_read(settings.template), has_system=True, trims=False)
        notes.append(f"the template is {settings.template.name}, as it is: it was not compared")
    elif is_chat:
        template = _translated(tokenizer, _adds_bos(header))
    else:
        template = GoTemplate(PLAIN_TEMPLATE, has_system=False, trims=False)
        notes.append("prompts are passed on as they are, for a model that continues text")
    if template.trims:
        notes.append("the model's own template strips white space around a turn; Ollama's does not")
    if is_chat and not template.has_system:
        notes.append("the model's template has no system turn: Ollama will leave one out")
        if settings.system:
            raise UserError("--system: the model's chat template has no place for a system turn")
    limit = loaded.context_tokens
    written = header.facts.get(f"{header.architecture}.context_length")
    if isinstance(written, int) and written > 0:
        limit = min(limit, written)  # less where llama.cpp computes without the model's window
    if settings.num_ctx is not None and settings.num_ctx > limit:
        raise UserError(f"--num-ctx: the model has a context of {limit:,} tokens")
    files = {path.name: path for path in (gguf, lora) if path}
    packaged = Packaged(
        folder=output,
        files={},
        is_chat=is_chat,
        template=template.text,
        stops=_stops(loaded, is_chat=is_chat),
        num_ctx=settings.num_ctx or min(limit, MOST_CONTEXT_TOKENS),
        notes=notes,
    )
    text = _modelfile(packaged, gguf.name, lora.name if lora else None, settings)
    with new_folder(output) as scratch:
        for name, path in files.items():
            packaged.files[name] = _put(path, scratch / name)
        write_text(scratch / MODELFILE, text)
    return packaged


def _check(gguf: Path, lora: Path | None) -> GgufHeader:
    header = _header(gguf)
    if header.facts.get("general.type") == "adapter":
        raise UserError(f"{gguf} is an adapter: give it as --gguf-lora, and its base as --gguf")
    if lora is not None:
        adapter = _header(lora)
        if adapter.facts.get("general.type") != "adapter":
            raise UserError(f"{lora} is no adapter; `swlora export --gguf-lora` makes one")
        if adapter.architecture != header.architecture:
            raise UserError(
                f"{lora} is for the architecture {adapter.architecture}, and {gguf} is "
                f"{header.architecture}"
            )
        if lora.name == gguf.name:
            raise UserError(f"both files are called {gguf.name}; rename one")
    return header


def _header(path: Path) -> GgufHeader:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*\.gguf", path.name):
        raise UserError(f"{path.name!r}: Ollama's files are letters, digits and .gguf; rename it")
    return read_gguf_table(path)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template: {path} cannot be read: {error}") from error
    if '"""' in text:
        raise UserError(f"--template: {path} holds three quotation marks, which end it in Ollama")
    return text


def _translated(tokenizer: Any, adds_bos: bool) -> GoTemplate:
    from swlora.data.chat import ChatTemplate

    if ChatTemplate(tokenizer).writes_date:
        raise UserError(
            "the chat template writes the date of the day, which no template of Ollama can: write "
            "one yourself and give it with --template FILE"
        )

    def write(chat: Any, answer: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=answer)
        )

    return translate(write, tokenizer.bos_token or "" if adds_bos else "")


def _was_trained_on_chats(model: Path) -> bool:
    """Say whether a merged model's adapter was trained on chats; True for any other model."""
    report = model / MERGE_REPORT
    adapter = read_json(report).get("adapter") if report.is_file() else None
    return bool(adapter.get("is_chat", True)) if isinstance(adapter, dict) else True


def _adds_bos(header: GgufHeader) -> bool:
    """Say whether llama.cpp puts BOS before what a template writes."""
    noted = header.facts.get("tokenizer.ggml.add_bos_token")
    if noted is None:
        return header.facts.get("tokenizer.ggml.model") == "llama"  # SentencePiece: it does
    return bool(noted)


def _stops(loaded: Any, *, is_chat: bool) -> list[str]:
    from swlora.data.chat_end import end_of_turn_tokens

    ids = set(loaded.end_token_ids)
    if is_chat and loaded.tokenizer.chat_template:
        ids |= end_of_turn_tokens(loaded.tokenizer)
    texts = [str(loaded.tokenizer.convert_ids_to_tokens(i)) for i in sorted(ids)]
    return [text for text in texts if text.isprintable() and '"' not in text]


def _modelfile(packaged: Packaged, gguf: str, lora: str | None, settings: Settings) -> str:
    lines = ["# Written by swlora package", f"FROM ./{gguf}"]
    lines += [f"ADAPTER ./{lora}"] if lora else []
    lines.append(f'TEMPLATE """{packaged.template}"""')
    if settings.system:
        if '"""' in settings.system:
            raise UserError("--system: three quotation marks end a text in a Modelfile")
        lines.append(f'SYSTEM """{settings.system}"""')
    lines += [f'PARAMETER stop "{text}"' for text in packaged.stops]
    lines.append(f"PARAMETER num_ctx {packaged.num_ctx}")
    lines.append("PARAMETER repeat_penalty 1.0")  # older versions punish repetition by default
    if settings.temperature is not None:
        lines.append(f"PARAMETER temperature {settings.temperature:g}")
    return "\n".join(lines) + "\n"


def _put(source: Path, target: Path) -> str:
    """Link a file into the folder where the disk is the same, else copy it; say which."""
    try:
        os.link(source.resolve(), target)
        return "link"
    except OSError:
        shutil.copyfile(source, target)
        return "copy"

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
from swlora.deploy.merge_report import was_trained_on_chats
from swlora.deploy.new_folder import check_new, new_folder
from swlora.deploy.ollama_files import check_same_model, has_other_template, read_files
from swlora.errors import UserError
from swlora.files import read_text, write_text
from swlora.models.gguf_header import GgufHeader
from swlora.models.gguf_tokenizer import adds_bos

MODELFILE = "Modelfile"
PLAIN_TEMPLATE = "{{ .Prompt }}"
SYSTEM_FIELDS = (".System", ".Messages")  # what a template of Ollama has a system turn from
LONG_FACTORS = "rope_factors_long.weight"
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
    from swlora.data.chat_end import end_of_turn_tokens
    from swlora.models.load import load_skeleton

    check_new(output)
    header = read_files(gguf, lora)
    loaded = load_skeleton(model)
    ends = set(loaded.end_token_ids) | end_of_turn_tokens(loaded.tokenizer)
    check_same_model(gguf, header, loaded, ends)
    is_chat = settings.is_chat
    if is_chat is None:
        is_chat = bool(loaded.tokenizer.chat_template) and was_trained_on_chats(loaded)
    if settings.system and not is_chat and settings.template is None:
        raise UserError(_why_no_system(settings, loaded.tokenizer))
    template, notes = _template(loaded.tokenizer, header, settings, is_chat=is_chat)
    stops, unwritten = _stops(loaded.tokenizer, ends if is_chat else set(loaded.end_token_ids))
    if unwritten:
        notes.append(f"no Modelfile can hold {', '.join(map(repr, unwritten))} as a stop")
    num_ctx, said = _context(header, loaded.context_tokens, settings.num_ctx)
    notes += said
    files = {path.name: path for path in (gguf, lora) if path}
    packaged = Packaged(
        folder=output,
        files={},
        is_chat=is_chat,
        template=template.text,
        stops=stops,
        num_ctx=num_ctx,
        notes=notes,
    )
    text = _modelfile(packaged, gguf.name, lora.name if lora else None, settings)
    with new_folder(output) as scratch:
        for name, path in files.items():
            packaged.files[name] = _put(path, scratch / name)
        write_text(scratch / MODELFILE, text)
    return packaged


def _why_no_system(settings: Settings, tokenizer: Any) -> str:
    """Say why there is no chat that a system turn could stand in, and what to do."""
    if settings.is_chat is False:
        return "--system is a turn of a chat: leave out --no-chat"
    if not tokenizer.chat_template:
        return "--system is a turn of a chat, and the model has no chat template: leave it out"
    return (
        "--system is a turn of a chat, and the merged adapter was trained on prompts with "
        "completions: leave it out, or give --chat"
    )


def _read(path: Path) -> str:
    text = read_text(path, "--template ")
    if '"""' in text:
        raise UserError(f"--template: {path} holds three quotation marks, which end it in Ollama")
    return text


def _template(
    tokenizer: Any, header: GgufHeader, settings: Settings, *, is_chat: bool
) -> tuple[GoTemplate, list[str]]:
    """Return the template, and what a person should know of it."""
    bos, has_bos = str(tokenizer.bos_token or ""), adds_bos(header)
    if settings.template is not None:
        own = GoTemplate(_read(settings.template), has_system=True, trims=False)
        if settings.system and not any(name in own.text for name in SYSTEM_FIELDS):
            raise UserError(f"--system: {settings.template} writes no .System, which it would be")
        return own, [f"the template is {settings.template.name}, as it is: it was not compared"]
    if is_chat:
        template, writes_bos = _translated(tokenizer, bos, has_bos)
        notes = []
        if has_other_template(header, tokenizer):
            notes.append("the file's own chat template is another one: the model's was taken")
        if template.trims:
            notes.append("the model's template strips white space around a turn; Ollama's does not")
        if not template.has_system:
            notes.append("the model's template has no system turn: Ollama will leave one out")
            if settings.system:
                raise UserError("--system: the model's chat template has no place for one")
    else:
        writes_bos = tokenizer.bos_token_id in tokenizer("x").input_ids[:1]
        first = bos if writes_bos and not has_bos else ""
        template = GoTemplate(first + PLAIN_TEMPLATE, has_system=False, trims=False)
        notes = ["prompts are passed on as they are, for a model that continues text"]
    if has_bos and not writes_bos:
        notes.append(
            f"the file has llama.cpp put BOS ({bos or 'its own'}) first; the model has none"
        )
    return template, notes


def _translated(tokenizer: Any, bos: str, has_bos: bool) -> tuple[GoTemplate, bool]:
    """Return the chat template for Ollama, and whether the model's own begins with BOS."""
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

    template = translate(write, bos if has_bos else "")
    text = write([{"role": "user", "content": "x"}], True)
    return template, bool(bos) and text.startswith(bos)


def _context(header: GgufHeader, most: int, asked: int | None) -> tuple[int, list[str]]:
    """Return the context in tokens, and what a person should know of it.

    most: the model's own. Raises UserError where more is asked for than the model or the file has.
    """
    written = header.facts.get(f"{header.architecture}.context_length")
    if isinstance(written, int) and written > 0:
        most = min(most, written)  # less where llama.cpp computes without the model's window
    if asked is not None and asked > most:
        raise UserError(f"--num-ctx: the model has a context of {most:,} tokens")
    original = header.facts.get(f"{header.architecture}.rope.scaling.original_context_length")
    usual = min(most, MOST_CONTEXT_TOKENS)
    if LONG_FACTORS not in header.tensors or not isinstance(original, int) or original < 1:
        return asked or usual, []
    # LongRoPE: the model takes its long factors for a long text, llama.cpp for a long context
    chosen = asked or min(usual, original)
    if chosen > original:
        return chosen, [
            f"beyond a context of {original:,} tokens llama.cpp computes short texts, too, with "
            "the factors for long ones, as the model does not"
        ]
    if chosen < usual and asked is None:
        return chosen, [
            f"the context is {original:,} tokens: with a longer one (--num-ctx) llama.cpp computes "
            "short texts, too, with the factors for long ones"
        ]
    return chosen, []


def _stops(tokenizer: Any, token_ids: set[int]) -> tuple[list[str], list[str]]:
    """Return the texts of tokens that end an answer, and those that no Modelfile can hold."""
    texts = [str(tokenizer.decode([i], skip_special_tokens=False)) for i in sorted(token_ids)]
    stops = list(dict.fromkeys(text for text in texts if text))
    good = [text for text in stops if _is_writable(text)]
    return good, [text for text in stops if text not in good]


def _is_writable(text: str) -> bool:
    """Say whether Ollama reads a text as it is: it drops what is not printable."""
    is_kept = all(c.isprintable() or c in "\n\t" for c in text) and "\ufffd" not in text
    return is_kept and '"' not in text


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

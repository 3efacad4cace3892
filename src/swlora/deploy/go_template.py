"""Chat templates for Ollama: Go templates, found by probing what the model's own template writes.

A template is translated only where it writes every turn between the same two texts, as ChatML,
Llama 3, Zephyr, Phi-3 and Gemma do; the translation is then evaluated here and must write the same
as the model's own for chats of several shapes. Go's language: https://pkg.go.dev/text/template
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swlora.deploy.go_evaluate import evaluate
from swlora.errors import UserError, brief
from swlora.plural import counted

Chat = Sequence[Mapping[str, str]]
Write = Callable[[Chat, bool], str]  # a chat, and whether an answer is to begin: its text

_WORDS = ("Xyzzy", "Plugh", "Quux", "Fnord", "Grault")  # found again in what is written
_WHAT_TO_DO = (
    "write a Go template yourself and give it with --template FILE, or run the file in "
    "llama-server, which uses the template in it"
)


@dataclass(frozen=True)
class ChatForm:
    """What a template writes before and behind each turn, and before the next answer.

    `no_system` stands first where a chat has no system turn. `merges_system` says that the system's
    text stands inside the first user's turn; `system` is None where the template has no such turn.
    """

    no_system: str
    system: tuple[str, str] | None
    merges_system: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str


@dataclass(frozen=True)
class GoTemplate:
    """A template for Ollama; `trims` says that the model's own strips white space around turns."""

    text: str
    has_system: bool
    trims: bool


def translate(write: Write, bos: str) -> GoTemplate:
    """Return a Go template that writes what `write` does, without `bos` at the beginning.

    Raises UserError where the template is not of a form that is known, with what to do.
    """

    def written(chat: Chat, answer: bool) -> str:
        try:
            return write(chat, answer).removeprefix(bos)
        except Exception as error:  # a template may fail in any way
            raise _unknown(f"it refuses a chat: {brief(error)}") from error

    form = find_form(written)
    text = _as_go(form)
    has_system = form.system is not None
    for chat in _trial_chats(has_system):
        if evaluate(text, chat) != written(chat, True):
            raise UserError(
                f"the chat template writes chats of {counted(len(chat), 'turn')} in a way that "
                f"is not translated for Ollama: {_WHAT_TO_DO}"
            )
    padded = [{"role": "user", "content": "  a \n"}]
    return GoTemplate(text, has_system, trims=evaluate(text, padded) != written(padded, True))


def find_form(written: Write) -> ChatForm:
    """Find what stands around the turns; UserError where that differs from turn to turn."""
    user, other, more, said, system = _WORDS
    chat = _turns(user=user, assistant=said) + _turns(user=other)
    begin, turn, behind, end = _between(written(chat, True), (user, said, other))
    closed = _between(written(chat, False), (user, said, other))[3]
    if not (end.startswith(closed) and turn.startswith(closed)):  # some end a whole chat otherwise
        closed = _common_start(end, turn)
    shared = _common_start(begin[::-1], behind[::-1])[::-1]  # before a user's words
    answered = _between(written(chat[:2], False), (user, said))[2]
    if behind.startswith(answered) and shared.endswith(behind.removeprefix(answered)):
        shared = behind.removeprefix(answered)  # without the end of the turn before
    form = ChatForm(
        no_system=begin.removesuffix(shared),
        system=None,
        merges_system=False,
        user=(shared, closed),
        assistant=(turn.removeprefix(closed), behind.removesuffix(shared)),
        answer=end.removeprefix(closed),
    )
    try:
        with_system = written([*_turns(system=system), *_turns(user=more)], True)
    except UserError:
        return form
    if system not in with_system:
        return form
    before, between, _ = _between(with_system, (system, more))
    if between.endswith(shared) and shared:
        return _with(form, (before, between.removesuffix(shared)), merges=False)
    if shared and before.startswith(form.no_system + shared):
        return _with(form, (before.removeprefix(form.no_system + shared), between), merges=True)
    raise _unknown("it has an unknown place for a system turn")


def _with(form: ChatForm, system: tuple[str, str], *, merges: bool) -> ChatForm:
    return ChatForm(form.no_system, system, merges, form.user, form.assistant, form.answer)


def _turns(**said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said.items()]


def _between(text: str, words: Sequence[str]) -> list[str]:
    """Return the pieces of a text around words that each stand in it once, in this order."""
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found or word in text:
            raise _unknown("it does not write each turn once, in the order of the chat")
        pieces.append(piece)
    return [*pieces, text]


def _common_start(one: str, other: str) -> str:
    n = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None
    )
    return one[:n] if n is not None else min(one, other, key=len)


def _unknown(reason: str) -> UserError:
    return UserError(f"the chat template is not translated for Ollama ({reason}): {_WHAT_TO_DO}")


def _as_go(form: ChatForm) -> str:
    pieces = [*form.user, *form.assistant, form.answer, form.no_system, *(form.system or ())]
    for piece in pieces:
        # A Modelfile drops what is not printable, and ends a text at three quotation marks
        if "{{" in piece or "}}" in piece or '"""' in piece:
            raise _unknown("it writes brackets or quotation marks that Ollama reads itself")
        if not all(c.isprintable() or c in "\n\t" for c in piece):
            raise _unknown("it writes characters that Ollama drops")
    first = system = ""
    if form.system and form.merges_system:
        before, behind = form.system
        first = "{{ $system := .System }}"
        system = f"{{{{ if $system }}}}{before}{{{{ $system }}}}{behind}"
        system += '{{ $system = "" }}{{ end }}'
        branches = ""
    elif form.system:
        before, behind = form.system
        branches = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{behind}{{{{ else '
    else:
        branches = ""
    no_system = form.no_system
    if form.system and no_system and not form.merges_system:
        no_system = f"{{{{ if not .System }}}}{no_system}{{{{ end }}}}"
    opening = branches or "{{ "
    user = f'{opening}if eq .Role "user" }}}}{form.user[0]}{system}{{{{ .Content }}}}{form.user[1]}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{form.assistant[0]}{{{{ .Content }}}}'
    answer += f"{form.assistant[1]}{{{{ end }}}}"
    return f"{first}{no_system}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}{form.answer}"


def _trial_chats(has_system: bool) -> list[list[dict[str, Any]]]:
    words = 'He said "no" – 100 % {sure} <b>, \\n and\nwent.', "Ça va?", "1 + 1 = 2"
    exchange = _turns(user=words[0], assistant=words[1])
    chats = [_turns(user=words[0]), [*exchange, *_turns(user=words[2])]]
    chats.append([*exchange, *_turns(user=words[1], assistant=words[2]), *_turns(user=words[0])])
    if has_system:
        chats += [[*_turns(system=words[2]), *chat] for chat in chats]
    return chats

"""How a chat template ends an answer: what generation must stop at, and what a person should know.

Found by writing answers that are easily found again in the text.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swlora.data.examples import ASSISTANT, Message
from swlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swlora.data.chat import ChatTemplate, Rendered, Turns

_PROBE = "Xyzzy"
_ASKED = Message("user", "Hi")
_CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": _PROBE}}}


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes behind an answer.

    `only_last` is the end of `text` that it writes behind the last turn of a chat alone. `token_id`
    is the token that ends the turn, None where pieces of text do; `token_ids` are those that end
    an answer or a call of tools.
    """

    text: str
    only_last: str
    token_id: int | None
    token_ids: frozenset[int]


def find_turn_end(template: "ChatTemplate", tokenizer: "PreTrainedTokenizerBase") -> TurnEnd:
    """Find how the template ends an answer; UserError where it refuses one or writes it nowhere."""
    turns = (_ASKED, Message(ASSISTANT, _PROBE))
    written = _write(template, turns).text
    _, probe, text = written.rpartition(_PROBE)
    if not probe:
        raise UserError("the chat template does not write the assistant's answers")
    only_last = _only_last(template, tokenizer, written, text)
    token_id = _first_token(tokenizer, text)
    ends = (token_id, _call_end(template, tokenizer, token_id, only_last))
    return TurnEnd(text, only_last, token_id, frozenset(i for i in ends if i is not None))


def end_of_turn_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the tokens with which the tokenizer's template ends an answer or a call of tools.

    They are what training teaches to stop with, so generation for chats must stop at them, named in
    the model's generation_config.json or not. None are returned where there is no template.
    """
    from swlora.data.chat import ChatTemplate

    try:
        return ChatTemplate(tokenizer).end.token_ids
    except UserError:
        return frozenset()


def notes_on_chats(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return what a person should know before training chats with this tokenizer's template."""
    from swlora.data.chat import ChatTemplate

    template = ChatTemplate(tokenizer)
    try:
        end, written = template.end, _write(template, (_ASKED, Message(ASSISTANT, _PROBE)))
    except UserError:
        return []  # the rows will say it, and which
    found = []
    if end.token_id is None:
        found.append(
            f"the chat template ends an answer in {end.text!r}, which holds no token to stop at: "
            "generated answers end only where the model's own end tokens or --max-new-tokens say"
        )
    elif template.has_marks and not _marks_end(written, tokenizer, end.token_id):
        found.append(
            "the chat template's own marks leave out the token that ends an answer, so to stop is "
            "not trained"
        )
    if template.writes_date:
        found.append("the chat template writes the date of the day, so chats are trained with it")
    return found


def _write(template: "ChatTemplate", turns: "Turns") -> "Rendered":
    return template.render([turns], "", generation_prompt=False)[0]


def _marks_end(written: "Rendered", tokenizer: "PreTrainedTokenizerBase", token_id: int) -> bool:
    token = tokenizer.added_tokens_decoder[token_id].content
    at = written.text.find(token, written.text.rfind(_PROBE))
    return any(begin <= at < end for begin, end in written.marks)


def _only_last(
    template: "ChatTemplate", tokenizer: "PreTrainedTokenizerBase", alone: str, end: str
) -> str:
    """Return the part of `end` that is missing once the user speaks again."""
    turns = (_ASKED, Message(ASSISTANT, _PROBE), Message("user", "Plugh"))
    try:
        longer = _write(template, turns).text
    except UserError:
        return ""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    begins = {alone.rfind(token) for token in added if token and token in end}
    for begin in sorted({*begins, len(alone)}, reverse=True):
        if longer.startswith(alone[:begin]) and begin > len(alone) - len(end):
            return alone[begin:]
    return ""


def _call_end(
    template: "ChatTemplate",
    tokenizer: "PreTrainedTokenizerBase",
    token_id: int | None,
    only_last: str,
) -> int | None:
    """Return the token that ends a turn with calls of tools, None for `token_id` or no token.

    The one that ends each of several calls is no such token.
    """
    calls = Message(ASSISTANT, "", extra=json.dumps({"tool_calls": [_CALL, _CALL]}))
    try:
        written = _write(template, (_ASKED, calls)).text.removesuffix(only_last).rstrip()
    except UserError:
        return None
    before, probe, end = written.rpartition(_PROBE)
    if not probe:
        return None
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content.strip() and end.endswith(token.content):
            is_of_each = token.content in before.rpartition(_PROBE)[2]
            return None if is_of_each or i == token_id else int(i)
    return None


def _first_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """Return the first special token of a text, or the first that was added to the vocabulary."""
    added = tokenizer.added_tokens_decoder.items()
    for special in (True, False):
        # The first of them, and the longest that begins there
        found = sorted(
            (text.find(token.content), -len(token.content), token_id)
            for token_id, token in added
            if token.special == special and token.content.strip() and token.content in text
        )
        for at, minus_length, token_id in found[:1]:
            upto = _PROBE + text[: at - minus_length]
            if tokenizer(upto, add_special_tokens=False)["input_ids"][-1] == token_id:
                return int(token_id)
    return None

"""A chat's messages as turns for the tokenizer's template, none of them lost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from swlora.data.chat import ChatTemplate, Turns
from swlora.data.examples import Message as Turn
from swlora.errors import UserError
from swlora.web.neutral import Message


def turns_for(tokenizer: Any, messages: Sequence[Message]) -> Turns:
    """Return (role, content) turns as the template can write them.

    A developer is the system where the template has no place for developers. Raises UserError
    where the template refuses a message, or would leave it out in silence.
    """
    template = ChatTemplate(tokenizer)
    turns = tuple(Turn(message.role, message.text) for message in messages)
    if not _has_place(template, turns, "developer"):
        turns = tuple(replace(t, role="system") if t.role == "developer" else t for t in turns)
    for role in ("system", "tool"):
        if _leaves_out(template, turns, role):
            raise UserError(f"this model's chat template has no place for a message of role {role}")
    return turns


def _has_place(template: ChatTemplate, turns: Turns, role: str) -> bool:
    try:
        return not _leaves_out(template, turns, role)
    except UserError:
        return False


def _leaves_out(template: ChatTemplate, turns: Turns, role: str) -> bool:
    """Say whether the text is the same, whatever the messages of a role say, if there are any."""
    if role not in {turn.role for turn in turns}:
        return False
    changed = tuple(
        replace(turn, content=f"{turn.content}x") if turn.role == role else turn for turn in turns
    )
    return template.prompt(turns) == template.prompt(changed)

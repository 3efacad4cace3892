"""A chat's messages as turns for the tokenizer's template, none of them lost."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from swlora.errors import UserError
from swlora.web.neutral import Message

Turns = tuple[tuple[str, str], ...]


def turns_for(tokenizer: Any, messages: Sequence[Message]) -> Turns:
    """Return (role, content) turns as the template can write them.

    A developer is the system where the template has no place for developers. Raises UserError
    where a message would be left out in silence; a template that fails in another way is left to
    whoever writes the turns.
    """
    turns = tuple((message.role, message.text) for message in messages)
    roles = {role for role, _ in turns}
    if "developer" in roles and not _writes(tokenizer, turns, "developer"):
        turns = tuple(("system" if r == "developer" else r, text) for r, text in turns)
    for role in ("system", "tool"):
        if role in {r for r, _ in turns} and _leaves_out(tokenizer, turns, role):
            raise UserError(f"this model's chat template has no place for a message of role {role}")
    return turns


def _writes(tokenizer: Any, turns: Turns, role: str) -> bool:
    try:
        return not _leaves_out(tokenizer, turns, role)
    except TemplateError:
        return False


def _leaves_out(tokenizer: Any, turns: Turns, role: str) -> bool:
    """Say whether the text is the same, whatever the messages of a role say."""
    changed = tuple((r, f"{text}x" if r == role else text) for r, text in turns)
    return _written(tokenizer, turns) == _written(tokenizer, changed)


def _written(tokenizer: Any, turns: Turns) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text)

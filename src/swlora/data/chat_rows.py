"""A chat of a file, as an example: what is used of it, and what is refused because it is not.

Chats come in the form that OpenAI's fine-tuning and transformers share. Turns have a role and a
content, a string or parts of text; `weight`, or `train`, says how much an answer is trained. All
other fields of a turn, and the tools of a row, are for the chat template, which is asked later
whether it writes them. A field of a row that would change what is shown or trained and is not used
is refused by name; an empty one says nothing.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from swlora.data.examples import ASSISTANT, Example, Message, check_text

ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_LEAVE_OUT = "it is not used; leave it out"
_ONLY_TEXT = "only text is used"
_ROW_FIELDS = {  # beside prompt and completion, or messages
    "functions": "give them as tools",
    "history": "write its turns as messages",
    "documents": _LEAVE_OUT,
    "chat_template_kwargs": _LEAVE_OUT,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _ONLY_TEXT),
}
_CHAT_FIELDS = dict.fromkeys(  # beside messages
    ("system", "system_prompt"), "write it as the first message, with the role 'system'"
)
_PAIR_FIELDS = {
    "tools": "only chats have them; write them into the prompt, and leave it out",
    **dict.fromkeys(("system", "system_prompt", "input"), "write it into the prompt"),
}


def unused_meaning(
    row: Mapping[str, object],
    columns: Collection[str],
    *,
    is_chat: bool,
    renamed: Mapping[str, str] | None = None,
) -> str | None:
    """Say which field of a row would change its meaning and is not used; None for no such.

    `columns` are used, whatever their names; `renamed` are the columns that were named for fields,
    which mean something whatever the field is.
    """
    fields = _ROW_FIELDS | (_CHAT_FIELDS if is_chat else _PAIR_FIELDS)
    other = {
        column: fields.get(name, f"its form has no {name!r}; leave it out")
        for name, column in (renamed or {}).items()
    }
    unused = (
        f"it has the field {column!r}: {why}"
        for column, why in (fields | other).items()
        if row.get(column) and column not in columns
    )
    return next(unused, None)


def make_chat(messages: object, tools: object = None) -> Example | str:
    """Return a chat that ends in the assistant's answer, or the reason why it cannot be used."""
    if not isinstance(messages, list) or len(messages) < 2:
        return "its messages are not a list of two turns or more"
    turns: list[Message] = []
    for message in messages:
        turn = _turn(message if isinstance(message, dict) else {}, turns)
        if isinstance(turn, str):
            return turn
        turns.append(turn)
    if turns[-1].role != ASSISTANT:
        return "its last message is not the assistant's: leave out what follows the last answer"
    if not any(turn.content.strip() for turn in turns[:-1]):
        return "its prompt is empty"
    if all(turn.trained == 0 for turn in turns if turn.role == ASSISTANT):
        return "the weight of all its answers is 0, so nothing is trained; leave it out"
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return "its tools are not a list of objects"
    written = _json(tools) if tools else ""
    return "its tools are not valid text" if written is None else Example.chat(turns, written)


def _turn(message: dict[str, Any], before: list[Message]) -> Message | str:
    """Return a message as a turn, or say why it cannot be used as it stands."""
    role = message.get("role")
    if role not in ROLES:
        return f"a message has the role {role!r:.40}, not one of {', '.join(ROLES)}"
    if role == "tool" and not any(turn.role == ASSISTANT for turn in before):
        return "a message of the tool stands before the first answer of the assistant"
    known = ("role", "content", "weight", "train")
    fields = {n: v for n, v in message.items() if n not in known and v not in (None, "", [], {})}
    content, text = message.get("content"), _text(message.get("content"))
    if text is None and content is not None:
        return f"the content of a message of the {role} is not a string, or parts that are text"
    says_more = role == ASSISTANT and bool(fields)
    if content is None and not says_more:
        return f"a message of the {role} has no content"
    trained = _trained(message, role)
    if isinstance(trained, str):
        return trained
    if role == ASSISTANT and trained != 0 and not (text or "").strip() and not says_more:
        return "an answer of the assistant is empty; leave it out, or give it the weight 0"
    if not isinstance(content, str):
        fields["content"] = content
    extra = _json(fields) if fields else ""
    problem = "is not valid text" if extra is None else check_text(text or "")
    if problem:
        return f"a message of the {role} {problem}"
    return Message(role, text or "", trained, extra or "")


def _trained(message: dict[str, Any], role: str) -> float | str | None:
    """Return how much a message is trained, None where it does not say, or what is wrong."""
    weight, train = message.get("weight"), message.get("train")
    if train is not None and not isinstance(train, bool):
        return f"the field 'train' of a message is {train!r:.40}, not true or false"
    if weight is None:
        weight = train if train is None else float(train)
    elif isinstance(weight, bool) or not isinstance(weight, int | float):
        return f"the weight of a message is {weight!r:.40}, not a number"
    elif not 0 <= weight < math.inf:
        return f"the weight of a message is {weight!r:.40}, not a number from 0 on"
    elif train is not None and train != bool(weight):
        return f"a message has the weight {weight!r:.40} and train {json.dumps(train)}"
    if weight and role != ASSISTANT:
        return f"a message of the {role} is to be trained, and only the assistant's are"
    return None if weight is None else float(weight)


def _text(content: object) -> str | None:
    """Return the text of a content, which may come in parts; None where it is not all text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts = [part.get("text") for part in parts if part.get("type") == "text" and len(part) == 2]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(str(text) for text in texts)


def _json(value: object) -> str | None:
    """Return a value as JSON, its keys in their order; None where its text is not valid."""
    try:
        written = json.dumps(value, ensure_ascii=False)
    except TypeError:  # a date, or bytes, of a Parquet file
        return None
    return None if check_text(written) or "\\u0000" in written else written

"""A chat of a file, as an example: what is used of it, and what is refused because it is not.

Chats come in the form that OpenAI's fine-tuning and transformers share, which knows more than text:
tools, weights, images. A field that would change what is shown or trained is used exactly or
refused by name; an empty one says nothing.
"""

from swlora.data.examples import ASSISTANT, Example, Message, make_example

ROLES = ("system", "user", "assistant")
_LEAVE_OUT = "it is not used; leave it out"
_ONLY_TEXT = "only text is used"
_ROW_FIELDS = {  # beside prompt and completion, or messages
    "tools": "write them into the system message, and leave the field out",
    "functions": "write them into the system message, and leave the field out",
    "documents": _LEAVE_OUT,
    "chat_template_kwargs": _LEAVE_OUT,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _ONLY_TEXT),
}
_CHAT_FIELDS = dict.fromkeys(  # beside messages
    ("system", "system_prompt"), "write it as the first message, with the role 'system'"
)
_MESSAGE_FIELDS = {
    **dict.fromkeys(
        ("tool_calls", "function_call"), "write the call into the content, as the model shall"
    ),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "write it into the content, as the template does (<think>...</think>)",
    ),
}


def unused_meaning(
    row: dict[str, object], columns: tuple[str, str], *, is_chat: bool
) -> str | None:
    """Say which field of a row would change its meaning and is not used; None for no such.

    `columns` are used, whatever their names.
    """
    fields = _ROW_FIELDS | _CHAT_FIELDS if is_chat else _ROW_FIELDS
    named = (
        f"it has the field {name!r}: {why}"
        for name, why in fields.items()
        if row.get(name) and name not in columns
    )
    return next(named, None)


def make_chat(messages: object) -> Example | str:
    """Return a chat that ends in the assistant's answer, or the reason why it cannot be used."""
    if not isinstance(messages, list) or len(messages) < 2:
        return "its messages are not a list of two turns or more"
    turns: list[Message] = []
    for number, message in enumerate(messages, start=1):
        message = message if isinstance(message, dict) else {}
        if problem := _problem(message, is_last=number == len(messages)):
            return problem
        role, content = str(message["role"]), _text(message["content"])
        if content is None:
            return f"the content of a message of the {role} is not a string, or parts that are text"
        turns.append(Message(role, content))
    if turns[-1].role != ASSISTANT:
        return "its last message is not the assistant's"
    checked = make_example("\n".join(m.content for m in turns[:-1]), turns[-1].content)
    if isinstance(checked, str):
        return checked
    return Example.chat(turns)


def _problem(message: dict[str, object], *, is_last: bool) -> str | None:
    """Say why a message cannot be used as it stands."""
    role = message.get("role")
    if role not in ROLES:
        return f"a message has the role {role!r:.40}, not one of {', '.join(ROLES)}"
    for name, value in message.items():
        if name not in ("role", "content", "weight") and value not in (None, "", [], {}):
            why = _MESSAGE_FIELDS.get(name, _LEAVE_OUT)
            return f"a message of the {role} has the field {name!r:.40}: {why}"
    if message.get("content") is None:
        return f"a message of the {role} has no content"
    weight = message.get("weight")
    if weight is None:
        return None
    if weight not in (0, 1):
        return f"the weight of a message is {weight!r:.40}, not 0 or 1"
    if weight == 0 and is_last:
        return "the weight of its last answer is 0, and nothing else is trained"
    if weight == 1 and not is_last:
        return (
            f"a message of the {role} before the last answer has weight 1, and only the last "
            "answer is trained: end another row there"
        )
    return None


def _text(content: object) -> str | None:
    """Return the text of a content, which may come in parts; None where it is not all text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts = [part.get("text") for part in parts if part.get("type") == "text" and len(part) == 2]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(str(text) for text in texts)

"""The forms in which people write examples, and how a record of any of them becomes an Example.

    prompt, completion                  a text and what follows it; two lists of messages as well
    messages                            a chat, as OpenAI's fine-tuning and transformers write it
    conversations                       a chat of from and value (ShareGPT), or of messages
    instruction, input, output          a question and its answer: a chat of two turns
    text                                a document

A record is of the first form of which it has all columns that are needed, each record by itself; of
text where it has no column of another form. `--columns` says under which other names they stand.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from swlora.data.chat_rows import make_chat, unused_meaning
from swlora.data.examples import Example, make_example, make_text

_N_LISTED = 12  # columns of a record that a message names
Fields = dict[str, Any]  # of a record, by the names of its form


@dataclass(frozen=True)
class Form:
    """One form: the fields that it needs, those that it may have, and what makes examples of them.

    `make` returns the reason where the fields hold no example.
    """

    needed: tuple[str, ...]
    make: Callable[[Fields], Example | str]
    optional: tuple[str, ...] = ()
    is_chat: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All of its fields."""
        return (*self.needed, *self.optional)


def _pair(fields: Fields) -> Example | str:
    prompt, completion = fields["prompt"], fields["completion"]
    if not _is_turns(prompt) or not _is_turns(completion):
        unused = unused_meaning(fields, ("prompt", "completion"), is_chat=False)
        return unused or make_example(prompt, completion)
    read_only = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in prompt]
    return make_chat([*read_only, *completion], _tools(fields))


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _tools(fields: Fields) -> Any:
    """Return a row's tools; tables have them as JSON, since each is of another shape."""
    tools = fields.get("tools")
    try:
        return json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError:
        return tools  # which is refused as no list


SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _conversation(fields: Fields) -> Example | str:
    turns = fields["conversations"]
    if not isinstance(turns, list):
        return "its conversations are not a list of turns"
    messages: list[Fields] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields["system"]})
    for turn in turns:
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            return "a turn of its conversations has no from and value"
        speaker = turn["from"]
        role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            return f"a turn is from {speaker!r:.40}, not one of {', '.join(SPEAKERS)}"
        rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({**rest, "role": role, "content": turn["value"]})
    return make_chat(messages, _tools(fields))


def _instruction(fields: Fields) -> Example | str:
    texts = [fields["instruction"]]
    if fields.get("input") not in (None, ""):
        texts.append(fields["input"])
    for text in texts:
        if isinstance(problem := make_example(text, fields["output"]), str):
            return problem.replace("its prompt", "its instruction or input").replace(
                "its completion", "its output"
            )
    turns = [("user", "\n\n".join(texts)), ("assistant", fields["output"])]
    if fields.get("system"):
        turns.insert(0, ("system", fields["system"]))
    messages = [{"role": role, "content": content} for role, content in turns]
    return make_chat(messages, _tools(fields))


def _messages(fields: Fields) -> Example | str:
    return make_chat(fields["messages"], _tools(fields))


FORMS = (
    Form(("prompt", "completion"), _pair, ("tools",)),
    Form(("messages",), _messages, ("tools",), is_chat=True),
    Form(("conversations",), _conversation, ("system", "tools"), is_chat=True),
    Form(("instruction", "output"), _instruction, ("input", "system", "tools"), is_chat=True),
    Form(("text",), lambda fields: make_text(fields["text"])),
)
ALIKE = {  # other names that people give to fields, for suggestions
    "prompt": ("question", "query", "input", "instruction", "context", "source", "document"),
    "completion": ("answer", "response", "output", "chosen", "target", "summary", "label"),
    "messages": ("dialog", "dialogue", "chat", "turns", "conversation"),
    "text": ("content", "document", "body"),
}
FIELD_NAMES = tuple(dict.fromkeys(name for form in FORMS for name in form.names))


class Recogniser:
    """Makes examples of records; `columns` names the column of each field that has another name."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = {name: columns.get(name, name) for name in FIELD_NAMES}
        self._renamed = dict(columns)
        self._unseen = set(columns.values())

    @property
    def unseen(self) -> str:
        """A column that was named and that no record so far has; "" for none."""
        return min(self._unseen, default="")

    def example(self, record: Fields) -> Example | str:
        """Return the example that a record holds, or the reason why it holds none."""
        if self._unseen:
            self._unseen.difference_update(record)
        form = self.form(record)
        if form is None:
            return self.unknown(record)
        used = {self._columns[name] for name in form.names}
        problem = unused_meaning(record, used, is_chat=form.is_chat, renamed=self._renamed)
        if problem:
            return problem
        present = {n: record[self._columns[n]] for n in form.names if self._columns[n] in record}
        return form.make(present)

    def form(self, record: Fields) -> Form | None:
        """Return the form of a record: one with a column that was named comes before the others."""
        there = [form for form in FORMS if all(self._columns[n] in record for n in form.needed)]
        there = [form for form in there if self._renamed.keys() & set(form.names)] or there
        filled = [f for f in there if all(record[self._columns[n]] is not None for n in f.needed)]
        form = next(iter(filled or there), None)
        is_half = form is not None and form.needed == ("text",) and "text" not in self._renamed
        return None if is_half and self._has_parts(record) else form

    def unknown(self, record: Fields) -> str:
        """Say what a record of no form has, and what the nearest forms need."""
        found = ", ".join(f"{name!r:.40}" for name in islice(record, _N_LISTED)) or "none"
        if len(record) > _N_LISTED:
            found += f" and {len(record) - _N_LISTED} more"
        for name in sorted(self._renamed, key=FIELD_NAMES.index):
            if self._columns[name] not in record:
                return f"it has no column {self._columns[name]!r}; columns found: {found}"
        nearest = sorted(FORMS, key=lambda form: self._distance(form, record))[:3]
        needed = "; ".join(" and ".join(self._columns[n] for n in form.needed) for form in nearest)
        return (
            f"its columns are of no known form: {found}; the nearest forms have {needed}; name "
            f"yours with --columns, such as {self._suggestion(nearest[0], list(record))}"
        )

    def _has_parts(self, record: Fields) -> bool:
        """Say whether a record has a part of another form, so that its text is not all of it."""
        others = {self._columns[name] for form in FORMS for name in form.needed} - {"text"}
        return any(record.get(column) for column in others)

    def _distance(self, form: Form, record: Fields) -> float:
        """Return how far the record's columns are from those that a form needs, from 0 to 1."""
        free = list(record)
        missing = float(form.needed == ("text",) and self._has_parts(record))
        for name in form.needed:
            near, column = self._nearest(name, free)
            missing += 1 - near
            if column is not None:
                free.remove(column)
        return missing / len(form.needed)

    def _nearest(self, name: str, columns: Sequence[str]) -> tuple[float, str | None]:
        """Return how near the nearest column is to a field, from 0 to 1, and which that is."""
        wanted = (self._columns[name], *ALIKE.get(name, ()))
        found = [
            (difflib.SequenceMatcher(None, alike, column.lower()).ratio(), column)
            for alike in wanted
            for column in columns
        ]
        return max(found, default=(0.0, None))

    def _suggestion(self, form: Form, found: Sequence[str]) -> str:
        """Return an example of --columns for a form that is nearly there."""
        is_plain = re.compile(r"[\w .:/-]+").fullmatch
        free, pairs = [c for c in found if c not in form.needed and is_plain(c)], []
        for name in form.needed:
            if name not in found:
                _, column = self._nearest(name, free)
                pairs.append(f"{name}={column or 'COLUMN'}")
                free = [other for other in free if other != column]
        return ",".join(pairs or [f"{name}={name}" for name in form.needed])

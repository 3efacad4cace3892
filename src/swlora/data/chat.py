"""A tokenizer's chat template: chats to text, exactly as transformers' own renderer writes them.

What a template leaves out in silence (a field of a message, tools) is refused by name here, since
the model would never see it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from swlora.data.chat_bounds import bound_template, limited_rendering
from swlora.data.chat_end import TurnEnd, find_turn_end
from swlora.data.chat_syntax import asks_alike
from swlora.data.chat_trace import Traced, trace
from swlora.data.examples import ASSISTANT, Message
from swlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Message]

# Fields that say which call a tool's answer belongs to. Templates tell it by the order.
_BOOKKEEPING = {("tool", "tool_call_id"), ("tool", "name")}
_OWN_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
_TRACES = 8  # in vain, before a template is taken for one that looks ahead
# Names under which transformers' renderer also gives a turn's reasoning to the template
_REASONING = re.compile('"(reasoning_content|reasoning|thinking)"')
_PROBE = "Xyzzy"  # a text that is easily found in what a template writes


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text; `marks` are the (start, end) of what {% generation %} encloses in it."""

    text: str
    marks: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer; UserError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the rows are chats and the tokenizer has no chat template: use a model made for "
                "chat, or rows of prompt and completion"
            )
        self._tokenizer = tokenizer
        self._written_fields: set[tuple[str, str]] = set()  # (role, field) that it does not drop
        self._takes_parts: dict[str, bool] = {}
        self._n_traced_in_vain = 0
        self._asks_alike: dict[bool, bool] = {}  # with tools, and without
        self._asked: dict[bool, str] = {}

    def prompt(self, turns: Turns, tools: str = "") -> str:
        """Write turns and the beginning of an answer; UserError where the template refuses."""
        return self.render([turns], tools, generation_prompt=True)[0].text

    def render(
        self, chats: Sequence[Turns], tools: str, *, generation_prompt: bool
    ) -> list[Rendered]:
        """Write chats that have the same tools; UserError where the template refuses one."""
        try:
            as_dicts = [self._as_dicts(turns) for turns in chats]
            return self._rendered(as_dicts, tools, generation_prompt)
        except Exception as error:  # a template may fail in any way
            if len(chats) > 1:
                for turns in chats:  # which one?
                    self.render([turns], tools, generation_prompt=generation_prompt)
            roles = ", ".join(turn.role for turn in chats[0])
            what = f"the turns {roles}" if roles else "an answer before any other turn"
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template refuses {what}: {reason}") from error

    def trace(self, turns: Turns, tools: str) -> Traced | None:
        """Write a chat and note what was written before each turn; None where that says nothing."""
        if self._n_traced_in_vain >= _TRACES:
            return None
        if any(_REASONING.search(turn.extra) for turn in turns):
            return None
        self._n_traced_in_vain += 1
        if (compiled := self._compiled(tools)) is None:
            return None
        variables = {
            "tools": json.loads(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": False,
            **self._special_tokens,
        }
        return trace(compiled, self._as_dicts(turns), variables)

    def known_generation_prompt(self, tools: str) -> str | None:
        """Return what it writes for generation behind whatever turns; None if unknown."""
        return self._asked.get(bool(tools))

    def learn_generation_prompt(self, added: str, tools: str) -> bool:
        """Take `added`, which it wrote behind some turns, for all; False where that is not sure."""
        with_tools = bool(tools)
        if with_tools not in self._asks_alike:
            compiled, source = self._compiled(tools), self._source(with_tools=with_tools)
            alike = compiled is not None and asks_alike(compiled.environment.parse(source))
            self._asks_alike[with_tools] = alike
        if self._asks_alike[with_tools]:
            self._asked[with_tools] = added
        return self._asks_alike[with_tools]

    def has_traced_well(self) -> None:
        """Take it that the last trace was of use; after some that were not, there are no more."""
        self._n_traced_in_vain = 0

    def check_fields(self, turns: Turns, tools: str) -> None:
        """Raise UserError for what the template leaves out: tools, a field of a message, a role.

        The last of `turns` is an answer. What the template wrote among turns of the same roles it
        is not asked for again.
        """
        before = turns[:-1]  # as generation shows them: some write the system's words there only
        of_tools = (" ".join(dict.fromkeys(turn.role for turn in before)), "tools")
        if tools and of_tools not in self._written_fields:
            if self.prompt(before, tools) == self.prompt(before):
                raise UserError(
                    "the chat template has no place for tools: write them into the system message, "
                    "and leave the field out"
                )
            self._written_fields.add(of_tools)
        for number, turn in enumerate(turns):
            if number < len(before):
                self._check_role(before, number, tools)
            for name in json.loads(turn.extra) if turn.extra else ():
                self._check_field(turns[: number + 1], name, tools)

    def _check_field(self, turns: Turns, name: str, tools: str) -> None:
        """Raise UserError for a field of the last of the turns that the template leaves out."""
        *before, turn = turns
        if name == "content" or (turn.role, name) in _BOOKKEEPING:
            return
        # A call beside words may be left out where a call alone is not.
        key = (turn.role, f"{name} {bool(turn.content.strip())}")
        if key in self._written_fields:
            return
        fields = json.loads(turn.extra)
        del fields[name]
        less = Message(turn.role, turn.content, extra=json.dumps(fields))
        (ours,) = self.render([turns], tools, generation_prompt=False)
        try:
            (theirs,) = self.render([(*before, less)], tools, generation_prompt=False)
        except UserError:  # it cannot do without
            theirs = Rendered("")
        if ours == theirs:
            raise UserError(
                f"the chat template leaves out the field {name!r:.40} of a message of the "
                f"{turn.role}: write what it says into the content, or leave it out"
            )
        self._written_fields.add(key)

    def _check_role(self, turns: Turns, number: int, tools: str) -> None:
        role = turns[number].role
        if role in ("user", ASSISTANT) or (role, "content") in self._written_fields:
            return
        other = Message(role, turns[number].content + _PROBE)
        changed = (*turns[:number], other, *turns[number + 1 :])
        ours, theirs = self.render([turns, changed], tools, generation_prompt=True)
        if ours == theirs:
            raise UserError(f"the chat template has no place for a message of the {role}")
        self._written_fields.add((role, "content"))

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks itself what is generated."""
        return bool(_OWN_MARKS.search(self._source(with_tools=False)))

    @cached_property
    def writes_date(self) -> bool:
        """Whether the template asks for the date of the day."""
        return "strftime_now" in self._source(with_tools=False)

    @cached_property
    def end(self) -> TurnEnd:
        """How the template ends an answer; UserError where it refuses to write one."""
        return find_turn_end(self, self._tokenizer)

    def _as_dicts(self, turns: Turns) -> list[dict[str, Any]]:
        return [
            self._with_fields(turn) if turn.extra else {"role": turn.role, "content": turn.content}
            for turn in turns
        ]

    def _with_fields(self, turn: Message) -> dict[str, Any]:
        fields = {"role": turn.role, "content": turn.content, **json.loads(turn.extra)}
        if isinstance(fields["content"], list) and not self._parts_are_text(turn.role):
            fields["content"] = turn.content
        if isinstance(calls := fields.get("tool_calls"), list):
            fields["tool_calls"] = [self._with_arguments(call) for call in calls]
        return {name: value for name, value in fields.items() if value is not None}

    def _with_arguments(self, call: Any) -> Any:
        """Return a call with its arguments as the template wants them."""
        try:
            function = call["function"]
            arguments = self._arguments(function["arguments"])
        except (TypeError, KeyError, ValueError):  # no call that a template knows, or no JSON
            return call
        return {**call, "function": {**function, "arguments": arguments}}

    def _parts_are_text(self, role: str) -> bool:
        """Say whether the template writes a content in parts as it writes the text of them."""
        if role not in self._takes_parts:
            parts = [{"type": "text", "text": _PROBE}]
            before = [{"role": "user", "content": "Hi"}] if role == ASSISTANT else []
            contents: tuple[Any, ...] = (_PROBE, parts)
            chats = [[*before, {"role": role, "content": content}] for content in contents]
            try:
                as_text, as_parts = self._rendered(chats, "", False)
                self._takes_parts[role] = as_text == as_parts
            except Exception:  # a template may fail in any way
                self._takes_parts[role] = False
        return self._takes_parts[role]

    @cached_property
    def _arguments(self) -> Callable[[Any], Any]:
        """How arguments of calls, values or JSON, are given so that they are written as JSON once.

        As they are where the template writes both alike, or neither.
        """
        values = {_PROBE: 1}
        texts: list[str | None] = []
        for arguments in (values, json.dumps(values)):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            turns: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
            turns.append({"role": ASSISTANT, "content": "", "tool_calls": [call]})
            try:
                texts.append(self._rendered([turns], "", False)[0].text)
            except Exception:  # a template may fail in any way
                texts.append(None)
        of_values, of_json = texts
        if of_values is not None and (of_json is None or f'\\"{_PROBE}\\"' in of_json):
            return lambda given: json.loads(given) if isinstance(given, str) else given
        if of_values is None and of_json is not None:
            return lambda given: given if isinstance(given, str) else _json(given)
        return lambda given: given

    def _rendered(
        self, chats: list[list[dict[str, Any]]], tools: str, generation_prompt: bool
    ) -> list[Rendered]:
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = self.has_marks and not generation_prompt
        self._compiled(tools)  # is bounded from then on
        texts: list[str] = []
        marks: list[list[tuple[int, int]]] = []
        for chat in chats:
            with limited_rendering():
                found = render_jinja_template(
                    [chat],
                    tools=json.loads(tools) if tools else None,
                    chat_template=self._source(with_tools=bool(tools)),
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=generation_prompt,
                    **self._special_tokens,
                )
            texts += found[0]
            marks += found[1] if marked else []
        if not marked:
            return [Rendered(text) for text in texts]
        return [Rendered(text, tuple(own)) for text, own in zip(texts, marks, strict=True)]

    def _compiled(self, tools: str) -> Any:
        """Return transformers' own template, bounded; None for a version that has it elsewhere."""
        from transformers.utils import chat_template_utils

        compile_source = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compile_source is None:
            return None
        source = self._source(with_tools=bool(tools))
        compiled = compile_source(source)
        bound_template(compiled, source)
        return compiled

    def _source(self, *, with_tools: bool) -> str:
        """Return the template's source; some tokenizers have another for chats with tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        except ValueError as error:  # several templates, and none of them the default
            raise UserError(f"the tokenizer has no default chat template: {error}") from error

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return dict(self._tokenizer.special_tokens_map)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

"""What Ollama makes of a template: the part of Go's text/template that translations are written in.

Known are `.System`, `.Content`, `.Role` and `$variables`, `range .Messages`, and `if`, `else if`,
`else` with a value, `not` and `eq`. As in Ollama, `.System` is all system turns, and `.Messages`
has them too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
_WORD = re.compile(r'"[^"]*"|\S+')


@dataclass
class _Branch:
    """`if` with its bodies by condition (None: else), or `range` with the body of each message."""

    kind: str
    arms: list[tuple[str | None, list[Any]]] = field(default_factory=list)


def evaluate(template: str, chat: Sequence[Mapping[str, str]]) -> str:
    """Return what a template writes for a chat; ValueError for what is not known here."""
    system = "\n\n".join(turn["content"] for turn in chat if turn["role"] == "system")
    values = {".System": system, ".Messages": chat}
    tokens = iter(_ACTION.split(template))
    body, end = _parse(tokens, is_text=True)
    if end != "":
        raise ValueError(f"{{{{ {end} }}}} without its beginning")
    return "".join(_write(body, values))


def _parse(tokens: Iterator[str], *, is_text: bool = True) -> tuple[list[Any], str]:
    """Return nodes up to the action that ends them, and that action ("" at the end)."""
    body: list[Any] = []
    for token in tokens:
        if is_text:
            body.append(token)
        elif token == "end" or token.startswith("else"):
            return body, token
        elif token.startswith(("if ", "range ")):
            body.append(_parse_branch(token, tokens))
        else:
            body.append((token,))
        is_text = not is_text
    return body, ""


def _parse_branch(opening: str, tokens: Iterator[str]) -> _Branch:
    kind, _, condition = opening.partition(" ")
    branch, asked = _Branch(kind), condition or None
    while True:
        body, end = _parse(tokens)
        branch.arms.append((asked, body))
        if end == "end":
            return branch
        if not end:
            raise ValueError(f"{{{{ {opening} }}}} without its end")
        asked = end.removeprefix("else").removeprefix(" if ") or None


def _write(body: Sequence[Any], values: dict[str, Any]) -> Iterator[str]:
    for node in body:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Branch):
            yield from _write_branch(node, values)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", node[0], re.DOTALL):
            values[assigned[1]] = _value(assigned[2], values)
        else:
            yield str(_value(node[0], values))


def _write_branch(branch: _Branch, values: dict[str, Any]) -> Iterator[str]:
    if branch.kind == "range":
        ((source, body),) = branch.arms
        outside = {name: values.pop(name) for name in (".System", ".Messages")}
        for turn in outside[str(source)]:
            # The message is the dot inside; variables are those of outside, and stay changed
            values |= {".Role": turn["role"], ".Content": turn["content"]}
            yield from _write(body, values)
        values |= outside
        return
    for condition, body in branch.arms:
        if condition is None or _value(condition, values):
            yield from _write(body, values)
            return


def _value(expression: str, values: Mapping[str, Any]) -> Any:
    match _WORD.findall(expression):
        case ["not", one]:
            return not _value(one, values)
        case ["eq", one, other]:
            return _value(one, values) == _value(other, values)
        case [text] if text.startswith('"'):
            return text[1:-1]
        case [name] if name in values:
            return values[name]
    raise ValueError(f"{{{{ {expression} }}}} is not known here")

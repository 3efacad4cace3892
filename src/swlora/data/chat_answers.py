"""The trained answers of a chat as text: each behind the prompt that it would be generated for.

    prompt = the template's text of the turns before the answer, with its generation prompt
    answer = its text of the turns up to the answer, minus the prompt: what it puts behind the
             answer (the token that ends a turn, a line break) is trained with it, and nothing else

Where the text of the longer chat begins with that of an earlier answer, one text carries both.
Elsewhere (a template drops the reasoning of earlier answers, or writes the system's words into the
last turn) each stands in a text of its own. Where a template writes the turns before an answer in
another way once the answer follows, the two do not fit together by themselves; then the answer's
own text is found without them, or the chat is refused: it is never trained behind a prompt that
lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swlora.data.chat import ChatTemplate, Rendered, Turns
from swlora.data.examples import Message
from swlora.errors import UserError

Span = tuple[int, int]  # begin and end in a text, in characters

# Some generation prompts open such a block, and the answer goes on inside of it.
REASONING_BLOCKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in a text: the prompt's end, the trained spans behind it, and their weight."""

    prompt_end: int
    spans: tuple[Span, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class ChatText:
    """A text of a chat and the answers that are trained in it, in their order."""

    text: str
    answers: tuple[Answer, ...]


def trained_texts(
    template: ChatTemplate, turns: Turns, tools: str, weights: Sequence[float]
) -> list[ChatText]:
    """Return the texts in which the answers of a chat are trained, as few as can be.

    `weights` are those of all turns; what is not 0 is an answer to be trained. Raises UserError
    where the template refuses the turns, or does not write an answer so that it can follow the
    prompt that it would be generated for.
    """
    numbers = [i for i, weight in enumerate(weights) if weight]
    template.check_fields(turns[: numbers[-1] + 1], tools)
    prompts = template.render([turns[:i] for i in numbers], tools, generation_prompt=True)
    wholes = template.render([turns[: i + 1] for i in numbers], tools, generation_prompt=False)
    waiting = [
        _answered(template, turns, tools, i, prompt.text, whole, weights[i])
        for i, prompt, whole in zip(numbers, prompts, wholes, strict=True)
    ]
    texts: list[ChatText] = []
    while waiting:
        longest = waiting[-1]
        carried = [chat for chat in waiting if longest.text.startswith(chat.text)]
        waiting = [chat for chat in waiting if not longest.text.startswith(chat.text)]
        answers = tuple(answer for chat in carried for answer in chat.answers)
        texts.insert(0, ChatText(longest.text, answers))
    return texts


def _answered(
    template: ChatTemplate,
    turns: Turns,
    tools: str,
    number: int,
    prompt: str,
    whole: Rendered,
    weight: float,
) -> ChatText:
    """Return the text of the answer `number`, behind its prompt."""
    answer = _answer(template, turns[: number + 1], tools, prompt, whole.text)
    text = prompt + answer
    spans: tuple[Span, ...] = ((len(prompt), len(text)),)
    if template.has_marks and text == whole.text:
        spans = tuple((b, e) for b, e in whole.marks if e > max(b, len(prompt)))
    if not answer or not spans:
        why = "marks nothing of" if answer else "writes nothing for"
        raise UserError(f"the chat template {why} the assistant's turn {number + 1}")
    if number < len(turns) - 1:
        text = text.removesuffix(template.end.only_last)
        spans = tuple((begin, min(end, len(text))) for begin, end in spans)
    return ChatText(text, (Answer(len(prompt), spans, weight),))


def _answer(template: ChatTemplate, turns: Turns, tools: str, prompt: str, whole: str) -> str:
    content = turns[-1].content
    written = whole.removeprefix(prompt) if whole.startswith(prompt) else None
    opened = _opened_block(prompt)
    if opened:
        tag, inside = opened.strip(), _inside(opened, content)
        if inside is not None and (written is None or tag in written):
            return inside + template.end.text  # the template drops the block, or opens it again
        if written is None or REASONING_BLOCKS[tag] not in written:
            raise UserError(
                f"the chat template opens {tag} before an answer, and this answer does not "
                f"close it: begin it with a block of {tag}, or use a tokenizer whose template "
                "opens none"
            )
    if written is None:
        written = _written_elsewhere(template, turns, tools, prompt, whole)
    if _letters(content) not in _letters((opened or "") + written):
        raise UserError(
            "the chat template leaves out or changes a part of the answer, so the answer "
            "cannot be trained as it stands"
        )
    return written


def _written_elsewhere(
    template: ChatTemplate, turns: Turns, tools: str, prompt: str, whole: str
) -> str:
    """Return the text of an answer whose template writes the turns before it in two ways.

    It is the same behind an empty block of reasoning, which only the prompt has, and behind the
    last turn alone (a system turn may stand in the last turn of the user while that is last).
    """
    *_, asked, answer = turns if len(turns) > 1 else (Message("", ""), *turns)
    plain = _without_empty_block(prompt)
    if plain != prompt and whole.startswith(plain) and not _holds_block(whole[len(plain) :]):
        return whole.removeprefix(plain)
    if asked.role == "user" and asked.content.strip():
        alone = template.prompt([asked], tools)
        (both,) = template.render([[asked, answer]], tools, generation_prompt=False)
        end = _behind(asked.content, alone)
        is_same = end is not None and end == _behind(asked.content, prompt)
        if is_same and both.text.startswith(alone):
            return both.text.removeprefix(alone)
    raise UserError(
        "the chat template writes the turns before the answer in one way for generation "
        f"(ending in {prompt[-40:]!r}) and in another when the answer follows, so the answer "
        "cannot be trained where it would be generated"
    )


def _opened_block(prompt: str) -> str | None:
    """Return the end of a prompt that opens a block of reasoning, from the opening tag on."""
    for tag in REASONING_BLOCKS:
        before, found, space = prompt.rpartition(tag)
        if found and not space.strip():
            return prompt[len(before) :]
    return None


def _inside(opened: str, answer: str) -> str | None:
    """Return the answer as it goes on after `opened`, None where it does not close the block."""
    tag = opened.strip()
    text = answer.lstrip()
    if text.startswith(opened):
        text = text.removeprefix(opened)
    elif text.startswith(tag):
        text = text.removeprefix(tag).lstrip()
    return text if REASONING_BLOCKS[tag] in text else None


def _without_empty_block(prompt: str) -> str:
    """Return a prompt without the empty block of reasoning in which it ends, if it does."""
    for tag, end in REASONING_BLOCKS.items():
        before, found, block = prompt.rpartition(tag)
        if found and block.strip() == end:
            return before
    return prompt


def _holds_block(text: str) -> bool:
    return any(tag in text for tag in REASONING_BLOCKS)


def _behind(content: str, text: str) -> str | None:
    """Return what stands behind the last place of a turn's content, None without such a place."""
    _, found, rest = text.rpartition(content.strip())
    return rest if found else None


def _letters(text: str) -> str:
    return "".join(text.split())

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
from swlora.data.chat_trace import Traced
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
    used = turns[: numbers[-1] + 1]
    template.check_fields(used, tools)
    if once := _written_once(template, turns, tools, numbers, weights):
        return [once]
    prompts = template.render([turns[:i] for i in numbers], tools, generation_prompt=True)
    wholes = template.render([turns[: i + 1] for i in numbers], tools, generation_prompt=False)
    answers = [
        _answered(template, turns, tools, i, prompt.text, whole, weights[i])
        for i, prompt, whole in zip(numbers, prompts, wholes, strict=True)
    ]
    return _merged(answers)


def _merged(waiting: list[ChatText]) -> list[ChatText]:
    """Put the answers of a chat into as few texts as can be."""
    texts: list[ChatText] = []
    while waiting:
        longest = waiting[-1]
        carried = [chat for chat in waiting if longest.text.startswith(chat.text)]
        waiting = [chat for chat in waiting if not longest.text.startswith(chat.text)]
        answers = tuple(answer for chat in carried for answer in chat.answers)
        texts.insert(0, ChatText(longest.text, answers))
    return texts


def _written_once(
    template: ChatTemplate,
    turns: Turns,
    tools: str,
    numbers: Sequence[int],
    weights: Sequence[float],
) -> ChatText | None:
    """Return the text of a chat and its answers from one traced rendering of the whole.

    The prompt of each answer must be what was written until then and a generation prompt, the same
    for all, with which the answers begin as well. None where that is not so, or something is wrong:
    then each answer is rendered by itself.
    """
    if (traced := template.trace(turns[: numbers[-1] + 1], tools)) is None:
        return None
    text = _ended(template, traced.text, is_last=numbers[-1] == len(turns) - 1)
    if (added := _generation_prompt(template, turns, tools, numbers, traced)) is None:
        return None
    try:
        ending = template.end.text.removesuffix(template.end.only_last) if len(numbers) > 1 else ""
    except UserError:  # it does not write a chat as short as that
        return None
    answers = []
    for i in numbers:
        begin, end = traced.begins[i] + len(added), min(traced.begins[i + 1], len(text))
        if i != numbers[-1] and not text[begin:end].endswith(ending):
            return None  # the next turn may be looked at before this one has its end
        spans: tuple[Span, ...] = ((begin, end),)
        if template.has_marks:
            spans = tuple((b, min(e, end)) for b, e in traced.marks if max(b, begin) < e <= end)
        is_written = begin < end and text.startswith(added, begin - len(added))
        if not is_written or not spans or not _holds(text[begin:end], turns[i].content):
            return None
        answers.append(Answer(begin, spans, weights[i]))
    template.has_traced_well()
    return None if _holds_block(added) else ChatText(text, tuple(answers))


def _generation_prompt(
    template: ChatTemplate, turns: Turns, tools: str, numbers: Sequence[int], traced: Traced
) -> str | None:
    """Return what the template writes before all answers, behind what it wrote of the turns before.

    None where there is no such text. The prompts are rendered until the syntax of the template says
    that all others are like the first; before the first turn that is never said.
    """
    added = template.known_generation_prompt(tools) if numbers[0] > 0 else None
    if added is not None:
        return added
    # The first and the last differ where a template looks at all turns
    for i in dict.fromkeys((numbers[0], numbers[-1], *numbers)):
        begin, prompt = traced.begins[i], template.prompt(turns[:i], tools)
        added = prompt[begin:] if added is None else added
        if prompt != traced.text[:begin] + added:
            return None
        if numbers[0] > 0 and template.learn_generation_prompt(added, tools):
            break
    return added


def _ended(template: ChatTemplate, text: str, *, is_last: bool) -> str:
    """Return the text of a chat as it ends where it is the last turn, or another follows."""
    return text if is_last else text.removesuffix(template.end.only_last)


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
    text = _ended(template, text, is_last=number == len(turns) - 1)
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
    if not _holds((opened or "") + written, content):
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


def _holds(text: str, content: str) -> bool:
    """Say whether a text holds a content, whatever the spaces in both."""
    return content in text or "".join(content.split()) in "".join(text.split())

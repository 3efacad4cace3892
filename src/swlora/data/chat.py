"""Chats to text by the tokenizer's own template: what is shown to the model, and what it answers.

    prompt = the template's text of the turns before the answer, with its generation prompt
    answer = its text of all turns minus the prompt, up to and with the token that ends the turn

The prompt is what generation shows. Where a template writes the turns before the answer in another
way once the answer follows, the two do not fit together by themselves; then the answer's own text
is found without them, or the chat is refused: it is never trained behind a prompt that lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from swlora.data.examples import ASSISTANT, Message
from swlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Message]

# Some generation prompts open such a block, and the answer goes on inside of it.
REASONING_BLOCKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
_PROBE = "Xyzzy"  # an answer that is easily found in what a template writes


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes behind an answer.

    `trained` is the part of it up to and with `token_id`, the token that ends the turn; where no
    single token does, that is None and `trained` is empty.
    """

    text: str
    trained: str
    token_id: int | None


class ChatTemplate:
    """The chat template of a tokenizer; UserError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the rows are chats and the tokenizer has no chat template: use a model made for "
                "chat, or rows of prompt and completion"
            )
        self._tokenizer = tokenizer

    def prompt(self, turns: Turns) -> str:
        """Write turns and the beginning of an answer; UserError where the template refuses."""
        return self._render(turns, add_generation_prompt=True)

    def answer(self, turns: Turns, answer: str, prompt: str) -> str:
        """Write the answer that follows `prompt`, which is what `prompt(turns)` gave.

        Its end is that of the turn (see `end`). Raises UserError where the template does not write
        the answer so that it can follow its own prompt.
        """
        whole = self._render((*turns, Message(ASSISTANT, answer)))
        written = whole.removeprefix(prompt) if whole.startswith(prompt) else None
        opened = _opened_block(prompt)
        if opened:
            tag, inside = opened.strip(), _inside(opened, answer)
            if inside is not None and (written is None or tag in written):
                return inside + self.end.trained  # the template drops the block, or opens it again
            if written is None or REASONING_BLOCKS[tag] not in written:
                raise UserError(
                    f"the chat template opens {tag} before an answer, and this answer does not "
                    f"close it: begin it with a block of {tag}, or use a tokenizer whose template "
                    "opens none"
                )
        if written is None:
            written = self._written_elsewhere(turns, answer, prompt, whole)
        if _letters(answer) not in _letters((opened or "") + written):
            raise UserError(
                "the chat template leaves out or changes a part of the answer, so the answer "
                "cannot be trained as it stands"
            )
        if not written.endswith(self.end.text):
            raise UserError(f"the chat template does not end this answer in {self.end.text!r}")
        return written.removesuffix(self.end.text) + self.end.trained

    @cached_property
    def end(self) -> TurnEnd:
        """How the template ends an answer, found by writing one; UserError where it refuses."""
        written = self._render((Message("user", "Hi"), Message(ASSISTANT, _PROBE)))
        _, probe, text = written.rpartition(_PROBE)
        if not probe:
            raise UserError("the chat template does not write the assistant's answers")
        added = self._tokenizer.added_tokens_decoder.items()
        for special in (True, False):
            # The first of them, and the longest that begins there
            found = sorted(
                (text.find(token.content), -len(token.content), token_id)
                for token_id, token in added
                if token.special == special and token.content.strip() and token.content in text
            )
            for at, minus_length, token_id in found[:1]:
                trained = text[: at - minus_length]
                ids = self._tokenizer(_PROBE + trained, add_special_tokens=False)["input_ids"]
                if ids[-1] == token_id:
                    return TurnEnd(text, trained, token_id)
        return TurnEnd(text, "", None)

    def _written_elsewhere(self, turns: Turns, answer: str, prompt: str, whole: str) -> str:
        """Return the text of an answer whose template writes the turns before it in two ways.

        It is the same behind an empty block of reasoning, which only the prompt has, and behind the
        last turn alone (a system turn may stand in the last turn of the user while that is last).
        """
        plain = _without_empty_block(prompt)
        if plain != prompt and whole.startswith(plain) and not _holds_block(answer):
            return whole.removeprefix(plain)
        content = turns[-1].content
        if turns[-1].role == "user" and content.strip():
            alone = self.prompt(turns[-1:])
            whole = self._render((*turns[-1:], Message(ASSISTANT, answer)))
            end = _behind(content, alone)
            if end is not None and end == _behind(content, prompt) and whole.startswith(alone):
                return whole.removeprefix(alone)
        raise UserError(
            "the chat template writes the turns before the answer in one way for generation "
            f"(ending in {prompt[-40:]!r}) and in another when the answer follows, so the answer "
            "cannot be trained where it would be generated"
        )

    def _render(self, turns: Turns, *, add_generation_prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may fail in any way
            roles = ", ".join(turn.role for turn in turns)
            raise UserError(f"the chat template refuses the turns {roles}: {error}") from error
        return str(text)


def end_of_turn_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token with which the tokenizer's template ends an answer, None for no such.

    It is what training teaches to stop with, so generation for chats must stop at it, named in the
    model's generation_config.json or not.
    """
    try:
        return ChatTemplate(tokenizer).end.token_id
    except UserError:
        return None


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


def _holds_block(answer: str) -> bool:
    return any(tag in answer for tag in REASONING_BLOCKS)


def _behind(content: str, text: str) -> str | None:
    """Return what stands behind the last place of a turn's content, None without such a place."""
    _, found, rest = text.rpartition(content.strip())
    return rest if found else None


def _letters(text: str) -> str:
    return "".join(text.split())

"""Chats to token ids and the weight of each: what is trained, and behind what.

A sequence is a text that the template wrote, tokenised as a whole, as transformers does; none of
its tokens is added. Its trained answers must begin and end between two tokens, with the tokens
before them that generation would see. Where they do not (a token reaches over the beginning of an
answer) each answer has a sequence of its own: the tokens of its prompt, and those that follow.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from swlora.data.chat import ChatTemplate
from swlora.data.chat_answers import Answer, ChatText, trained_texts
from swlora.data.examples import ASSISTANT, Example
from swlora.data.tokenise import Following, following_ids, token_ids
from swlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all-turns", "last-turn"]
Weighted = tuple[list[int], list[tuple[int, float]]]  # token ids; how many have which weight
_CHARACTERS = 1 << 20  # tokenised at once: what a tokenizer knows of a token takes 100 bytes


def encode_chats(
    chats: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    train_on: TrainOn,
    start_token: int | None,
) -> list[list[Weighted] | str]:
    """Return the sequences of each chat, or the reason why it cannot be trained.

    `start_token` stands in front where a template writes nothing before an answer. Raises
    UserError for a tokenizer without a chat template.
    """
    template = ChatTemplate(tokenizer)
    planned = [_plan(template, chat, train_on) for chat in chats]
    texts = [text for plan in planned if not isinstance(plan, str) for text in plan]
    sequences = _Encoder(tokenizer, start_token).encode(texts)
    return [
        plan if isinstance(plan, str) else [s for _ in plan for s in next(sequences)]
        for plan in planned
    ]


def turn_weights(chat: Example, train_on: TrainOn) -> list[float]:
    """Return how much each turn of a chat is trained: its own weight, or that of `train_on`."""
    answers = [i for i, turn in enumerate(chat.messages) if turn.role == ASSISTANT]
    default = set(answers if train_on == "all-turns" else answers[-1:])
    return [
        float(i in default) if turn.trained is None else turn.trained
        for i, turn in enumerate(chat.messages)
    ]


def _plan(template: ChatTemplate, chat: Example, train_on: TrainOn) -> list[ChatText] | str:
    weights = turn_weights(chat, train_on)
    if not any(weights):
        return "none of its answers is trained"
    try:
        return trained_texts(template, chat.messages, chat.tools, weights)
    except UserError as error:
        return str(error)


class _Encoder:
    """Tokenises the texts of chats with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", start_token: int | None) -> None:
        self._tokenizer, self._start_token = tokenizer, start_token
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[ChatText]) -> Iterator[list[Weighted]]:
        """Yield the sequences of each text: one, or where that is not exact one of each answer."""
        for part in _parts(texts):
            batch = self._tokenizer(
                [chat.text for chat in part],
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,
            )
            encodings = batch.encodings or [None] * len(part)  # tokenizers in Python have none
            for chat, encoding in zip(part, encodings, strict=True):
                whole = None if encoding is None else self._whole(chat, encoding)
                yield [whole] if whole else [self._apart(chat, a) for a in chat.answers]

    def _whole(self, chat: ChatText, encoding: Any) -> Weighted | None:
        """Return the text as one sequence; None where an answer does not begin between tokens."""
        ids, runs, n_used = encoding.ids, [], 0
        for answer in chat.answers:
            if self._place(chat.text, answer.prompt_end, encoding, ids) is None:
                return None
            for span in answer.spans:
                for at, weight in zip(span, (0.0, answer.weight), strict=True):
                    place = self._place(chat.text, at, encoding, ids)
                    if place is None:
                        return None
                    runs.append((place - n_used, weight))
                    n_used = place
        return self._started(ids[:n_used], runs)

    def _place(self, text: str, at: int, encoding: Any, ids: list[int]) -> int | None:
        """Return the number of tokens of text[:at], None where they do not begin those of text.

        An added token splits a text, so that only the tokens behind the last one can differ.
        """
        place = len(ids) if at == len(text) else encoding.char_to_token(at)
        if place is None or (place < len(ids) and encoding.token_to_chars(place)[0] != at):
            return None
        begin = place - 1
        while begin > 0 and ids[begin] not in self._added:
            begin -= 1
        tail = text[encoding.token_to_chars(begin)[0] if begin > 0 else 0 : at]
        if self._ids(tail) != ids[max(begin, 0) : place]:
            return None
        return place

    def _ids(self, tail: str) -> list[int]:
        if tail not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[tail] = token_ids([tail], self._tokenizer, special=False)[0] if tail else []
        return self._known[tail]

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    def _apart(self, chat: ChatText, answer: Answer) -> Weighted:
        """Return one answer behind its prompt, whose tokens are those that generation would see."""
        at = min(answer.prompt_end, answer.spans[0][0])
        ids = self._ids(chat.text[:at])
        runs = [(len(ids), 0.0)]
        for span in answer.spans:
            for end, weight in zip(span, (0.0, answer.weight), strict=True):
                piece = Following(chat.text[:at], ids, chat.text[at:end])
                more = following_ids([piece], self._tokenizer, special=False)[0] if end > at else []
                runs.append((len(more), weight))
                ids, at = [*ids, *more], end
        return self._started(ids, runs)

    def _started(self, ids: list[int], runs: list[tuple[int, float]]) -> Weighted:
        """Put a start token in front of a sequence whose first token is trained."""
        used = [run for run in runs if run[0]]
        if used[0][1] == 0:
            return ids, used
        if self._start_token is None:
            raise UserError(
                "the chat template writes nothing before an answer, and the tokenizer has no token "
                "that could stand there"
            )
        return [self._start_token, *ids], [(1, 0.0), *used]


def _parts(texts: Sequence[ChatText]) -> Iterator[list[ChatText]]:
    """Yield some texts at a time."""
    part: list[ChatText] = []
    n_characters = 0
    for chat in texts:
        part.append(chat)
        n_characters += len(chat.text)
        if n_characters > _CHARACTERS:
            yield part
            part, n_characters = [], 0
    if part:
        yield part

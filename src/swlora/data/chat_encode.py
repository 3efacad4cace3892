"""Chats to token ids and the weight of each: what is trained, and behind what.

A sequence is a text that the template wrote, tokenised as a whole, as transformers does; none of
its tokens is added. Its trained answers must begin and end between two tokens, with the tokens
before them that generation would see. Where they do not (a token reaches over the beginning of an
answer) each answer has a sequence of its own: the tokens of its prompt, and those that follow.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Literal

from swlora.data.ahead import worked_ahead
from swlora.data.chat import ChatTemplate
from swlora.data.chat_answers import Answer, ChatText, trained_texts
from swlora.data.examples import ASSISTANT, Example
from swlora.data.text_tokens import PieceTokenizer, TextTokens
from swlora.data.tokenise import (
    Following,
    following_ids,
    some_at_a_time,
    text_bytes,
    token_ids,
)
from swlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all-turns", "last-turn"]
Weighted = tuple[list[int], list[tuple[int, float]]]  # token ids; how many have which weight
Part = list[list[ChatText] | str]  # of some chats the texts, or why there are none
_SHORT = 100  # characters, as most generation prompts and ends of turns have


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
    encoder = _Encoder(template, tokenizer, start_token)
    found: list[list[Weighted] | str] = []
    plans = (_plan(template, chat, train_on) for chat in chats)
    parts = some_at_a_time(plans, _n_bytes)
    for part, tokens in encoder.tokenised(parts):
        sequences = encoder.encode(_usable(part), tokens)
        found += [plan if isinstance(plan, str) else next(sequences) for plan in part]
    return found


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


def _usable(part: Part) -> list[list[ChatText]]:
    return [plan for plan in part if not isinstance(plan, str)]


def _n_bytes(plan: list[ChatText] | str) -> int:
    return 0 if isinstance(plan, str) else sum(text_bytes(chat.text) for chat in plan)


class _Encoder:
    """Tokenises the texts of chats with one tokenizer."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: "PreTrainedTokenizerBase",
        start_token: int | None,
    ) -> None:
        self._template, self._tokenizer, self._start_token = template, tokenizer, start_token
        self._known: dict[str, list[int]] = {}

    def tokenised(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[TextTokens] | None]]:
        """Yield each part and the tokens of all its texts; None for a tokenizer written in Python.

        A fast tokenizer needs no lock of Python: while it works on the next part, the caller
        places the answers of this one and writes the texts of the one after.
        """
        if not self._tokenizer.is_fast:
            yield from ((part, None) for part in parts)
            return
        self._ids("a")  # from here on the tokenizer has no settings left to change
        pieces = PieceTokenizer(self._tokenizer, self._uncut())

        def work(part: Part) -> list[TextTokens]:
            return pieces.tokenised([chat.text for plan in _usable(part) for chat in plan])

        yield from worked_ahead(parts, work)

    def _uncut(self) -> frozenset[int]:
        """Return the tokens that end turns: texts are cut in front of what begins the next."""
        try:
            return frozenset() if self._template.has_marks else self._template.end.token_ids
        except UserError:  # it does not write a chat as short as that
            return frozenset()

    def encode(
        self, plans: Iterable[list[ChatText]], tokens: Iterable[TextTokens] | None
    ) -> Iterator[list[Weighted]]:
        """Yield the sequences of each chat: one of each text, or of each answer of it."""
        of_texts = repeat(None) if tokens is None else iter(tokens)
        for plan in plans:
            found = [self._sequences(chat, next(of_texts)) for chat in plan]
            yield [sequence for own in found for sequence in own]

    def _sequences(self, chat: ChatText, tokens: TextTokens | None) -> list[Weighted]:
        whole = tokens and self._whole(chat, tokens)
        return [whole] if whole else [self._apart(chat, answer) for answer in chat.answers]

    def _whole(self, chat: ChatText, tokens: TextTokens) -> Weighted | None:
        """Return the text as one sequence; None where an answer does not begin between tokens."""
        runs, n_used = [], 0
        for answer in chat.answers:
            if tokens.place(answer.prompt_end, self._ids) is None:
                return None
            for span in answer.spans:
                for at, weight in zip(span, (0.0, answer.weight), strict=True):
                    place = tokens.place(at, self._ids)
                    if place is None:
                        return None
                    runs.append((place - n_used, weight))
                    n_used = place
        return self._started(tokens.ids[:n_used], runs)

    def _ids(self, text: str) -> list[int]:
        """Return the tokens of a text by itself; what short ones have is kept, since few differ."""
        if (known := self._known.get(text)) is not None:
            return known
        ids = token_ids([text], self._tokenizer, special=False)[0] if text else []
        if len(text) < _SHORT and len(self._known) < 4096:
            self._known[text] = ids
        return ids

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

"""Examples to token ids: what the model is shown, and what it is taught to say.

    sequence = tokens(prompt + separator) ++ tokens(completion) ++ [EOS]

The prompt carries the special tokens that the tokenizer puts in front (BOS), never those it puts
behind. It is tokenised by itself, so that training and generation see the same prompt, and once for
all its examples among the next few thousand; the completion's tokens are those that follow it in
one text (see `tokenise`). A chat is written by the tokenizer's own template, which holds its
special tokens already, and may become several sequences (see `chat_encode`); so may a document,
of which every token is trained (see `documents`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from swlora.data.chat import ChatTemplate, Turns
from swlora.data.chat_encode import TrainOn, Weighted, encode_chats
from swlora.data.documents import encode_documents
from swlora.data.examples import Example, PromptKey
from swlora.data.problems import count_problem
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.data.tokenise import Following, following_ids, token_ids
from swlora.data.truncate import cut, is_long, without_oldest_turns
from swlora.errors import DataError, UserError
from swlora.plural import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Encoded at once: as Python's numbers, tokens take ten times the memory
CHUNK_EXAMPLES, CHUNK_BYTES = 8192, 8 << 20


@dataclass(frozen=True)
class Encoded:
    """A split as token ids: sequence i came from example `example_ids[i]`, (n,), ascending.

    `n_cut` examples were cut to the context; the longest of their sequences had
    `longest_cut_tokens` before, 0 for none. `bad` counts the examples left out, by the reason.
    """

    sequences: TokenSequences
    example_ids: Ints
    n_cut: int
    bad: dict[str, int]
    longest_cut_tokens: int = 0


def encode_examples(
    examples: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_tokens: int,
    truncate: bool,
    train_on: TrainOn = "all-turns",
    skip_bad_rows: bool = False,
) -> Encoded:
    """Encode a split into sequences of at most `context_tokens` tokens.

    A longer one raises DataError, or with `truncate` is shortened (see `truncate`); a document is
    cut into several. An example that cannot be encoded raises DataError, or with `skip_bad_rows`
    is left out.
    """
    if context_tokens < 2:
        raise UserError(
            f"a context of {counted(context_tokens, 'token')} holds no prompt and completion"
        )
    if not examples:
        raise UserError("there are no rows to encode")
    first_long, bad = "", Counter[str]()
    example_ids: list[int] = []
    long: list[int] = []  # tokens of the examples that do not fit

    def encode(chunk: Sequence[Example]) -> list[list[Weighted] | str]:
        return _encode(chunk, separator, tokenizer, train_on, context_tokens)

    def encoded() -> Iterator[TokenSequences]:
        nonlocal first_long
        for start, chunk in _chunks(examples):
            weighted: list[Weighted] = []
            for i, found in enumerate(encode(chunk)):
                if not isinstance(found, str) and is_long(found, context_tokens):
                    long.append(max(len(ids) for ids, _ in found))
                    if not first_long:
                        first_long = f"{chunk[i].place_or_row(start + i)} {_describe(found)}"
                    if truncate:  # else the load ends in an error, with a count
                        found = _shortened(chunk[i], found, encode, context_tokens)
                if isinstance(found, str):
                    if not skip_bad_rows:
                        place = chunk[i].place_or_row(start + i)
                        raise DataError(f"{place}: {found}; --skip-bad-rows leaves it out")
                    count_problem(bad, found)
                    continue
                weighted += found
                example_ids.extend([start + i] * len(found))
            if not weighted:
                continue
            yield TokenSequences.from_runs(weighted)
        if not example_ids:
            raise DataError(f"no row can be encoded: {next(iter(bad))}")

    sequences = TokenSequences.joined(encoded())
    if long and not truncate:
        more = f" (and {len(long) - 1} more such rows)" if len(long) > 1 else ""
        raise DataError(
            f"{first_long}, but the model's context is {context_tokens}{more}; --truncate cuts them"
        )
    ids = np.array(example_ids, dtype=np.int64)
    return Encoded(sequences, ids, len(long), dict(bad), max(long, default=0))


def _chunks(examples: Sequence[Example]) -> Iterator[tuple[int, list[Example]]]:
    """Yield some examples at a time, and the number of the first of them."""
    chunk: list[Example] = []
    n_bytes = 0
    for end, example in enumerate(examples, start=1):
        chunk.append(example)
        n_bytes += example.n_bytes
        if len(chunk) == CHUNK_EXAMPLES or n_bytes > CHUNK_BYTES or end == len(examples):
            yield end - len(chunk), chunk
            chunk, n_bytes = [], 0


def _describe(sequences: Sequence[Weighted]) -> str:
    ids, runs = max(sequences, key=lambda sequence: len(sequence[0]))
    n_prompt = sum(n for n, _ in takewhile(lambda run: run[1] == 0, runs))
    tokens = counted(len(ids), "token")
    return f"has {tokens}, {n_prompt} of prompt and {len(ids) - n_prompt} of completion"


def _shortened(
    example: Example,
    found: list[Weighted],
    encode: Callable[[Sequence[Example]], list[list[Weighted] | str]],
    context_tokens: int,
) -> list[Weighted]:
    if example.messages:
        return without_oldest_turns(example, found, lambda chat: encode([chat])[0], context_tokens)
    return [cut(sequence, context_tokens) for sequence in found]


def encode_prompts(
    prompts: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    most_tokens: int | None = None,
) -> list[list[int]]:
    """Encode the prompt of each example, in order; the completions are not looked at.

    One of more than `most_tokens` >= 2 is shortened as rows of a training are (see `truncate`).
    Raises UserError for no examples, or for a chat that the tokenizer's template cannot write.
    """
    ids = _prompt_ids(_prompt_texts(prompts, separator, tokenizer), tokenizer)
    found = [ids[e.prompt_key] or [_start_token(tokenizer)] for e in prompts]
    if most_tokens is None:
        return found

    def encode(chats: Sequence[Example]) -> list[list[Weighted] | str]:
        try:
            return [[_as_sequence(ids)] for ids in encode_prompts(chats, separator, tokenizer)]
        except UserError as error:
            return [str(error)]

    for i, example in enumerate(prompts):
        if len(found[i]) > most_tokens:
            # Turns behind the answer that is asked for would be the newest, which are kept.
            asked = replace(example, messages=example.messages[: len(example.prompt_messages) + 1])
            (kept,) = _shortened(asked, [_as_sequence(found[i])], encode, most_tokens)
            found[i] = kept[0]
    return found


def _as_sequence(prompt: list[int]) -> Weighted:
    return prompt, [(len(prompt), 0.0)]


def encode_turns(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Encode the turns of a chat and the beginning of the answer that is to follow the last one.

    Raises UserError where the tokenizer's template cannot write them.
    """
    text = ChatTemplate(tokenizer).prompt(turns)
    return token_ids([text], tokenizer, special=False)[0] or [_start_token(tokenizer)]


def _encode(
    examples: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    train_on: TrainOn,
    context_tokens: int,
) -> list[list[Weighted] | str]:
    """Return the sequences of each example, or why there are none."""
    found: list[list[Weighted] | str] = [""] * len(examples)
    texts = [i for i, e in enumerate(examples) if e.text]
    if texts:
        documents = encode_documents(
            [examples[i].text for i in texts],
            tokenizer,
            start_token=_start_token(tokenizer),
            end_token=_eos_token(tokenizer),
            context_tokens=context_tokens,
        )
        for i, pieces in zip(texts, documents, strict=True):
            found[i] = pieces
    pairs = [i for i, e in enumerate(examples) if not e.messages and not e.text]
    if pairs:
        encoded = _encode_pairs([examples[i] for i in pairs], separator, tokenizer)
        for i, (prompt, completion) in zip(pairs, encoded, strict=True):
            runs = [(len(prompt), 0.0), (len(completion), 1.0)]
            found[i] = [([*prompt, *completion], runs)]
    chats = [i for i, e in enumerate(examples) if e.messages]
    if chats:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        sequences = encode_chats([examples[i] for i in chats], tokenizer, train_on, start)
        for i, own in zip(chats, sequences, strict=True):
            found[i] = own
    return found


def _encode_pairs(
    pairs: Sequence[Example], separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, completion ids) of each prompt and completion."""
    texts = _prompt_texts(pairs, separator, tokenizer)
    prompts = _prompt_ids(texts, tokenizer)
    start, eos = _start_token(tokenizer), _eos_token(tokenizer)
    following = [Following(texts[e.prompt_key], prompts[e.prompt_key], e.completion) for e in pairs]
    completions = following_ids(following, tokenizer, special=True)
    return [
        (text.prompt_ids or [start], [*ids, eos])
        for text, ids in zip(following, completions, strict=True)
    ]


def _prompt_texts(
    examples: Sequence[Example], separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[PromptKey, str]:
    """Write the prompt of each distinct prompt_key; UserError for no examples."""
    if not examples:
        raise UserError("there are no rows to encode")
    chats = ChatTemplate(tokenizer) if any(e.messages for e in examples) else None
    texts: dict[PromptKey, str] = {}
    for e in examples:
        if (key := e.prompt_key) in texts:
            continue
        try:
            if chats and e.messages:
                texts[key] = chats.prompt(e.prompt_messages, e.tools)
            else:
                texts[key] = e.prompt + separator
        except UserError as error:
            raise type(error)(f"{e.place}: {error}" if e.place else str(error)) from error
    return texts


def _prompt_ids(
    texts: dict[PromptKey, str], tokenizer: "PreTrainedTokenizerBase"
) -> dict[PromptKey, list[int]]:
    """Tokenise the prompt of each prompt_key; one without text and special tokens has none."""
    ids: dict[PromptKey, list[int]] = {}
    for is_chat in (False, True):
        keys = [key for key in texts if isinstance(key, tuple) == is_chat]
        found = token_ids([texts[key] for key in keys], tokenizer, special=not is_chat)
        ids |= zip(keys, found, strict=True)
    return ids


def _eos_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no completion could end: name one as "
            "eos_token in its tokenizer_config.json, in a copy of the model's folder"
        )
    return int(tokenizer.eos_token_id)


def _start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    bos = tokenizer.bos_token_id
    return _eos_token(tokenizer) if bos is None else int(bos)

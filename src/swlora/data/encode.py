"""Examples to token ids: what the model is shown, and what it is taught to say.

    sequence = tokens(prompt + separator) ++ tokens(completion) ++ [EOS]

The prompt carries the special tokens that the tokenizer puts in front (BOS), never those it puts
behind. It is tokenised by itself, so that training and generation see the same prompt, and once for
all its examples among the next few thousand; the completion's tokens are those that follow it in
one text (see `tokenise`). A chat is written by the tokenizer's own template, which holds its
special tokens already, and ends in the token that ends a turn there, or else in EOS (see `chat`).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swlora.data.chat import ChatTemplate, Turns
from swlora.data.examples import Example
from swlora.data.token_sequences import TokenSequences
from swlora.data.tokenise import Following, following_ids, token_ids
from swlora.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_EXAMPLES = 8192  # encoded at once: as Python's numbers, tokens take ten times the memory

_Prompt = tuple[bool, str]  # of an example: whether it is a chat, and its prompt_key


def _key(example: Example) -> _Prompt:
    return bool(example.messages), example.prompt_key


def encode_examples(
    examples: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_tokens: int,
    truncate: bool,
) -> tuple[TokenSequences, int]:
    """Encode a split; (sequences of at most `context_tokens` tokens, number of examples cut).

    A longer one raises DataError, or with `truncate` loses the completion's tail (its EOS too);
    where the prompt alone fills the context, its head as well, so that one token is learned.
    """
    if context_tokens < 2:
        raise UserError(f"a context of {context_tokens} tokens holds no prompt and completion")
    n_long, first_long = 0, ""

    def encoded() -> Iterator[TokenSequences]:
        nonlocal n_long, first_long
        for start in range(0, len(examples) or 1, CHUNK_EXAMPLES):
            chunk = list(examples[start : start + CHUNK_EXAMPLES])
            pairs = _encode_pairs(chunk, separator, tokenizer, first_row=start + 1)
            part = TokenSequences.from_lists(pairs)
            long = np.flatnonzero(part.lengths > context_tokens)
            if len(long):
                n_long += len(long)
                first_long = first_long or _describe(part, int(long[0]), start)
                part = part.truncated(context_tokens)
            yield part

    sequences = TokenSequences.joined(encoded())
    if n_long and not truncate:
        more = f" (and {n_long - 1} more such rows)" if n_long > 1 else ""
        raise DataError(
            f"{first_long}, but the model's context is {context_tokens}{more}; --truncate cuts them"
        )
    return sequences, n_long


def _describe(sequences: TokenSequences, i: int, n_before: int) -> str:
    length, n_prompt = sequences.length(i), int(sequences.prompt_lengths[i])
    return (
        f"row {n_before + i + 1} has {length} tokens, {n_prompt} of prompt and "
        f"{length - n_prompt} of completion"
    )


def encode_prompts(
    prompts: Sequence[Example], separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Encode the prompt of each example, in order; the completions are not looked at.

    Raises UserError for no examples, or for a chat that the tokenizer's template cannot write.
    """
    ids = _prompt_ids(_prompt_texts(prompts, separator, tokenizer), tokenizer)
    return [ids[_key(e)] or [_start_token(tokenizer)] for e in prompts]


def encode_turns(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Encode the turns of a chat and the beginning of the answer that is to follow the last one.

    Raises UserError where the tokenizer's template cannot write them.
    """
    text = ChatTemplate(tokenizer).prompt(turns)
    return token_ids([text], tokenizer, special=False)[0] or [_start_token(tokenizer)]


def _encode_pairs(
    examples: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    first_row: int,
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, completion ids) of each example; the first is row `first_row`."""
    texts = _prompt_texts(examples, separator, tokenizer)
    prompts = _prompt_ids(texts, tokenizer)
    keys = [_key(e) for e in examples]
    answers = _completion_texts(examples, texts, tokenizer, first_row)
    start, eos = _start_token(tokenizer), _eos_token(tokenizer)
    pairs: list[tuple[list[int], list[int]]] = [([], [])] * len(examples)
    for is_chat in (False, True):
        numbers = [i for i, e in enumerate(examples) if bool(e.messages) == is_chat]
        following = [Following(texts[keys[i]], prompts[keys[i]], answers[i][0]) for i in numbers]
        completions = following_ids(following, tokenizer, special=not is_chat)
        for i, text, ids in zip(numbers, following, completions, strict=True):
            pairs[i] = text.prompt_ids or [start], ids if answers[i][1] else [*ids, eos]
    return pairs


def _completion_texts(
    examples: Sequence[Example],
    prompt_texts: dict[_Prompt, str],
    tokenizer: "PreTrainedTokenizerBase",
    first_row: int,
) -> list[tuple[str, bool]]:
    """Return the text of each completion, and whether it holds its end (else EOS follows)."""
    if not any(e.messages for e in examples):
        return [(e.completion, False) for e in examples]
    chats, texts = ChatTemplate(tokenizer), []
    for row, e in enumerate(examples, start=first_row):
        try:
            if not e.messages:
                texts.append((e.completion, False))
                continue
            answer = chats.answer(e.prompt_messages, e.completion, prompt_texts[_key(e)])
            texts.append((answer, chats.end.token_id is not None))
        except UserError as error:
            raise DataError(f"row {row}: {error}") from error
    return texts


def _prompt_texts(
    examples: Sequence[Example], separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[_Prompt, str]:
    """Write each distinct prompt once; UserError for no examples."""
    if not examples:
        raise UserError("there are no rows to encode")
    chats = ChatTemplate(tokenizer) if any(e.messages for e in examples) else None
    return {
        key: chats.prompt(e.prompt_messages) if chats and e.messages else e.prompt + separator
        for key, e in {_key(e): e for e in examples}.items()
    }


def _prompt_ids(
    texts: dict[_Prompt, str], tokenizer: "PreTrainedTokenizerBase"
) -> dict[_Prompt, list[int]]:
    """Tokenise each prompt; one without text and special tokens has none."""
    ids: dict[_Prompt, list[int]] = {}
    for is_chat in (False, True):
        keys = [key for key in texts if key[0] == is_chat]
        found = token_ids([texts[key] for key in keys], tokenizer, special=not is_chat)
        ids |= zip(keys, found, strict=True)
    return ids


def _eos_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no completion could end")
    return int(tokenizer.eos_token_id)


def _start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    bos = tokenizer.bos_token_id
    return _eos_token(tokenizer) if bos is None else int(bos)

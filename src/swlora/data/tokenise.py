"""Text to token ids: a prompt by itself, and a text as it follows a prompt.

Some tokenizers (Llama 2, Mistral's first) put the mark of a word, a space, before every text that
they are given. A completion tokenised by itself would have it too, between prompt and completion,
where the text has none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from swlora.errors import panic_named

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# What a text is put behind to see it without a mark, where its own prompt does not do.
_ANCHORS = ("\n", "a", ".", "1")
_FIRST_CHARACTERS = ("a", "T", "1", "(", "<", "é", "中")

BYTES_AT_ONCE = 1 << 20  # of text; what a tokenizer knows of a token takes 100 bytes
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Following:
    """A text and the prompt that it follows, whose token ids are known."""

    prompt: str
    prompt_ids: list[int]
    text: str


def token_ids(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool
) -> list[list[int]]:
    """Tokenise texts; `special` adds the tokens that belong in front, never those behind."""
    if not special:
        return _ids(texts, tokenizer, special=False)
    n_behind = _special_tokens_behind(tokenizer)
    return [ids[: len(ids) - n_behind] for ids in _ids(texts, tokenizer, special=True)]


def text_bytes(text: str) -> int:
    """Return the size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def some_at_a_time(items: Iterable[Item], n_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield items of about `BYTES_AT_ONCE` together, or a longer one."""
    part, n = list[Item](), 0
    for item in items:
        part.append(item)
        n += n_bytes(item)
        if n > BYTES_AT_ONCE:
            yield part
            part, n = [], 0
    if part:
        yield part


def ids_within(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Tokenise texts that stand within another: without a mark that is put before a whole one."""
    plain = _splits_at_line_breaks(tokenizer)
    return _ids_without_mark(texts, tokenizer, known_plain=plain)


def following_ids(
    texts: Sequence[Following], tokenizer: "PreTrainedTokenizerBase", *, special: bool
) -> list[list[int]]:
    """Return the token ids of each text as they follow those of its prompt.

    They are those that the tokenizer gives for prompt and text as one, where the prompt's tokens
    begin them; elsewhere (a token would reach over the boundary) those of the text without a mark
    that it does not have. `special` says how the prompts were tokenised.
    """
    if not texts:
        return []
    splits = _splits_at_line_breaks(tokenizer)
    found: dict[int, list[int]] = {}
    joined = [i for i, text in enumerate(texts) if not (splits and _has_line_break(text))]
    together = [texts[i].prompt + texts[i].text for i in joined]
    for i, whole in zip(joined, token_ids(together, tokenizer, special=special), strict=True):
        n_prompt = len(texts[i].prompt_ids)
        if whole[:n_prompt] == texts[i].prompt_ids:
            found[i] = whole[n_prompt:]
    rest = [i for i in range(len(texts)) if i not in found]
    apart = _ids_without_mark([texts[i].text for i in rest], tokenizer, known_plain=splits)
    found |= zip(rest, apart, strict=True)
    return [found[i] for i in range(len(texts))]


def _has_line_break(following: Following) -> bool:
    """Say that a line break, and not one of several blanks, stands between prompt and text."""
    return following.prompt.endswith("\n") and not following.text[:1].isspace()


def _splits_at_line_breaks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Say that text behind a line break has the tokens that it has alone.

    So it is with byte-level tokenizers. Their prompts need not be tokenised again with every
    completion.
    """
    alone = _ids(_FIRST_CHARACTERS, tokenizer, special=False)
    behind = _ids([f"\n{text}" for text in _FIRST_CHARACTERS], tokenizer, special=False)
    line_break = _ids(["\n"], tokenizer, special=False)[0]
    return all(line_break + ids == whole for ids, whole in zip(alone, behind, strict=True))


def _ids_without_mark(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, known_plain: bool
) -> list[list[int]]:
    found = _ids(texts, tokenizer, special=False)
    missing = [] if known_plain else list(range(len(texts)))
    for anchor in _ANCHORS:
        anchor_ids = _ids([anchor], tokenizer, special=False)[0]
        wholes = _ids([anchor + texts[i] for i in missing], tokenizer, special=False)
        still_missing = []
        for i, whole in zip(missing, wholes, strict=True):
            if whole[: len(anchor_ids)] == anchor_ids:
                found[i] = whole[len(anchor_ids) :]
            else:
                still_missing.append(i)
        missing = still_missing
    return found


def tokenise(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool
) -> "BatchEncoding":
    """Return what a tokenizer says of texts as a whole, whatever limits were saved with it."""
    with _panic_named(tokenizer):
        return tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,  # the length is checked where it matters, against the model's context
        )


def _panic_named(tokenizer: "PreTrainedTokenizerBase") -> AbstractContextManager[None]:
    return panic_named(f"the tokenizer of {tokenizer.name_or_path} fails on a text")


def piece_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Tokenise texts with a fast tokenizer, no special tokens around them, sooner than elsewhere.

    The tokenizer's settings must be those of `tokenise`: one call of that before sets them.
    """
    from transformers import PreTrainedTokenizerFast

    # Where each token begins in the text is left out, a fifth of the work
    if getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus:
        backend = tokenizer.backend_tokenizer
        with _panic_named(tokenizer):
            found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in found]
    return _ids(texts, tokenizer, special=False)


def _ids(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool
) -> list[list[int]]:
    return list(tokenise(texts, tokenizer, special=special)["input_ids"]) if texts else []


def _special_tokens_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Count the special tokens that this tokenizer appends to a text."""
    bare, full = (_ids(["a"], tokenizer, special=special)[0] for special in (False, True))
    n_before = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return len(full) - n_before - len(bare)

"""Examples to token ids: what the model is shown, and what it is taught to say.

    sequence = tokens(prompt + separator) ++ tokens(completion) ++ [EOS]

The prompt carries the special tokens that the tokenizer puts in front (BOS), never those it puts
behind; a chat is written by the tokenizer's own template, which holds its special tokens already.
Prompt and completion are tokenised apart, so that training and generation see the same prompt, and
a prompt that comes again among the next few thousand rows is tokenised once.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swlora.data.examples import Example
from swlora.data.token_sequences import TokenSequences
from swlora.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 8192  # encoded at once: as Python's numbers, tokens take ten times the memory


def encode_example(
    example: Example, separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Return (prompt ids, completion ids with EOS); both hold one token at least."""
    prompt = encode_prompts([example], separator, tokenizer)[0]
    return prompt, _encode_completions([example], tokenizer)[0]


def encode_examples(
    examples: Sequence[Example],
    separator: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_tokens: int,
    truncate: bool,
) -> tuple[TokenSequences, int]:
    """Encode a split; (sequences of at most `context_tokens` tokens, number of rows cut).

    A longer row raises DataError, or with `truncate` loses the completion's tail (its EOS too);
    where the prompt alone fills the context, its head as well, so that one token is learned.
    """
    if context_tokens < 2:
        raise UserError(f"a context of {context_tokens} tokens holds no prompt and completion")
    n_long, first_long = 0, ""

    def encoded() -> Iterator[TokenSequences]:
        nonlocal n_long, first_long
        for start in range(0, len(examples) or 1, CHUNK_ROWS):
            chunk = list(examples[start : start + CHUNK_ROWS])
            prompts = encode_prompts(chunk, separator, tokenizer)
            pairs = list(zip(prompts, _encode_completions(chunk, tokenizer), strict=True))
            for i, (prompt, completion) in enumerate(pairs):
                if len(prompt) + len(completion) > context_tokens:
                    n_long += 1
                    first_long = first_long or (
                        f"row {start + i + 1} has {len(prompt) + len(completion)} tokens, "
                        f"{len(prompt)} of prompt and {len(completion)} of completion"
                    )
                    kept = prompt[-(context_tokens - 1) :]
                    pairs[i] = kept, completion[: context_tokens - len(kept)]
            yield TokenSequences.from_lists(pairs)

    sequences = TokenSequences.joined(encoded())
    if n_long and not truncate:
        more = f" (and {n_long - 1} more such rows)" if n_long > 1 else ""
        raise DataError(
            f"{first_long}, but the model's context is {context_tokens}{more}; --truncate cuts them"
        )
    return sequences, n_long


def encode_prompts(
    prompts: Sequence[Example], separator: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Encode the prompt of each example, in order; the completions are not looked at.

    Raises UserError for no examples, or for a chat that the tokenizer's template cannot write.
    """
    if not prompts:
        raise UserError("there are no rows to encode")
    distinct = list(dict.fromkeys((e.prompt, e.messages) for e in prompts))
    plain = [prompt for prompt, messages in distinct if not messages]
    chats = [_chat_text(messages, tokenizer) for _, messages in distinct if messages]
    plain_ids = _ids([text + separator for text in plain], tokenizer, special=True)
    n_behind = _special_tokens_behind(tokenizer)
    plain_iter = iter([ids[: len(ids) - n_behind] for ids in plain_ids])
    chat_iter = iter(_ids(chats, tokenizer, special=False))
    encoded = {
        key: next(chat_iter if key[1] else plain_iter) or [_start_token(tokenizer)]
        for key in distinct
    }
    return [encoded[e.prompt, e.messages] for e in prompts]


def _encode_completions(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    eos = _eos_token(tokenizer)
    return [[*ids, eos] for ids in _ids([e.completion for e in examples], tokenizer, special=False)]


def _ids(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool
) -> list[list[int]]:
    if not texts:
        return []
    batch = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # the length is checked here, against the model's context
    )
    return list(batch["input_ids"])


def _chat_text(messages: tuple[tuple[str, str], ...], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the rows are chats and the tokenizer has no chat template: use a model made for chat, "
            "or rows of prompt and completion"
        )
    from jinja2 import TemplateError

    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(role for role, _ in messages)
        raise UserError(f"the chat template refuses the turns {roles}: {error}") from error
    return str(text)


def _special_tokens_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Count the special tokens that this tokenizer appends to a text."""
    bare, full = (_ids(["a"], tokenizer, special=special)[0] for special in (False, True))
    n_before = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return len(full) - n_before - len(bare)


def _eos_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no completion could end")
    return int(tokenizer.eos_token_id)


def _start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    bos = tokenizer.bos_token_id
    return _eos_token(tokenizer) if bos is None else int(bos)

"""How far two models agree: logits on held texts, and greedy continuations of held prompts.

Held texts come with the package and with nobody's training data: windows of its English sample, and
a chat in the words of the tokenizer's own template where it has one.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from swlora.data.chat import ChatTemplate
from swlora.data.examples import Message
from swlora.errors import UserError
from swlora.superweights.ablate import text_windows

N_WINDOWS, WINDOW_TOKENS = 4, 128
N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 16
PLACES_AT_ONCE = 32
# What an adapter does, in KL nats a token, shows from here on; below it float32 itself does. What
# is made of it may differ from it by at most this share of that.
LEAST_EFFECT_NATS, MOST_OF_EFFECT = 1e-6, 0.5
_QUESTION = ("user", "What is the capital of France?")
CHATS = (  # the turns of each
    (_QUESTION,),
    (_QUESTION, ("assistant", "It is Paris."), ("user", "And that of Peru?")),
)


@dataclass(frozen=True)
class HeldTexts:
    """Token ids: windows (n, T), and prompts by their lengths, each (n, T)."""

    windows: Tensor
    prompts: Sequence[Tensor]


@dataclass(frozen=True)
class Agreement:
    """What a model's logits are beside those of a reference, summed over `n_tokens` places.

    A place is a token of a text, and the distribution of the one that follows it. The divergence is
    KL(reference || model) in nats. A continuation is equal where all its tokens are.
    """

    n_tokens: int
    largest_logit_difference: float
    kl_sum_nats: float
    n_equal_top_tokens: int
    n_continuations: int = 0
    n_equal_continuations: int = 0

    @property
    def kl_nats_per_token(self) -> float:
        """The mean divergence."""
        return self.kl_sum_nats / self.n_tokens

    @property
    def share_of_equal_top_tokens(self) -> float:
        """The share of places at which both find the same token the likeliest."""
        return self.n_equal_top_tokens / self.n_tokens

    def __add__(self, other: Self) -> "Agreement":
        return Agreement(
            self.n_tokens + other.n_tokens,
            max(self.largest_logit_difference, other.largest_logit_difference),
            self.kl_sum_nats + other.kl_sum_nats,
            self.n_equal_top_tokens + other.n_equal_top_tokens,
            self.n_continuations + other.n_continuations,
            self.n_equal_continuations + other.n_equal_continuations,
        )

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.largest_logit_difference:.2g}, KL "
            f"{self.kl_nats_per_token:.2g} nats a token, {self.share_of_equal_top_tokens:.1%} of "
            f"{self.n_tokens:,} top tokens equal, {self.n_equal_continuations} of "
            f"{self.n_continuations} greedy continuations equal"
        )


def compare_logits(reference: Tensor, logits: Tensor) -> Agreement:
    """Compare logits (..., vocabulary) of the same places; both are taken in float32.

    A few places at a time: with a large vocabulary, logits are larger than the weights of a block.
    """
    places = (z.reshape(-1, z.shape[-1]).split(PLACES_AT_ONCE) for z in (reference, logits))
    parts = [_compare(z.float(), other.float()) for z, other in zip(*places, strict=True)]
    return sum(parts[1:], start=parts[0])


def _compare(expected: Tensor, found: Tensor) -> Agreement:
    log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(found, dim=-1)
    return Agreement(
        n_tokens=len(expected),
        largest_logit_difference=float((expected - found).abs().max()),
        kl_sum_nats=float((log_p.exp() * (log_p - log_q)).sum().clamp(min=0.0)),
        n_equal_top_tokens=int((expected.argmax(-1) == found.argmax(-1)).sum()),
    )


def held_texts(tokenizer: Any, context_tokens: int) -> HeldTexts:
    """Return what models are compared on, short enough for a context."""
    window_tokens = min(WINDOW_TOKENS, context_tokens)
    prompt_tokens = max(2, min(PROMPT_TOKENS, context_tokens - NEW_TOKENS))
    windows = text_windows(tokenizer, None, N_WINDOWS, window_tokens)
    prompts = [text_windows(tokenizer, None, N_PROMPTS, prompt_tokens)]
    for text in chat_texts(tokenizer)[:1]:
        chat = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        if chat.shape[1] + NEW_TOKENS <= context_tokens:
            prompts.append(chat)
    return HeldTexts(windows, prompts)


def chat_texts(tokenizer: Any) -> list[str]:
    """Return chats as the tokenizer's template writes them, an answer to come: short ones first.

    Empty where it has no template, or none for chats without tools; what it refuses is left out.
    """
    try:
        template = ChatTemplate(tokenizer)
    except UserError:
        return []
    texts = []
    for turns in CHATS:
        with suppress(UserError):
            texts.append(template.prompt([Message(role, text) for role, text in turns]))
    return texts


@torch.no_grad()
def measure_agreement(
    reference: Any, model: Any, texts: HeldTexts, advance: Callable[[], None] = lambda: None
) -> Agreement:
    """Compare a causal language model of transformers with a reference on held texts.

    The reference alone writes, with a cache. The other model would write the same where it finds
    every token of that the likeliest, which one pass over it shows. `advance` is called
    `n_comparisons(texts)` times.
    """
    total = Agreement(0, 0.0, 0.0, 0)
    for window in texts.windows.split(1):
        total += compare_logits(*(m(input_ids=window).logits for m in (reference, model)))
        advance()
    for prompts in texts.prompts:
        written = greedy(reference, prompts, NEW_TOKENS)
        both = torch.cat([prompts, written], dim=1)
        expected, found = (m(input_ids=both).logits for m in (reference, model))
        tops = found[:, prompts.shape[1] - 1 : -1].argmax(-1)
        n_equal = int((tops == written).all(dim=1).sum())
        total += compare_logits(expected, found)
        total += Agreement(0, 0.0, 0.0, 0, len(prompts), n_equal)
        advance()
    return total


@torch.no_grad()
def measure_effect(adapted: Any, texts: HeldTexts) -> Agreement:
    """Compare a PeftModel with itself without its adapter, on the windows of held texts."""
    total = Agreement(0, 0.0, 0.0, 0)
    for window in texts.windows.split(1):
        expected = adapted(input_ids=window).logits
        with adapted.disable_adapter():
            total += compare_logits(expected, adapted(input_ids=window).logits)
    return total


def n_comparisons(texts: HeldTexts) -> int:
    """Return how often `measure_agreement` says that it goes on."""
    return len(texts.windows) + len(texts.prompts)


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, n_new: int) -> Tensor:
    """Return the likeliest `n_new` tokens after prompts (n, T), one after the other: (n, n_new)."""
    written: list[Tensor] = []
    token_ids, cache = prompts, None
    for _ in range(n_new):
        out = model(input_ids=token_ids, past_key_values=cache, use_cache=True)
        token_ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        written.append(token_ids)
    return torch.cat(written, dim=1)

"""An exported file run in llama.cpp, and held against the model that it was made from.

Eight prompts are continued greedily by both, and the log probabilities of all tokens are compared,
and the tokens of texts. The model at hand has its weights rounded as the file has them, so that
what is left is arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.deploy.agreement import (
    LEAST_EFFECT_NATS,
    MOST_OF_EFFECT,
    NEW_TOKENS,
    Agreement,
    HeldTexts,
    chat_texts,
    compare_logits,
    greedy,
    held_texts,
    measure_effect,
)
from swlora.deploy.export_request import TypeName
from swlora.deploy.gguf_layout import GgufLayout
from swlora.deploy.gguf_texts import compared_texts, token_ids
from swlora.deploy.gguf_types import rounded, tensor_type
from swlora.deploy.gguf_write import copied_fields
from swlora.deploy.llama_cpp import LEAST_LOG_PROBABILITY, Answer, LlamaCpp, Question, ask
from swlora.errors import RunFailedError, UserError
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_tokenizer import puts_space

# Mean KL in nats a token that is still arithmetic, and how much likelier the model may find its own
# token than the one that llama.cpp writes in its place. llama.cpp rounds what goes into a product
# to the weights' type: q8_0 to 8 bits. Measured on SmolLM2-135M: see docs/decisions.md.
KL_LIMITS: dict[TypeName, float] = {"f32": 1e-5, "f16": 1e-4, "bf16": 2e-3, "q8_0": 1e-2}
TIE_NATS: dict[TypeName, float] = {"f32": 0.01, "f16": 0.03, "bf16": 0.15, "q8_0": 1.0}


@dataclass(frozen=True)
class Checked:
    """What came out of a check: by what, how near, and what nearness was asked for.

    `node_llama_cpp` is the version of the npm package that llama.cpp came with, if it was run.

    `largest_gap_nats` is by how much the model prefers its own token where a continuation parts
    from the other, at most; 0 where all are equal. `tokens_equal` says whether plain texts had the
    same token ids, `chat_tokens_equal` whether chats had, which their template wrote; None where
    there were none. `rounding` is the model in the file's type beside
    the model as it was, on windows of held texts; None in float32. `adapter_kl_nats_per_token` is
    what an adapter does to its base on the same windows; None for a model.
    """

    by: str
    agreement: Agreement
    kl_limit_nats: float
    largest_gap_nats: float
    gap_limit_nats: float
    tokens_equal: bool | None
    chat_tokens_equal: bool | None = None
    rounding: Agreement | None = None
    adapter_kl_nats_per_token: float | None = None
    node_llama_cpp: str | None = None


@torch.no_grad()
def round_and_compare(
    model: Any, layout: GgufLayout, kind: TypeName, windows: Tensor
) -> Agreement | None:
    """Round the model's weights as `round_like_file` does; return what that does to its logits.

    windows: token ids (n, T). None in float32, which rounds nothing.
    """
    if kind == "f32":
        round_like_file(model, layout, kind)
        return None
    before = [model(input_ids=window).logits for window in windows.split(1)]
    round_like_file(model, layout, kind)
    pairs = zip(before, windows.split(1), strict=True)
    parts = [compare_logits(own, model(input_ids=window).logits) for own, window in pairs]
    return sum(parts[1:], start=parts[0])


def effect_of_adapter(adapted: Any, windows: Tensor) -> float:
    """Return what a PeftModel's adapter does to its base, in KL nats a token.

    windows: token ids (n, T). Raises RunFailedError for one that does nothing that float32 shows:
    no check could tell its file from none.
    """
    effect = measure_effect(adapted, HeldTexts(windows, ())).kl_nats_per_token
    if not effect > LEAST_EFFECT_NATS:  # nor where it is no number
        raise RunFailedError(
            f"the adapter moves its base by {effect:.2g} nats a token, which is nothing (at least "
            f"{LEAST_EFFECT_NATS:g} can be told from rounding), so no file is written: was it "
            "trained?"
        )
    return effect


@torch.no_grad()
def round_like_file(model: Any, layout: GgufLayout, kind: TypeName) -> None:
    """Give the model, in float32, the values that its file has."""
    for name, parameter in model.named_parameters():
        if layout.is_left_out(name):
            continue
        try:
            place = layout.place(name)
        except UserError:  # experts, which the model holds fused and the file does not
            parameter.copy_(rounded(parameter, tensor_type(name, tuple(parameter.shape), kind)))
            continue
        weight = parameter.t() if place.is_transposed and parameter.ndim == 2 else parameter
        values = rounded(weight, tensor_type(place.name, tuple(weight.shape), kind))
        parameter.copy_(values.t() if weight is not parameter else values)


def check_in_llama_cpp(
    llama_cpp: LlamaCpp,
    question: Question,
    model: Any,
    tokenizer: Any,
    kind: TypeName,
    context_tokens: int,
    name: str,
) -> Checked:
    """Compare what llama.cpp computes from a file with a model; see `require` for failures.

    question: names the file, and a LoRA on it; what is asked is added here. name: the file's in
    messages. Raises RunFailedError for other special tokens than the tokenizer's.
    """
    prompts, written = continued(model, tokenizer, context_tokens)
    has_space = puts_space(read_gguf_table(question.model))
    texts, chats = compared_texts(tokenizer, has_space=has_space), chat_texts(tokenizer)
    both = [torch.cat(pair) for pair in zip(prompts, written, strict=True)]
    answer = ask(
        llama_cpp,
        Question(
            question.model,
            question.lora,
            texts=[*texts, *chats],
            sequences=[row.tolist() for row in both],
            prompts=[row.tolist() for row in prompts],
            n_new_tokens=NEW_TOKENS,
            threads=question.threads,
        ),
    )
    check_special_tokens(tokenizer, answer.bos, answer.eos, answer.add_bos, name)
    total, gap = _compared(model, both, prompts, written, answer)
    by = f"llama.cpp {answer.release} ({llama_cpp.name})"
    found, found_of_chats = answer.tokens[: len(texts)], answer.tokens[len(texts) :]
    return Checked(
        by,
        total,
        KL_LIMITS[kind],
        gap,
        TIE_NATS[kind],
        tokens_equal=found == token_ids(tokenizer, texts),
        chat_tokens_equal=found_of_chats == token_ids(tokenizer, chats) if chats else None,
        node_llama_cpp=llama_cpp.version,
    )


def check_special_tokens(
    tokenizer: Any, bos: int | None, eos: int | None, adds_bos: bool, name: str
) -> None:
    """Raise RunFailedError where a file has other tokens at the ends of a text than the tokenizer.

    bos, eos, adds_bos: what the file or llama.cpp says; a tokenizer that has no BOS has no say.
    """
    own_bos, own_eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds = own_bos is not None and tokenizer("x").input_ids[0] == own_bos
    for what, own, found in (
        ("the BOS token", own_bos, bos if own_bos is not None else None),
        ("the EOS token", own_eos, eos),
        ("a BOS token before a text (add_bos_token)", adds, adds_bos),
    ):
        if own != found:
            raise RunFailedError(
                f"{name} was not written: {what} is {found} in it, and {own} in the tokenizer"
            )


def check_metadata(path: Path, base: Path, name: str) -> None:
    """Raise RunFailedError where a file says something else than the base file that it follows."""
    said, expected = copied_fields(path), copied_fields(base)
    for key, (value, _, _) in expected.items():
        if key not in said or said[key][0] != value:
            raise RunFailedError(f"{name} was not written: its {key} is not that of {base.name}")


def require(checked: Checked, what: str, *, for_chats: bool = True) -> None:
    """Raise RunFailedError where a file computes something else than its model.

    for_chats: whether the model is given chats; else it does not matter how those are cut.
    """
    found = checked.agreement
    if checked.tokens_equal is False:
        raise RunFailedError(f"{what} was not written: its tokenizer cuts text into other tokens")
    if checked.chat_tokens_equal is False and for_chats:
        raise RunFailedError(
            f"{what} was not written: llama.cpp cuts chats into other tokens than the model's "
            "tokenizer, at their special tokens; train with a --tokenizer that it reads alike "
            "(docs/deploy.md)"
        )
    kl, effect = found.kl_nats_per_token, checked.adapter_kl_nats_per_token
    is_near = kl <= checked.kl_limit_nats  # not so for what is no number
    if not is_near or checked.largest_gap_nats > checked.gap_limit_nats:
        raise RunFailedError(
            f"{what} was not written, because {checked.by} computes something else from it: "
            f"{found} (at most {checked.kl_limit_nats:g} nats are arithmetic); the model finds its "
            f"own token likelier by up to {checked.largest_gap_nats:.2g} nats where they part (at "
            f"most {checked.gap_limit_nats:g})"
        )
    if effect is not None and kl > MOST_OF_EFFECT * effect:
        raise RunFailedError(
            f"{what} was not written: {checked.by} is {kl:.2g} nats a token away from base and "
            f"adapter, and the adapter moves its base by {effect:.2g} only; it is not applied, or "
            "not as it should be"
        )


def continued(
    model: Any, tokenizer: Any, context_tokens: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return prompts (T,) and what the model writes after each, (NEW_TOKENS,)."""
    prompts: list[Tensor] = []
    written: list[Tensor] = []
    for batch in held_texts(tokenizer, context_tokens).prompts:
        prompts += batch
        written += greedy(model, batch, NEW_TOKENS)
    return prompts, written


@torch.inference_mode()
def _compared(
    model: Any,
    both: Sequence[Tensor],
    prompts: Sequence[Tensor],
    written: Sequence[Tensor],
    answer: Answer,
) -> tuple[Agreement, float]:
    """Return the agreement, and the largest gap where continuations part."""
    total, gap = Agreement(0, 0.0, 0.0, 0), 0.0
    rows = zip(both, prompts, written, answer.log_probabilities, answer.continuations, strict=True)
    for row, prompt, own, log_q, other in rows:
        log_p = model(input_ids=row[None]).logits[0].float().log_softmax(-1)
        log_p, log_q = (x.clamp(min=LEAST_LOG_PROBABILITY) for x in (log_p, log_q))
        total += compare_logits(log_p, log_q)
        here = gap_of(log_p[len(prompt) - 1 : -1], own, torch.tensor(other))
        total += Agreement(0, 0.0, 0.0, 0, 1, int(here is None))
        gap = max(gap, here or 0.0)
    return total, gap


def gap_of(logits: Tensor, own: Tensor, other: Tensor) -> float | None:
    """Return by how much the model prefers its own token where two continuations first differ.

    logits: (tokens, vocabulary) of the model. None where they are equal.
    """
    differing = (own != other).nonzero()
    if not len(differing):
        return None
    at = int(differing[0])
    return float(logits[at, own[at]] - logits[at, other[at]])

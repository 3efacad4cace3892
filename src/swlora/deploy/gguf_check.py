"""An exported file run, and held against the model that it was made from.

In llama.cpp, where there is one: eight prompts are continued greedily by both, and the log
probabilities of all tokens are compared. Else the file is read back by the tables of transformers,
and logits are compared. The model at hand has its weights rounded as the file has them, so that
what is left is arithmetic.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.deploy.agreement import NEW_TOKENS, Agreement, compare_logits, greedy, held_texts
from swlora.deploy.gguf_layout import GgufLayout
from swlora.deploy.gguf_types import TypeName, rounded, tensor_type
from swlora.deploy.llama_cpp import LEAST_LOG_PROBABILITY, Answer, LlamaCpp, Question, ask
from swlora.errors import RunFailedError, UserError
from swlora.models.gguf_weights import GgufWeights

# Mean KL in nats a token that is still arithmetic, and how much likelier the model may find its own
# token than the one that llama.cpp writes in its place. llama.cpp rounds what goes into a product
# to the weights' type: q8_0 to 8 bits. Measured on SmolLM2-135M: see docs/decisions.md.
KL_LIMITS: dict[TypeName, float] = {"f32": 1e-5, "f16": 1e-4, "bf16": 2e-3, "q8_0": 1e-2}
TIE_NATS: dict[TypeName, float] = {"f32": 0.01, "f16": 0.03, "bf16": 0.15, "q8_0": 1.0}
TEXTS = (  # digits, apostrophes, spaces and letters of several alphabets: what cuts differ in
    "It's 2024: 12345 items, don't they'll?\n\n  Two  spaces.",
    "caf\u00e9, na\u00efve; \u4f60\u597d",
)


@dataclass(frozen=True)
class Checked:
    """What came out of a check: by what, how near, and what nearness was asked for.

    `largest_gap_nats` is by how much the model prefers its own token where a continuation parts
    from the other, at most; 0 where all are equal. `tokens_equal` says whether the texts had the
    same token ids; None where it was not asked.
    """

    by: str
    agreement: Agreement
    kl_limit_nats: float
    largest_gap_nats: float
    gap_limit_nats: float
    tokens_equal: bool | None


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
) -> Checked:
    """Compare what llama.cpp computes from a file with a model; see `require` for failures.

    question: names the file, and a LoRA on it; what is asked is added here.
    """
    prompts, written = _continued(model, tokenizer, context_tokens)
    both = [torch.cat(pair) for pair in zip(prompts, written, strict=True)]
    answer = ask(
        llama_cpp,
        Question(
            question.model,
            question.lora,
            texts=TEXTS,
            sequences=[row.tolist() for row in both],
            prompts=[row.tolist() for row in prompts],
            n_new_tokens=NEW_TOKENS,
            threads=question.threads,
        ),
    )
    total, gap = _compared(model, both, prompts, written, answer)
    own = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    by = f"llama.cpp {answer.release} ({llama_cpp.name})"
    is_same = answer.tokens == own
    return Checked(by, total, KL_LIMITS[kind], gap, TIE_NATS[kind], tokens_equal=is_same)


def check_by_reading(path: Path, model: Any, tokenizer: Any, context_tokens: int) -> Checked:
    """Compare a file, read back by the tables of transformers, with a model."""
    import transformers

    weights, back = GgufWeights(path, model), copy.deepcopy(model)
    parameters = dict(back.named_parameters())
    if missing := sorted(parameters.keys() - set(weights.names)):
        raise RunFailedError(f"{path.name} lacks {missing[0]} when it is read back")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights.tensor(name))
    prompts, written = _continued(model, tokenizer, context_tokens)
    total, gap = Agreement(0, 0.0, 0.0, 0), 0.0
    with torch.inference_mode():
        for prompt, expected in zip(prompts, written, strict=True):
            row = torch.cat([prompt, expected])[None]
            own, found = (m(input_ids=row).logits[0] for m in (model, back))
            total += compare_logits(own, found)
            tops = found[len(prompt) - 1 : -1].argmax(-1)
            here = _gap(own[len(prompt) - 1 : -1], expected, tops)
            total += Agreement(0, 0.0, 0.0, 0, 1, int(here is None))
            gap = max(gap, here or 0.0)
    by = f"transformers {transformers.__version__}, by which it was read back; not run in llama.cpp"
    return Checked(by, total, KL_LIMITS["f32"], gap, TIE_NATS["f32"], tokens_equal=None)


def require(checked: Checked, what: str) -> None:
    """Raise RunFailedError where a file computes something else than its model."""
    found = checked.agreement
    if checked.tokens_equal is False:
        raise RunFailedError(f"{what} was not written: llama.cpp cuts text into other tokens")
    is_near = found.kl_nats_per_token <= checked.kl_limit_nats  # not so for what is no number
    if not is_near or checked.largest_gap_nats > checked.gap_limit_nats:
        raise RunFailedError(
            f"{what} was not written, because {checked.by} computes something else from it: "
            f"{found} (at most {checked.kl_limit_nats:g} nats are arithmetic); the model finds its "
            f"own token likelier by up to {checked.largest_gap_nats:.2g} nats where they part (at "
            f"most {checked.gap_limit_nats:g})"
        )


def _continued(
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
        here = _gap(log_p[len(prompt) - 1 : -1], own, torch.tensor(other))
        total += Agreement(0, 0.0, 0.0, 0, 1, int(here is None))
        gap = max(gap, here or 0.0)
    return total, gap


def _gap(logits: Tensor, own: Tensor, other: Tensor) -> float | None:
    """Return by how much the model prefers its own token where two continuations first differ.

    logits: (tokens, vocabulary) of the model. None where they are equal.
    """
    differing = (own != other).nonzero()
    if not len(differing):
        return None
    at = int(differing[0])
    return float(logits[at, own[at]] - logits[at, other[at]])

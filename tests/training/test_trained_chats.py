"""Training on encoded chats of several turns, against transformers + PEFT turn by turn.

The oracle runs each answer by itself, behind the tokens that transformers shows for generation.
"""

from typing import Any

import numpy as np
import pytest
from tests.support.chat_families import FAMILIES, turn_by_turn
from tests.support.chat_templates import chat_tokenizer
from tests.support.gradients import measure
from tests.support.labelled_loss import adapted, assert_close, cross_entropy, labelled_loss, oracle
from tests.support.models import MakeModel

from swlora.adapters.methods import trainable_parameters
from swlora.data.chat_rows import make_chat
from swlora.data.encode import encode_examples
from swlora.data.examples import Example
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

SYSTEM = {"role": "system", "content": "Be brief."}


def chats(*, system: bool) -> list[list[dict[str, Any]]]:
    """Chats of one to three answers, some with reasoning, that begin alike."""
    said = ["Hi", "Yes?", "é", "<think>\nLong ago.\n</think>\n\nSo.", "And?", "No"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]
    other = [*turns[:3], {"role": "assistant", "content": "Well.\nWell"}]
    return [[SYSTEM] * system + messages for messages in (turns, turns[:2], other, turns[:4])]


@pytest.mark.parametrize(
    ("family", "model_type"),
    [
        ("ChatML", "gpt2"),
        ("Llama 3", "llama"),
        ("Qwen 3", "llama"),
        ("Gemma 3", "gemma2"),
        ("SmolLM3", "llama"),
        ("Phi-3", "phi3"),
    ],
)
@pytest.mark.parametrize("weight", [None, 0.25])
def test_every_answer_equals_transformers_in_its_own_context(
    make_model: MakeModel, family: str, model_type: str, weight: float | None
) -> None:
    tokenizer = chat_tokenizer(FAMILIES[family])
    rows = chats(system=family != "Qwen 3")
    peft_model = adapted(make_model, model_type, (1, 2), vocab_size=272)
    if weight is not None:
        peft_model = peft_model.double()
    data, examples = [], []
    for messages in rows:
        answers = turn_by_turn(family, tokenizer, messages)
        weights = ([1.0] * 3 if weight is None else [weight, 1.0, 0.0])[: len(answers)]
        said = iter(weights)
        example = make_chat(
            [m | ({"weight": next(said)} if m["role"] == "assistant" else {}) for m in messages]
        )
        assert isinstance(example, Example)
        examples.append(example)
        data += [
            (before + answer, [0.0] * len(before) + [w] * len(answer))
            for (before, answer), w in zip(answers, weights, strict=True)
            if w
        ]
    sequences = encode_examples(
        examples, "", tokenizer, context_tokens=256, truncate=False
    ).sequences
    assert len(sequences) <= len(data)
    trees = [np.arange(len(sequences))]
    loss_of = labelled_loss if weight is None else cross_entropy
    expected = oracle(peft_model, data, loss_of)
    for step in (PlainStep(peft_model, sequences), TreeStep(peft_model, sequences)):
        assert_close(measure(step, trainable_parameters(peft_model), trees), expected)

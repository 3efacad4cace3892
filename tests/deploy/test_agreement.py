"""How far two models agree: sums of known logits, and models that differ in a known way."""

import math

import pytest
import torch
from tests.support.plain_peft import greedy as greedy_without_cache

from swlora.deploy.agreement import (
    HeldTexts,
    compare_logits,
    greedy,
    held_texts,
    measure_agreement,
)


def test_logits_of_known_distributions():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    reference = torch.tensor([p, p]).log() + torch.tensor([[3.0], [0.0]])  # a shift says nothing
    logits = torch.tensor([p, q]).log() + torch.tensor([[3.0], [0.0]])
    found = compare_logits(reference, logits)
    assert found.kl_sum_nats == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert found.kl_nats_per_token == pytest.approx(0.125 * math.log(2), rel=1e-5)
    assert found.largest_logit_difference == pytest.approx(math.log(2), rel=1e-5)
    assert (found.n_tokens, found.n_equal_top_tokens) == (2, 1)
    assert found.share_of_equal_top_tokens == 0.5


def test_places_are_summed_however_many_there_are():
    reference, logits = torch.randn(2, 2, 41, 30)
    found = compare_logits(reference, logits)
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    assert found.n_tokens == 82
    assert found.kl_sum_nats == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    assert found.largest_logit_difference == float((reference - logits).abs().max())


def test_logits_are_compared_in_float32():
    reference = torch.randn(4, 50).bfloat16()
    assert compare_logits(reference, reference.float()).kl_sum_nats == 0.0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_a_model_agrees_with_itself(make_model, tiny_tokenizer, model_type):
    model, texts = make_model(model_type), held_texts(tiny_tokenizer, 256)
    found = measure_agreement(model, make_model(model_type), texts)
    assert found.kl_nats_per_token < 1e-9
    assert found.n_equal_top_tokens == found.n_tokens
    assert found.n_equal_continuations == found.n_continuations == 9  # 8 of text, and a chat


def test_sums_are_those_of_all_texts(make_model):
    one, other = make_model("llama"), make_model("llama", seed=1)
    texts = HeldTexts(torch.randint(0, 200, (3, 20)), [torch.randint(0, 200, (2, 5))])
    found = measure_agreement(one, other, texts)
    assert found.n_tokens == 3 * 20 + 2 * (5 + 16)
    assert (found.n_continuations, found.n_equal_continuations) == (2, 0)
    written = greedy(one, texts.prompts[0], 16)
    places = [*texts.windows, *torch.cat([texts.prompts[0], written], dim=1)]
    total = sum(
        float(
            torch.nn.functional.kl_div(
                *(m(input_ids=ids[None]).logits.log_softmax(-1) for m in (other, one)),
                reduction="sum",
                log_target=True,
            )
        )
        for ids in places
    )
    assert found.kl_sum_nats == pytest.approx(total, rel=1e-4)


def test_a_continuation_with_one_other_token_is_another(make_model):
    model, other = make_model("llama"), make_model("llama")
    prompts = torch.tensor([[65, 66, 67], [1, 2, 3]])
    written = greedy(model, prompts, 16)
    own = set(written[0].tolist()) - set(written[1].tolist())
    assert own  # a token that the first continuation alone holds
    with torch.no_grad():
        other.lm_head.weight[min(own)] = 0.0
    found = measure_agreement(model, other, HeldTexts(prompts, [prompts]))
    assert found.n_equal_continuations == 1


def test_greedy_is_that_without_a_cache(make_model):
    model, prompts = make_model("gemma3_text"), torch.tensor([[72, 105, 33], [9, 8, 7]])
    written = greedy(model, prompts, 12)
    for prompt, tokens in zip(prompts.tolist(), written.tolist(), strict=True):
        expected = greedy_without_cache(model, prompt, 12)
        assert tokens[: len(expected)] == expected and expected


def test_texts_fit_a_short_context_and_hold_a_chat(tiny_tokenizer, bos_tokenizer):
    texts = held_texts(tiny_tokenizer, 40)
    assert max(texts.windows.shape[1], *(p.shape[1] + 16 for p in texts.prompts)) <= 40
    chat = held_texts(tiny_tokenizer, 256).prompts[1]
    assert "capital of France" in tiny_tokenizer.decode(chat[0])
    assert held_texts(bos_tokenizer(), 256).windows[:, 0].tolist() == [256] * 4

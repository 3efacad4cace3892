"""The batch decoder against `generate` of transformers, one prompt at a time."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.decoding import EOS, N_TOKENS, SHAPES, alone, make_prompts
from tests.support.models import MakeModel

from swlora.decoding import prefill
from swlora.decoding.batch import BatchDecoder, DecodeRequest, Event
from swlora.decoding.sampling import Sampling
from swlora.errors import RunFailedError, UserError


def decoder(model: Any, max_slots: int = 16, **options: Any) -> BatchDecoder:
    return BatchDecoder(model, eos_token_ids=[EOS], max_slots=max_slots, **options)


def texts(events: Sequence[Event]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {event.request_id: [] for event in events}
    for event in events:
        if event.finish_reason != "eos":
            found[event.request_id].append(event.token_id)
    return found


def run(batch: BatchDecoder, requests: Sequence[DecodeRequest]) -> list[Event]:
    """All events of requests that are admitted together."""
    batch.admit(requests)
    events = []
    while batch.n_requests:
        events += batch.step()
    return events


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_that_come_and_go_say_what_each_says_alone(shape: str, make_model: MakeModel) -> None:
    """Two new prompts every fourth step, long ones in stretches of 17 nodes, one text dropped."""
    model_type, changes = SHAPES[shape]
    model = make_model(model_type, **changes)
    prompts = make_prompts()
    lengths = [30, 4, 30, 25, 30, 30, 30, 9, 30]
    batch, waiting, events = decoder(model, 5, prefill_tokens=17), list(range(len(prompts))), []
    for n_steps in range(1000):
        if n_steps % 4 == 0:
            new = [waiting.pop(0) for _ in range(min(2, len(waiting), batch.n_free))]
            batch.admit([DecodeRequest(i, prompts[i], lengths[i]) for i in new])
        if n_steps == 11:
            batch.drop(0)
        events += batch.step()
        if not waiting and not batch.n_requests:
            break
    found = texts(events)
    for i, prompt in enumerate(prompts):
        expected = alone(model, prompt, lengths[i])
        assert found[i] == (expected[: len(found[i])] if i == 0 else expected), i
    assert 3 < len(found[0]) < 12
    assert len({tuple(text) for text in found.values()}) > 4


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_order_of_admitting_and_dropping_changes_a_text(make_model: Any, seed: int) -> None:
    model, rng = make_model("llama"), random.Random(seed)
    prompts = [[rng.randrange(4) for _ in range(rng.choice((1, 2, 9, 33, 90)))] for _ in range(9)]
    lengths = [rng.choice((1, 2, 20, 60)) for _ in prompts]
    batch = decoder(model, rng.choice((2, 3, 7)), prefill_tokens=rng.choice((1, 10, 64)))
    waiting, at_work, dropped, events = list(range(len(prompts))), set[int](), set[int](), []
    while waiting or at_work:
        n_new = rng.randrange(batch.n_free + 1)
        new, waiting = waiting[:n_new], waiting[n_new:]
        batch.admit([DecodeRequest(i, prompts[i], lengths[i]) for i in new])
        at_work |= set(new)
        if at_work and rng.random() < 0.1:
            gone = rng.choice(sorted(at_work))
            batch.drop(gone)
            at_work.remove(gone)
            dropped.add(gone)
        assert batch.n_requests == len(at_work)
        stepped = batch.step()
        assert {event.request_id for event in stepped} <= at_work
        at_work -= {event.request_id for event in stepped if event.finish_reason}
        events += stepped
    found = texts(events)
    for i, prompt in enumerate(prompts):
        text, expected = found.get(i, []), alone(model, prompt, lengths[i])
        assert text == (expected[: len(text)] if i in dropped else expected), i


@pytest.mark.parametrize("stretch", [512, 130])
@pytest.mark.parametrize("max_scores", [1 << 25, 30_000])
def test_long_prompts_in_stretches_of_any_size(
    stretch: int, max_scores: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MAX_SCORES", max_scores)
    model = make_model("llama", max_position_embeddings=900, initializer_range=0.1)
    rng = random.Random(3)
    first = [rng.randrange(N_TOKENS) for _ in range(701)]
    prompts = [first, [*first[:310], *first[:150]], first[:310], [5, 6]]
    requests = [DecodeRequest(i, prompt, 20) for i, prompt in enumerate(prompts)]
    found = texts(run(decoder(model, prefill_tokens=stretch), requests))
    assert found == {i: alone(model, prompt, 20) for i, prompt in enumerate(prompts)}


def test_every_active_text_gets_one_token_a_step(make_model: MakeModel) -> None:
    batch = decoder(make_model("llama", initializer_range=0.1))
    batch.admit([DecodeRequest(i, [5, i], 4 + i) for i in range(3)])
    steps = [batch.step() for _ in range(7)]
    assert [sorted(event.request_id for event in events) for events in steps] == [
        *([[0, 1, 2]] * 4),
        [1, 2],
        [2],
        [],
    ]
    last = {event.request_id: event.finish_reason for events in steps for event in events}
    assert last == {0: "length", 1: "length", 2: "length"}


def test_why_a_text_ends(make_model: MakeModel) -> None:
    model = make_model("llama")
    tokens = alone(model, [9, 8, 7], 12, eos_token_id=None)
    end, stop = tokens[5], tokens[3]
    assert len(set(tokens[:6])) == 6
    batch = BatchDecoder(model, eos_token_ids=[end, 3], max_slots=4)
    requests = [
        DecodeRequest(0, [9, 8, 7], 12),
        DecodeRequest(1, [9, 8, 7], 12, stop_token_ids=[stop]),
        DecodeRequest(2, [9, 8, 7], 1),
        DecodeRequest(3, [9, 8, 7], 12, stop_token_ids=[tokens[0]]),
    ]
    events = run(batch, requests)
    said = {i: [e.token_id for e in events if e.request_id == i] for i in range(4)}
    assert said == {0: tokens[:6], 1: tokens[:4], 2: tokens[:1], 3: tokens[:1]}
    reasons = {e.request_id: e.finish_reason for e in events}
    assert reasons == {0: "eos", 1: "stop", 2: "length", 3: "stop"}
    assert sum(event.finish_reason is not None for event in events) == 4


def test_a_shared_prefix_is_run_once_and_a_long_prompt_in_stretches(
    make_model: MakeModel,
) -> None:
    model, widths = make_model("llama"), []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: widths.append(tuple(inputs[0].shape))
    )
    system = list(range(100, 140))
    prompts = [[*system, i] for i in range(5)] + [system, system]
    run(decoder(model, 7), [DecodeRequest(i, p, 2) for i, p in enumerate(prompts)])
    assert widths == [(1, 45), (7, 1)]
    widths.clear()
    batch = decoder(model, 2, prefill_tokens=16)
    batch.admit([DecodeRequest(0, [1, 2], 30)])
    batch.step()
    batch.admit([DecodeRequest(1, system, 2)])
    for _ in range(4):
        batch.step()
    assert widths == [(1, 2), *[(1, 1), (1, 16)] * 2, (1, 1), (1, 8), (2, 1)]


def test_nothing_is_computed_for_texts_that_are_done(make_model: MakeModel) -> None:
    model, sizes = make_model("gpt2", initializer_range=0.02), []
    model.lm_head.register_forward_pre_hook(
        lambda _module, inputs: sizes.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    requests = [DecodeRequest(i, [5] * (1 + i), n) for i, n in enumerate((9, 2, 5, 1))]
    assert len(run(decoder(model), requests)) == 17
    assert sizes == [4, 3, 2, 2, 2, 1, 1, 1, 1]


def test_memory_is_given_back_and_bounded(make_model: MakeModel) -> None:
    batch = decoder(make_model("llama"), 6)
    batch.admit([DecodeRequest(i, [1, 2, i], 200) for i in range(5)])
    largest = 0
    while batch.n_requests:
        batch.step()
        largest = max(largest, batch._cache.n_bytes)
        lengths = batch._cache.lengths
        assert not lengths or max(lengths) <= 202
    token_bytes = 2 * 3 * 2 * 8 * 4  # keys and values, layers, key heads, head width, float32
    assert 5 * 202 * token_bytes <= largest <= 6 * (202 + 32) * token_bytes
    assert batch._cache.n_bytes == 0


def test_the_model_is_left_as_it_was(make_model: MakeModel) -> None:
    model = make_model("llama")
    before = [vars(m).copy() for m in model.modules()]
    implementation = model.config._attn_implementation
    batch = decoder(model)
    batch.admit([DecodeRequest(0, [5, 6], 3)])
    batch.step()
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.step()
    handle.remove()
    assert [vars(m) for m in model.modules()] == before
    assert model.config._attn_implementation == implementation


def test_what_cannot_be_served_is_refused(make_model: MakeModel) -> None:
    batch = decoder(make_model("gpt2"), 2)
    for prompt, n_new, reason in (
        ([], 1, "a prompt token"),
        ([1], 0, "a new token"),
        ([1] * 250, 7, r"250 tokens and 7 new ones exceed .* context of 256"),
        ([1, 264], 1, r"not one of 0\.\.263"),
        ([-1], 1, "not one of"),
    ):
        with pytest.raises(UserError, match=reason):
            batch.admit([DecodeRequest(0, [1], 1), DecodeRequest(1, prompt, n_new)])
    with pytest.raises(ValueError, match="twice"):
        batch.admit([DecodeRequest(0, [1], 1), DecodeRequest(0, [2], 1)])
    with pytest.raises(ValueError, match="room"):
        batch.admit([DecodeRequest(i, [1], 1) for i in range(3)])
    with pytest.raises(KeyError):
        batch.drop(0)
    assert batch.n_requests == 0
    assert batch.step() == []
    with pytest.raises(UserError, match="falcon"):
        decoder(make_model("falcon"))
    with pytest.raises(ValueError, match="max_slots"):
        decoder(make_model("gpt2"), 0)


def test_a_block_that_attends_by_itself_is_refused(make_model: MakeModel) -> None:
    """Its attention would not know of the cache's layout."""
    model = make_model("llama")
    block = model.model.layers[1].self_attn
    block.config = type(model.config)(**model.config.to_dict())
    block.config._attn_implementation = "sdpa"
    batch = decoder(model)
    batch.admit([DecodeRequest(0, [5, 6], 3)])
    with pytest.raises(RunFailedError, match="2 of 3 blocks"):
        batch.step()


def test_a_text_sampled_in_company_says_what_it_says_alone(make_model: MakeModel) -> None:
    model = make_model("llama", initializer_range=0.1)
    own = [
        Sampling(temperature=0.5 + 0.3 * i, top_p=p, repetition_penalty=r, seed=11 * i)
        for i, (p, r) in enumerate(((1.0, 1.0), (0.8, 1.0), (0.9, 1.3), (1.0, 1.1)))
    ]
    own += [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2)]
    prompts = make_prompts()[: len(own)]
    prompts[5] = prompts[6]
    requests = [
        DecodeRequest(i, prompt, 25, sampling)
        for i, (prompt, sampling) in enumerate(zip(prompts, own, strict=True))
    ]
    together = texts(run(decoder(model), requests))
    assert together == {i: texts(run(decoder(model), [r]))[i] for i, r in enumerate(requests)}
    assert together[5] != together[6]
    state = torch.get_rng_state()
    assert texts(run(decoder(model), requests[::-1])) == together
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_repetition_is_punished_as_by_transformers(penalty: float, make_model: MakeModel) -> None:
    model = make_model("llama", initializer_range=0.08)
    sampling = Sampling(repetition_penalty=penalty)
    prompts = [[5, 5, 9], [1], [40, 41, 42, 43]]
    found = texts(
        run(decoder(model), [DecodeRequest(i, p, 30, sampling) for i, p in enumerate(prompts)])
    )
    for i, prompt in enumerate(prompts):
        assert found[i] == alone(model, prompt, 30, repetition_penalty=penalty)
        assert found[i] != alone(model, prompt, 30)


def test_logprobs_are_those_of_a_pass_over_the_whole_text(make_model: MakeModel) -> None:
    """Of the model's own distribution, whatever the temperature."""
    model = make_model("gpt2")
    requests = [
        DecodeRequest(0, [5, 6, 7], 6, Sampling(logprobs=3)),
        DecodeRequest(1, [8], 9, Sampling(temperature=0.7, top_p=0.9, seed=3, logprobs=0)),
        DecodeRequest(2, [9, 9], 5),
    ]
    events = run(decoder(model), requests)
    for request in requests:
        own = [event for event in events if event.request_id == request.request_id]
        ids = [*request.prompt, *(event.token_id for event in own)]
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        for k, event in enumerate(own):
            here, n = log_p[len(request.prompt) - 1 + k], request.sampling.logprobs
            if n is None:
                assert event.logprob is None
                assert event.top_logprobs == ()
                continue
            assert event.logprob == pytest.approx(float(here[event.token_id]), abs=1e-5)
            top = torch.topk(here, n)
            assert [token for token, _ in event.top_logprobs] == top.indices.tolist()
            values = [value for _, value in event.top_logprobs]
            assert values == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_prompts_own_tokens_have_the_probabilities_of_a_pass_over_it(
    model_type: str, make_model: MakeModel
) -> None:
    """Shared beginnings, a prompt twice, stretches of 17 nodes, texts beside them that want none.

    A prompt that fills the whole context can be scored, too.
    """
    model = make_model(model_type)
    prompts = [*make_prompts(), list(range(256))]
    wanted = [3, 0, None, 2, 5, 1, 0, 4, None, 2]
    requests = [
        DecodeRequest(i, prompt, 1 if len(prompt) == 256 else 3, prompt_logprobs=n)
        for i, (prompt, n) in enumerate(zip(prompts, wanted, strict=True))
    ]
    events = run(decoder(model, prefill_tokens=17), requests)
    first: dict[int, Event] = {}
    for event in events:
        assert first.setdefault(event.request_id, event) is event or not event.prompt
    for i, (prompt, n) in enumerate(zip(prompts, wanted, strict=True)):
        scored = first[i].prompt
        if n is None:
            assert scored == ()
            continue
        assert [choice.token_id for choice in scored] == prompt
        assert (scored[0].logprob, scored[0].top_logprobs) == (None, ())
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
        for t, choice in enumerate(scored[1:]):
            assert choice.logprob == pytest.approx(float(log_p[t, prompt[t + 1]]), abs=2e-5)
            best = torch.topk(log_p[t], n).values.tolist()
            assert [value for _, value in choice.top_logprobs] == pytest.approx(best, abs=2e-5)
            assert all(
                float(log_p[t, k]) == pytest.approx(v, abs=2e-5) for k, v in choice.top_logprobs
            )

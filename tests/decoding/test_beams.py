"""Beam search against `generate` of transformers, one prompt at a time."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.adapters import attach, randomise
from tests.support.decoding import EOS, N_TOKENS, SHAPES, alone, make_prompts
from tests.support.models import MakeModel

from swlora.config import AdapterSpec
from swlora.decoding.beam_cache import BeamCache
from swlora.decoding.beams import BeamDecoder, BeamSettings
from swlora.errors import UserError


def talkative(model: Any, boost: float = 1.6) -> Any:
    """Make the end of sequence likely enough that beams end at different lengths."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    head.weight[EOS] *= boost
    return model


def searched(
    model: Any, prompts: Sequence[Sequence[int]], beams: BeamSettings, max_prompts: int = 3
) -> dict[int, list[int]]:
    """The texts of prompts that come two at a time, whenever there is room."""
    decoder = BeamDecoder(model, beams, eos_token_ids=[EOS], max_prompts=max_prompts)
    waiting, found = list(range(len(prompts))), []
    while waiting or decoder.n_free < max_prompts:
        new = [waiting.pop(0) for _ in range(min(2, len(waiting), decoder.n_free))]
        if new:
            found += decoder.admit({i: prompts[i] for i in new})
        found += decoder.step()
    assert len(found) == len(prompts)
    return dict(found)


def by_transformers(model: Any, prompt: Sequence[int], beams: BeamSettings) -> list[int]:
    penalty = {"length_penalty": beams.length_penalty} if beams.n_beams > 1 else {}
    return alone(
        model,
        list(prompt),
        beams.max_new_tokens,
        num_beams=beams.n_beams,
        no_repeat_ngram_size=beams.no_repeat_ngram_size,
        **penalty,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_those_of_transformers(shape: str, make_model: MakeModel) -> None:
    """Every family; prompts join and leave; texts end early, or at the limit."""
    model_type, changes = SHAPES[shape]
    model = talkative(make_model(model_type, **changes))
    prompts = make_prompts()
    beams = BeamSettings(4, 14, length_penalty=0.9, no_repeat_ngram_size=4)
    found = searched(model, prompts, beams)
    assert found == {i: by_transformers(model, p, beams) for i, p in enumerate(prompts)}
    assert len({tuple(text) for text in found.values()}) > 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_setting_and_any_company(make_model: Any, seed: int) -> None:
    rng = random.Random(seed)
    model = talkative(make_model("llama", seed=seed % 3), rng.choice((0.5, 1.5, 2.5)))
    alphabet = rng.choice((3, N_TOKENS))
    prompts = [
        [rng.randrange(alphabet) for _ in range(rng.choice((1, 2, 9, 33)))] for _ in range(5)
    ]
    n_beams = rng.choice((1, 2, 3, 7))
    penalty = rng.choice((0.0, 0.9, 1.0, 2.0, -1.0)) if n_beams > 1 else 1.0
    beams = BeamSettings(n_beams, rng.choice((1, 2, 25)), penalty, rng.choice((0, 1, 2, 3)))
    found = searched(model, prompts, beams, rng.choice((1, 2, 5)))
    assert found == {i: by_transformers(model, p, beams) for i, p in enumerate(prompts)}


def test_long_texts_take_the_columns_of_dead_beams(make_model: MakeModel) -> None:
    """200 tokens of 3 beams: a column for each would be 600, and few are alive."""
    model = make_model("llama", max_position_embeddings=400)
    beams = BeamSettings(3, 200)
    decoder = BeamDecoder(model, beams, eos_token_ids=[EOS], max_prompts=1)
    decoder.admit({0: [5, 6, 7]})
    found: list[tuple[int, list[int]]] = []
    while decoder.n_free == 0:
        found += decoder.step()
        n_columns = decoder._cache.n_columns
    assert found == [(0, by_transformers(model, [5, 6, 7], beams))]
    assert n_columns < 450


def test_a_beam_sees_its_prompt_and_its_ancestors() -> None:
    """Beams exchanged twice, a prompt that leaves: each token is seen along its own path."""
    cache = BeamCache(n_layers=1, n_beams=2)
    marks = iter(range(100, 200))

    def token(n: int) -> torch.Tensor:
        values = torch.tensor([[float(next(marks)) for _ in range(2)] for _ in range(n)])
        return values.view(n, 1, 2, 1)

    def seen(layout: Any, keys: torch.Tensor) -> list[list[list[float]]]:
        visible = layout.visible(None)
        return [
            [sorted(keys[n, 0, visible[n, b], 0].tolist()) for b in range(2)]
            for n in range(len(visible))
        ]

    cache.add(
        [
            torch.tensor([1.0, 2.0]).repeat(2, 1).view(1, 2, 1, 2, 1),
            torch.full((1, 2, 1, 1, 1), 9.0),
        ]
    )
    layout = cache.advance(torch.tensor([[0, 0], [0, 0]]))
    new = token(2)  # 100, 101; 102, 103
    keys, values = cache.update(new, new, 0)
    assert torch.equal(keys, values)
    assert seen(layout, keys) == [[[1, 2, 100], [1, 2, 101]], [[9, 102], [9, 103]]]
    layout = cache.advance(torch.tensor([[1, 0], [1, 1]]))
    keys, _ = cache.update(*[token(2)] * 2, 0)  # 104, 105; 106, 107
    assert seen(layout, keys) == [
        [[1, 2, 101, 104], [1, 2, 100, 105]],
        [[9, 103, 106], [9, 103, 107]],
    ]
    assert layout.visible(2).sum().item() == 4 * 2  # a window of two: itself and its parent
    cache.keep([1])
    layout = cache.advance(torch.tensor([[1, 0]]))
    keys, _ = cache.update(*[token(1)] * 2, 0)
    assert seen(layout, keys) == [[[9, 103, 107, 108], [9, 103, 106, 109]]]
    assert cache.lengths == [4]


def test_more_prompts_than_there_is_room_for_are_refused(make_model: MakeModel) -> None:
    beams = BeamSettings(2, 3)
    decoder = BeamDecoder(make_model("llama"), beams, eos_token_ids=[EOS], max_prompts=1)
    assert decoder.step() == []
    with pytest.raises(ValueError, match="more prompts"):
        decoder.admit({0: [1], 1: [2]})


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts(model_type: str, make_model: MakeModel) -> None:
    model, prompts = talkative(make_model(model_type)), make_prompts()[:4]
    beams = BeamSettings(3, 8)
    found = searched(model, prompts, beams)
    assert found == {i: by_transformers(model, p, beams) for i, p in enumerate(prompts)}


def test_an_adapter_and_two_ends_of_a_sequence(make_model: MakeModel) -> None:
    spec = AdapterSpec(rank=3)
    peft_model = attach(talkative(make_model("llama")), spec, [0, 2], seed=0).eval()
    base = alone(peft_model, [5, 6, 7], 9, num_beams=3)
    randomise(peft_model, 0.3)
    expected = alone(peft_model, [5, 6, 7], 9, num_beams=3, eos_token_id=[EOS, 9])
    assert expected != base
    decoder = BeamDecoder(peft_model, BeamSettings(3, 9), eos_token_ids=[EOS, 9], max_prompts=1)
    found = decoder.admit({4: [5, 6, 7]})
    while not found:
        found = decoder.step()
    assert found == [(4, [token for token in expected if token != 9])]


def test_a_long_prompt_that_is_done_leaves_no_columns_behind(make_model: MakeModel) -> None:
    model = make_model("llama", max_position_embeddings=500)
    prompts = [[k % 250 for k in range(450)], [5, 6, 7]]
    decoder = BeamDecoder(model, BeamSettings(2, 20), eos_token_ids=[EOS], max_prompts=2)
    found, n_columns = decoder.admit({0: prompts[0]}), []
    for n_steps in range(40):
        if n_steps == 15:
            found += decoder.admit({1: prompts[1]})
        found += decoder.step()
        n_columns.append(decoder._cache.n_columns)
    beams = BeamSettings(2, 20)
    assert dict(found) == {i: by_transformers(model, p, beams) for i, p in enumerate(prompts)}
    assert n_columns[16] > 450
    assert n_columns[-1] < 120


def test_a_vocabulary_just_large_enough(make_model: MakeModel) -> None:
    """Fewer tokens than candidates: what is left of the beams goes on."""
    model = make_model("llama", vocab_size=8, bos_token_id=1, eos_token_id=7, pad_token_id=7)
    for n_beams in (5, 7):
        settings = BeamSettings(n_beams, 6)
        decoder = BeamDecoder(model, settings, eos_token_ids=[7], max_prompts=1)
        found = decoder.admit({0: [3, 4]})
        while not found:
            found = decoder.step()
        ends = {"eos_token_id": 7, "pad_token_id": 7}
        expected = alone(model, [3, 4], 6, num_beams=n_beams, **ends)
        assert found == [(0, [token for token in expected if token != 7])]
    with pytest.raises(UserError, match="8 tokens are too few for 8 beams"):
        BeamDecoder(model, BeamSettings(8, 6), eos_token_ids=[7], max_prompts=1)

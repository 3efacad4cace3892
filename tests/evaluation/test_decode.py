"""Generation against the obvious loops: no cache, no padding, one prompt, one token at a time."""

import math

import pytest
import torch
from tests.support.adapters import attach, randomise
from tests.support.chat_templates import CHATML, chat_tokenizer
from tests.support.plain_peft import greedy

from swlora.config import AdapterSpec, DecodeSpec
from swlora.data.encode import encode_prompts
from swlora.data.examples import Example, Message
from swlora.decoding.batch import BatchDecoder
from swlora.errors import UserError
from swlora.evaluation.decode import (
    _by_batches,
    check_room,
    fitting_prompts,
    generate,
    generation_config,
)
from swlora.models.anatomy import Anatomy
from swlora.progress import Silent

EOS = 257
# Unequal lengths, out of order; one of a single token
PROMPTS = [list(b"name[A], food[x]"), list(b"z"), list(b"Some longer prompt here: "), list(b"ab")]


def decode(model, tokenizer, spec: DecodeSpec, prompts=PROMPTS, seed: int = 0) -> list[str]:
    return generate(model, tokenizer, prompts, spec, Silent(), end_token_ids=[EOS], seed=seed)


def log_p(model, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), dim=-1)


@pytest.fixture
def talkative(make_model):
    """A model that says the end of sequence sooner or later, not at once."""
    model = make_model("llama")
    Anatomy(model).head.weight[EOS] *= 1.6
    return model


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gpt_neox", "falcon"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_is_the_argmax_of_every_step(model_type, batch_size, make_model, tiny_tokenizer):
    """Company, places that are refilled, and the cache change nothing; nor does left padding,
    with which transformers runs families whose attention cannot be replaced.
    """
    model = make_model(model_type)
    spec = DecodeSpec(batch_size=batch_size, max_new_tokens=9)
    expected = [
        tiny_tokenizer.decode(greedy(model, p, 9), skip_special_tokens=True) for p in PROMPTS
    ]
    assert decode(model, tiny_tokenizer, spec) == expected
    assert len(set(expected)) > 1


def test_text_ends_before_the_end_of_sequence(talkative, tiny_tokenizer):
    """Rows of one batch end at different steps; what comes after an end is not text."""
    expected = [greedy(talkative, p, 40) for p in PROMPTS]
    assert len({len(ids) for ids in expected}) > 1
    assert any(len(ids) < 40 for ids in expected)
    texts = decode(talkative, tiny_tokenizer, DecodeSpec(max_new_tokens=40))
    assert texts == tiny_tokenizer.batch_decode(expected, skip_special_tokens=True)


def beam_search(model, prompt: list[int], n: int, n_beams: int, penalty: float) -> list[int]:
    """Keep the n_beams likeliest unfinished texts; score finished ones by log p / length^penalty.

    A text that ends among the first n_beams of 2 * n_beams continuations is finished.
    """
    beams, finished = [(0.0, list(prompt))], []
    for step in range(n):
        grown = [
            (total + float(p), [*ids, token])
            for total, ids in beams
            for token, p in enumerate(log_p(model, ids))
        ]
        grown = sorted(grown, key=lambda entry: -entry[0])[: 2 * n_beams]
        length = (step + 1) ** penalty
        finished += [(t / length, ids) for t, ids in grown[:n_beams] if ids[-1] == EOS]
        finished = sorted(finished, key=lambda entry: -entry[0])[:n_beams]
        beams = [(t, ids) for t, ids in grown if ids[-1] != EOS][:n_beams]
        if len(finished) == n_beams and finished[-1][0] >= beams[0][0] / length:
            break
    else:
        finished += [(t / n**penalty, ids) for t, ids in beams]
    best = max(finished, key=lambda entry: entry[0])[1][len(prompt) :]
    return [token for token in best if token != EOS]


@pytest.mark.parametrize("penalty", [0.9, 2.0, -1.0])
def test_beam_search_is_that_of_the_definition(penalty, talkative, tiny_tokenizer):
    spec = DecodeSpec(num_beams=3, length_penalty=penalty, max_new_tokens=8, batch_size=7)
    expected = [beam_search(talkative, p, 8, 3, penalty) for p in PROMPTS]
    texts = decode(talkative, tiny_tokenizer, spec)
    assert texts == tiny_tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert texts != decode(talkative, tiny_tokenizer, DecodeSpec(max_new_tokens=8))


def test_no_ngram_comes_twice(make_model, tiny_tokenizer):
    model = make_model("gpt2", initializer_range=1.0)
    free = generate_ids(model, tiny_tokenizer, DecodeSpec(max_new_tokens=60))
    held = generate_ids(
        model, tiny_tokenizer, DecodeSpec(max_new_tokens=60, no_repeat_ngram_size=2)
    )
    assert any(has_repeat(ids, 2) for ids in free)
    assert not any(has_repeat(ids, 2) for ids in held)


def generate_ids(model, tokenizer, spec: DecodeSpec) -> list[list[int]]:
    """Byte ids of what is generated: exact, where text would hide broken UTF-8."""
    config = generation_config(spec, [EOS])
    return [
        model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist()
        for p in PROMPTS
    ]


def has_repeat(ids: list[int], n: int) -> bool:
    grams = [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]
    return len(set(grams)) < len(grams)


def test_sampling_depends_on_the_seed_alone(make_model, tiny_tokenizer):
    model = make_model("llama")
    spec = DecodeSpec(temperature=1.0, max_new_tokens=12)
    torch.manual_seed(1)
    first = decode(model, tiny_tokenizer, spec, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert decode(model, tiny_tokenizer, spec, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert decode(model, tiny_tokenizer, spec, seed=4) != first
    assert decode(model, tiny_tokenizer, DecodeSpec(max_new_tokens=12), seed=3) != first


@pytest.mark.parametrize(("model_type", "ngrams"), [("llama", 0), ("llama", 2), ("falcon", 0)])
def test_a_sampled_text_does_not_depend_on_its_company(
    model_type, ngrams, make_model, tiny_tokenizer
):
    """Nor where `generate` of transformers makes it."""
    model = make_model(model_type, initializer_range=0.1)
    settings = {"temperature": 1.0, "top_p": 0.9, "no_repeat_ngram_size": ngrams}
    specs = [DecodeSpec(max_new_tokens=12, batch_size=n, **settings) for n in (1, 3, 64)]
    prompts = [*PROMPTS, PROMPTS[0]]
    texts = [decode(model, tiny_tokenizer, spec, prompts) for spec in specs]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][-1]
    few = generate(
        model, tiny_tokenizer, prompts, specs[1], Silent(), end_token_ids=[EOS], only=[4, 1]
    )
    assert few == ["", texts[0][1], "", "", texts[0][4]]


class Counter(Silent):
    """Notes every advance."""

    def __init__(self) -> None:
        self.advances: list[float] = []

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        self.advances.append(amount)


@pytest.mark.parametrize("ngrams", [0, 3])
def test_progress_is_told_of_every_prompt(ngrams, make_model, tiny_tokenizer):
    counter, prompts = Counter(), PROMPTS * 5
    spec = DecodeSpec(max_new_tokens=3, batch_size=4, no_repeat_ngram_size=ngrams)
    texts = generate(
        make_model("gpt2"), tiny_tokenizer, prompts, spec, counter, end_token_ids=[EOS]
    )
    assert counter.advances == [1.0] * 20
    assert texts == texts[:4] * 5


def test_freed_places_are_filled_again(talkative, tiny_tokenizer, monkeypatch):
    n_at_once = []
    step = BatchDecoder.step

    def counting(self):
        n_at_once.append(self.n_requests)
        return step(self)

    monkeypatch.setattr(BatchDecoder, "step", counting)
    prompts = [[*prompt, k] for k in range(10) for prompt in PROMPTS]
    decode(talkative, tiny_tokenizer, DecodeSpec(max_new_tokens=40, batch_size=16), prompts)
    assert max(n_at_once) == 16
    lengths = [len(greedy(talkative, prompt, 40)) + 1 for prompt in prompts]
    assert len(n_at_once) < sum(max(lengths[k : k + 16]) for k in range(0, len(prompts), 16))


def test_sampling_follows_temperature_and_top_p(make_model, tiny_tokenizer):
    """One token, 4,000 times: its frequencies are softmax(logits / T), cut at top_p."""
    model = make_model("llama", initializer_range=0.35)
    temperature, top_p, n = 1.5, 0.6, 4000
    p = torch.softmax(log_p(model, PROMPTS[0]) / temperature, dim=-1).double()
    ordered, tokens = p.sort(descending=True)
    kept = tokens[: int((ordered.cumsum(0) < top_p).sum()) + 1].tolist()
    assert 3 < len(kept) < 200
    spec = DecodeSpec(temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=n)
    made = _by_batches(model, frozenset([EOS]), dict.fromkeys(range(n), PROMPTS[0]), spec, 0)
    found = torch.tensor([(*token_ids, EOS)[0] for _, token_ids in made])
    counts = torch.bincount(found, minlength=264).double()
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    expected = torch.zeros(264, dtype=torch.double)
    expected[kept] = p[kept] / p[kept].sum()
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
    assert float(chi2) < len(kept) + 5 * math.sqrt(2 * len(kept))  # mean + 5 standard deviations


def test_an_adapter_changes_the_text(make_model, tiny_tokenizer):
    peft_model = attach(make_model("llama"), AdapterSpec(rank=3), [1], seed=0)
    spec = DecodeSpec(max_new_tokens=9)
    base = decode(make_model("llama"), tiny_tokenizer, spec)
    assert decode(peft_model.eval(), tiny_tokenizer, spec) == base
    randomise(peft_model, 1.0)
    texts = decode(peft_model, tiny_tokenizer, spec)
    assert texts != base
    expected = [greedy(peft_model, p, 9) for p in PROMPTS]
    assert texts == tiny_tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_the_context_must_have_room(make_model, tiny_tokenizer):
    model = make_model("gpt2")
    prompts = [[5] * 3, [5] * 250]
    assert len(decode(model, tiny_tokenizer, DecodeSpec(max_new_tokens=6), prompts)) == 2
    spec = DecodeSpec(max_new_tokens=7)
    for attempt in (
        lambda: decode(model, tiny_tokenizer, spec, prompts),
        lambda: check_room(model, prompts, spec),
    ):
        with pytest.raises(UserError, match=r"250 tokens and 7 new ones exceed .* context of 256"):
            attempt()


def test_a_long_chat_leaves_room_for_its_answer_without_its_oldest_turns(make_model):
    """As in training, and not without its middle, where words of the template stand."""
    model, tokenizer = make_model("llama"), chat_tokenizer(CHATML)
    turns = [Message(role, f"turn {i}") for i in range(9) for role in ("user", "assistant")]
    spec = DecodeSpec(max_new_tokens=100)
    arguments = (model, tokenizer, [Example.chat(turns)], "", spec)
    (found,) = fitting_prompts(*arguments, truncate=True)
    longest = max(
        (encode_prompts([Example.chat(turns[i:])], "", tokenizer)[0] for i in range(0, 18, 2)),
        key=lambda ids: len(ids) if len(ids) <= 156 else 0,
    )
    assert found == longest and len(found) > 80
    with pytest.raises(UserError, match="context of 256"):
        fitting_prompts(*arguments, truncate=False)

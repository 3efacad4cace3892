"""The dose curve and the texts beside each other, against plain passes and plain decoding."""

import pytest
import torch
from tests.support.plain_peft import greedy as plain_greedy

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import scaled, text_loss, zeroed
from swlora.superweights.effects import DOSES, dose_curve, dose_texts, generations, repeats_after
from swlora.superweights.meter import Meter

EOS = 257

PROMPTS = ["Apple Inc.", "ä"]


def planted(model) -> WeightAddress:
    address = WeightAddress(1, Anatomy(model).family.mlp_out, 5, 7)
    Anatomy(model).weight_view(address).fill_(60.0)
    return address


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_doses_are_plain_passes_with_the_weight_scaled(model_type, make_model, weights_sha256):
    model = make_model(model_type)
    address, windows = planted(model), torch.arange(200).view(2, 100)
    before, base = weights_sha256(model), text_loss(model, windows).perplexity
    doses = dose_curve(Meter(model, windows), address)
    assert [d.scale for d in doses] == list(DOSES) == sorted({*DOSES, 0, 1, 2})
    for dose in doses:
        with scaled(Anatomy(model), {address: dose.scale}):
            expected = text_loss(model, windows).perplexity
        assert dose.perplexity == pytest.approx(expected, rel=1e-5)
        assert dose.ratio == pytest.approx(expected / base, rel=1e-5)
    assert doses[6].ratio == 1
    assert doses[0].ratio != pytest.approx(1, rel=1e-3)
    assert weights_sha256(model) == before


def greedy(model, tokenizer, prompt: str, n: int) -> str:
    ids = list(prompt.encode())
    for _ in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt.encode()) :], skip_special_tokens=True)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_texts_are_greedy_continuations(model_type, make_model, tiny_tokenizer, weights_sha256):
    model = make_model(model_type)
    address = planted(model)
    before = weights_sha256(model)
    found = generations(
        model, tiny_tokenizer, PROMPTS, [address], end_token_ids=[EOS], max_new_tokens=9
    )
    assert [g.prompt for g in found] == PROMPTS
    assert [g.before for g in found] == [greedy(model, tiny_tokenizer, p, 9) for p in PROMPTS]
    with zeroed(Anatomy(model), [address]):
        assert [g.after for g in found] == [greedy(model, tiny_tokenizer, p, 9) for p in PROMPTS]
    assert found[0].before != found[0].after
    assert weights_sha256(model) == before


def test_what_cannot_be_shown(make_model, tiny_tokenizer):
    model = make_model("llama")
    address = planted(model)
    with pytest.raises(UserError, match="at least one scale"):
        dose_curve(Meter(model, torch.arange(40).view(2, 20)), address, [])
    with pytest.raises(UserError, match="layer 3 does not exist"):
        dose_curve(
            Meter(model, torch.arange(40).view(2, 20)), WeightAddress(3, "mlp.down_proj", 0, 0)
        )
    with pytest.raises(UserError, match="no prompt"):
        generations(model, tiny_tokenizer, [], [address], end_token_ids=[EOS])
    with pytest.raises(UserError, match="no weight was named"):
        generations(model, tiny_tokenizer, PROMPTS, [], end_token_ids=[EOS])
    for prompt in ("", "x" * 233):
        with pytest.raises(UserError, match=rf"has {len(prompt)} tokens.* 24 new .* 1 to 232"):
            generations(model, tiny_tokenizer, [prompt], [address], end_token_ids=[EOS])
    assert len(generations(model, tiny_tokenizer, ["x" * 232], [address], end_token_ids=[EOS])) == 1


def test_texts_at_every_dose_beside_the_model_as_it_is(make_model, tiny_tokenizer, weights_sha256):
    model = make_model("llama")
    address = planted(model)
    before, scales = weights_sha256(model), (0.0, 0.5, 1.0, 2.0)
    found = dose_texts(
        model,
        tiny_tokenizer,
        PROMPTS,
        address,
        scales,
        end_token_ids=[EOS],
        max_new_tokens=9,
    )
    assert weights_sha256(model) == before
    assert [(t.prompt, t.scale) for t in found] == [(p, s) for p in PROMPTS for s in scales]
    for t in found:
        ids = list(t.prompt.encode())
        intact = plain_greedy(model, ids, 9)
        with scaled(Anatomy(model), {address: t.scale}):
            own = plain_greedy(model, ids, 9)
        same = 0
        while same < min(len(own), len(intact)) and own[same] == intact[same]:
            same += 1
        assert (t.text, t.n_tokens) == (tiny_tokenizer.decode(own), len(own))
        assert (t.same_tokens, t.repeats_after) == (same, repeats_after(own))
    assert any(t.same_tokens < t.n_tokens for t in found)
    with pytest.raises(UserError, match="scale 1"):
        dose_texts(model, tiny_tokenizer, PROMPTS, address, (0.0, 2.0), end_token_ids=[EOS])


@pytest.mark.parametrize(
    ("token_ids", "after"),
    [
        ([], None),
        ([1, 2, 3, 4, 5, 6], None),
        ([1, 2, 3, 4, 1, 2, 3], None),
        ([1, 2, 3, 4, 1, 2, 3, 4], 8),
        ([9, 1, 2, 3, 4, 8, 1, 2, 3, 4, 1, 2], 10),
        ([7, 7, 7, 7], None),
        ([7, 7, 7, 7, 7], 5),
    ],
)
def test_a_text_repeats_itself_when_four_tokens_come_again(token_ids, after):
    assert repeats_after(token_ids) == after

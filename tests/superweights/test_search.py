"""The search: planted super weights, also hidden ones; agreement; the model stays as it was."""

import copy
import hashlib
import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from tests.support.traces import trace_prompt
from torch import nn

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.detect import trace
from swlora.superweights.search import MASSIVE_RATIO, PROMPTS, removal_layers, search

BOS = 256
PLANTED = [
    ("llama", WeightAddress(1, "mlp.down_proj", 17, 33)),
    ("phi3", WeightAddress(0, "mlp.down_proj", 8, 2)),
    ("llama", WeightAddress(0, "self_attn.o_proj", 3, 29)),
    ("opt", WeightAddress(0, "fc2", 23, 39)),
    ("gpt_neox", WeightAddress(1, "mlp.dense_4h_to_h", 5, 38)),
    ("gpt2", WeightAddress(1, "mlp.c_proj", 17, 33)),
    ("gpt2", WeightAddress(0, "attn.c_proj", 3, 21)),
    ("mixtral", WeightAddress(1, "mlp.experts.3.down_proj", 17, 33)),
    ("qwen3_moe", WeightAddress(1, "mlp.down_proj", 17, 33)),
]


def plant(model: nn.Module, values: dict[WeightAddress, float]) -> nn.Module:
    for address, value in values.items():
        Anatomy(model).weight_view(address).fill_(value)
    return model


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def without_bos(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    return other


@pytest.mark.parametrize(("model_type", "address"), PLANTED)
def test_a_planted_super_weight_is_found(model_type, address, make_model, tiny_tokenizer):
    model = plant(make_model(model_type), {address: 900.0})
    before = weights_sha256(model)
    found = search(model, tiny_tokenizer, max_candidates=5)
    assert weights_sha256(model) == before and n_hooks(model) == 0
    assert found.outcome == "suppressed"
    assert [r.address for r in found.rounds] == [address]
    best = found.candidates[0]
    assert (best.candidate.address, best.round, best.n_settings) == (address, 0, 6)
    assert best.candidate.weight == 900.0
    assert found.rounds[0].n_settings == 6
    assert len(found.candidates) == 5
    assert all(finding.round is None for finding in found.candidates[1:])
    for setting, ratio in zip(found.settings, found.rounds[0].ratios, strict=True):
        assert setting.activation.layer == address.layer
        assert setting.activation.channel == address.out_channel
        assert setting.is_massive and setting.activation.ratio > 100 > 20 > ratio


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2", "mixtral"])
def test_a_model_without_one(model_type, make_model, tiny_tokenizer):
    found = search(make_model(model_type, seed=5), tiny_tokenizer, max_candidates=6)
    assert found.outcome == "nothing massive"
    assert found.rounds == [] and found.removal_layers == []
    assert not any(setting.is_massive for setting in found.settings)
    assert len(found.candidates) == 6  # the proof has something to refuse all the same
    sizes = [finding.mean_contribution for finding in found.candidates]
    assert sizes == sorted(sizes, reverse=True)


SECOND = {
    "same channel, another input": WeightAddress(1, "mlp.c_proj", 17, 8),
    "another channel, same input": WeightAddress(1, "mlp.c_proj", 4, 33),
    "another channel, another input": WeightAddress(1, "mlp.c_proj", 4, 8),
}


@pytest.mark.parametrize("case", SECOND)
def test_the_larger_hides_the_smaller(case, make_model, tiny_tokenizer):
    first, second = WeightAddress(1, "mlp.c_proj", 17, 33), SECOND[case]
    model = plant(make_model("gpt2"), {first: 3000.0, second: 1000.0})
    # With one prompt: over several, an input may be larger than the other for some
    one = trace_prompt(model, tiny_tokenizer, PROMPTS[0])
    assert second not in [c.address for c in one.candidates]
    before = weights_sha256(model)
    found = search(model, without_bos(tiny_tokenizer), PROMPTS[:1], max_candidates=8)
    assert weights_sha256(model) == before
    assert [r.address for r in found.rounds] == [first, second]
    assert [f.candidate.address for f in found.candidates[:2]] == [first, second]
    assert [f.round for f in found.candidates[:3]] == [0, 1, None]
    assert found.outcome == "suppressed"
    assert found.rounds[0].ratios[0] > MASSIVE_RATIO > found.rounds[1].ratios[0]


def test_super_weights_of_two_layers(make_model, tiny_tokenizer):
    first = WeightAddress(1, "mlp.down_proj", 17, 33)
    second = WeightAddress(0, "mlp.down_proj", 4, 8)
    model = plant(make_model("llama"), {first: 4000.0, second: 800.0})
    found = search(model, tiny_tokenizer, max_candidates=4)
    assert {r.address for r in found.rounds} == {first, second}
    assert found.outcome == "suppressed"


def test_rounds_used_up(make_model, tiny_tokenizer):
    first, second = WeightAddress(1, "mlp.c_proj", 17, 33), WeightAddress(1, "mlp.c_proj", 4, 8)
    model = plant(make_model("gpt2"), {first: 3000.0, second: 1000.0})
    found = search(model, tiny_tokenizer, max_candidates=8, max_rounds=1)
    assert (found.outcome, len(found.rounds)) == ("rounds used up", 1)


def test_a_massive_activation_that_no_single_weight_makes(make_model, tiny_tokenizer):
    model = make_model("llama")
    model.get_input_embeddings().weight[:, 5] = 900.0
    found = search(model, tiny_tokenizer, max_candidates=8)
    assert (found.outcome, found.rounds) == ("no single weight", [])
    assert found.settings[0].is_massive and found.settings[0].activation.channel == 5


def test_agreement_is_what_single_scans_say(make_model, tiny_tokenizer):
    """No round here, so each setting is one scan; count and average by hand."""
    model = make_model("llama", seed=2)
    found = search(model, tiny_tokenizer, max_candidates=99)
    assert found.rounds == []
    counts: Counter[WeightAddress] = Counter()
    sums: Counter[WeightAddress] = Counter()
    largest: dict[WeightAddress, float] = {}
    for prompt in PROMPTS:
        for ids in (list(prompt.encode()), [BOS, *prompt.encode()]):
            for c in trace(Anatomy(model), [ids])[0].candidates:
                counts[c.address] += 1
                sums[c.address] += abs(c.contribution)
                largest[c.address] = max(largest.get(c.address, 0), abs(c.contribution))
    assert {f.candidate.address: f.n_settings for f in found.candidates} == counts
    assert len(set(counts.values())) > 2
    for f in found.candidates:
        assert f.mean_contribution == pytest.approx(sums[f.candidate.address] / 6, rel=1e-3)
        expected = pytest.approx(largest[f.candidate.address], rel=1e-3)
        assert abs(f.candidate.contribution) == expected


def test_the_candidates_are_cut_after_the_sorting(make_model, tiny_tokenizer):
    model = plant(make_model("llama"), {WeightAddress(1, "mlp.down_proj", 17, 33): 300.0})
    everything = search(model, tiny_tokenizer, max_candidates=99).candidates
    assert len(everything) > 6
    assert search(model, tiny_tokenizer, max_candidates=3).candidates == everything[:3]
    assert len({f.candidate.address for f in everything}) == len(everything)


@pytest.mark.parametrize("says_so", [False, True])
def test_bos_is_read_off_the_ids(says_so, make_model, tiny_tokenizer, bos_tokenizer):
    model = make_model("llama")
    bare = search(model, tiny_tokenizer, PROMPTS[:2], max_candidates=3)
    own = search(model, bos_tokenizer(says_so=says_so), PROMPTS[:2], max_candidates=3)
    assert [s.has_bos for s in bare.settings] == [False, True, False, True]
    assert [s.has_bos for s in own.settings] == [True, False, True, False]
    for setting in (*bare.settings, *own.settings):
        n_bytes = len(setting.prompt.encode())
        assert len(setting.tokens) == n_bytes + setting.has_bos
        assert (setting.tokens[0] == "<s>") == setting.has_bos
    by_name = [{(s.prompt, s.has_bos): s for s in found.settings} for found in (bare, own)]
    assert by_name[0] == by_name[1]
    # The first setting, which figures show, is the tokenizer's own way
    for found, tokenizer in ((bare, tiny_tokenizer), (own, bos_tokenizer(says_so=True))):
        ids = tokenizer(PROMPTS[0]).input_ids
        assert found.scan.tokens == tokenizer.convert_ids_to_tokens(ids)
        assert found.scan.prompt == PROMPTS[0]
        every = [c.address for c in trace_prompt(model, tokenizer, PROMPTS[0]).candidates]
        assert [c.address for c in found.scan.candidates] == every[:3] != every
        assert found.path == found.settings[0].path


def test_a_tokenizer_without_bos_and_a_prompt_given_twice(make_model, tiny_tokenizer):
    prompts = ["Hello", "Hello", "So?"]
    found = search(make_model("gpt2"), without_bos(tiny_tokenizer), prompts, max_candidates=3)
    assert [(s.prompt, s.has_bos) for s in found.settings] == [("Hello", False), ("So?", False)]


def test_only_with_bos_is_there_a_super_activation(make_model, tiny_tokenizer):
    """An input that only BOS excites: agreement says in how many settings."""
    model = make_model("llama")
    address = WeightAddress(0, "mlp.down_proj", 17, 33)
    plant(model, {address: 3000.0})
    block = Anatomy(model).blocks[0].mlp
    model.get_input_embeddings().weight[:, 11] = 0.0
    model.get_input_embeddings().weight[BOS, 11] = 40.0
    for projection in (block.gate_proj, block.up_proj):
        projection.weight[33] = 0.0
        projection.weight[33, 11] = 1.0
    attention = Anatomy(model).blocks[0].self_attn.o_proj
    attention.weight[11] = 0.0  # nobody else hears of channel 11
    found = search(model, tiny_tokenizer, max_candidates=3)
    assert [s.is_massive for s in found.settings] == [False, True] * 3
    assert (found.rounds[0].address, found.rounds[0].n_settings) == (address, 3)
    assert (found.candidates[0].candidate.address, found.outcome) == (address, "suppressed")
    assert found.path == found.settings[0].path and found.removal_layers == []


def test_a_remover_is_no_super_weight(make_model, tiny_tokenizer):
    """Layer 2 takes away what layer 0 made. Without layer 0, its weight is a spike of its own."""
    model = make_model("llama", num_hidden_layers=4)
    first = WeightAddress(0, "mlp.down_proj", 17, 33)
    plant(model, {first: 4000.0})
    anatomy = Anatomy(model)
    ids = list(b"S")
    alone = search(model, without_bos(tiny_tokenizer), ["S"], max_candidates=3)
    value = alone.path[1]
    inputs = {}
    hook = anatomy.blocks[2].mlp.down_proj.register_forward_hook(
        lambda _m, x, _y: inputs.update(x=x[0][0, 0])
    )
    anatomy.backbone(input_ids=torch.tensor([ids]))
    hook.remove()
    k = int(inputs["x"].abs().argmax())
    remover = WeightAddress(2, "mlp.down_proj", 17, k)
    plant(model, {remover: -value / float(inputs["x"][k])})
    found = search(model, without_bos(tiny_tokenizer), ["S"], max_candidates=4)
    assert found.removal_layers == [2]
    assert [r.address for r in found.rounds] == [first]
    assert found.outcome == "suppressed"
    late = next(f for f in found.candidates if f.candidate.address == remover)
    assert late.candidate.persistence == 0 and late.round is None
    assert found.path[:2] == pytest.approx([value, value], rel=0.05)
    assert abs(found.path[2]) < 0.1 * abs(value)
    assert abs(found.rounds[0].path[0]) < 0.01 * abs(value)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("n_calls", [0, 1, 2])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_an_error_in_any_round_leaves_the_model_whole(
    model_type, n_calls, error, make_model, tiny_tokenizer, monkeypatch
):
    name = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}.get(
        model_type, "mlp.experts.3.down_proj"
    )
    first, second = WeightAddress(1, name, 17, 33), WeightAddress(1, name, 17, 8)
    model = plant(make_model(model_type), {first: 9000.0, second: 4000.0})
    before = weights_sha256(model)
    norm = Anatomy(model).final_norm
    forward, states = norm.forward, []

    def fail(x: torch.Tensor) -> torch.Tensor:
        states.append(weights_sha256(model))
        if len(states) > n_calls:
            raise error
        return forward(x)

    monkeypatch.setattr(norm, "forward", fail)
    with pytest.raises(error):
        search(model, tiny_tokenizer, max_candidates=3)
    assert len(set(states)) == n_calls + 1  # the error came while weights were at zero
    assert weights_sha256(model) == before
    assert n_hooks(model) == 0


def test_a_hundred_searches_leave_the_weights_bit_for_bit(make_model, tiny_tokenizer):
    first, second = WeightAddress(1, "mlp.c_proj", 17, 33), WeightAddress(1, "mlp.c_proj", 4, 8)
    model = plant(make_model("gpt2"), {first: 3000.0, second: 1000.0})
    before = weights_sha256(model)
    results = [
        search(model, without_bos(tiny_tokenizer), ["So?"], max_candidates=2) for _ in range(100)
    ]
    assert all(result.rounds for result in results)
    assert weights_sha256(model) == before and n_hooks(model) == 0


def test_the_result_is_plain_json(make_model, tiny_tokenizer):
    model = plant(make_model("mixtral"), {WeightAddress(1, "mlp.experts.3.down_proj", 7, 3): 300.0})
    found = asdict(search(model, tiny_tokenizer, max_candidates=3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["candidates"][0]["candidate"]["address"]["module"] == "mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        ([], {}, "at least one prompt"),
        (["So?", ""], {}, "no tokens"),
        (["x" * 257], {}, "more tokens than"),
        (["So?"], {"max_candidates": 0}, "at least one candidate"),
        (["So?"], {"max_rounds": 0}, "at least one candidate and one round"),
    ],
)
def test_what_cannot_be_searched(prompts, changes, said, make_model, tiny_tokenizer):
    with pytest.raises(UserError, match=said):
        search(make_model("gpt2"), tiny_tokenizer, prompts, **{"max_candidates": 3} | changes)


# Measured on SmolLM2-135M-Instruct at channel 507 of the first token, "Apple Inc. ..."
SMOLLM2 = [20, 230, 723, 721, 716, 710, 703, 692, 579, 78, 31, 24058, 24049, 24036, 24023, 24007]
SMOLLM2 += [23991, 23976, 23967, 23960, 23960, 23969, 23962, 23965, 23928, 23930, 23924, 23673]
SMOLLM2 += [9401, 3730]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (SMOLLM2, [28, 29]),
        ([-value for value in SMOLLM2], [28, 29]),
        # As Llama-7B's: kept for long, then cancelled by a little more than all of it
        ([0, 0, 1320, 1340, 1350, 1360, 1336, -114], [7]),
        # As GPT-2's is described: grows on the way, gone in the last layer
        ([50, 400, 2480, 2660, 2800, 2900, 2970, 3000, 3020, 3040, 2900, 300], [11]),
        ([0, 100, 100, 100], []),
        ([0, 100, 81, 62, 43], []),  # a fade is no removal
        ([0, 100, 80, 60, 40], [2, 3, 4]),  # a fifth each
        ([0, 60, 10, 100, 100, 0], [5]),  # what went before the largest value does not count
        ([0, 100, -300, 250, 0], [3]),  # the largest is -300; 250 is another sign's
        ([0, 100, -50, -100], [2]),
        ([100], []),
        ([0, 0, 0], []),
    ],
)
def test_removal_layers(path, expected):
    assert removal_layers(path) == expected


@pytest.mark.slow
def test_the_builtin_model(builtin_dir):
    from swlora.models.load import load_model

    loaded = load_model(ModelSpec(name=str(builtin_dir)), dtype="float32")
    before = weights_sha256(loaded.model)
    found = search(loaded.model, loaded.tokenizer, max_candidates=8)
    assert weights_sha256(loaded.model) == before
    best = found.candidates[0]
    assert best.candidate.address == WeightAddress(11, "mlp.down_proj", 507, 1229)
    assert (best.n_settings, found.outcome) == (6, "suppressed")
    assert best.candidate.persistence > 0.9
    assert all(s.removal_layers == [28, 29] for s in found.settings)
    late = [f for f in found.candidates if f.candidate.address.layer in (28, 29)]
    assert {f.candidate.address.layer for f in late} == {28, 29}
    assert all(f.candidate.persistence == 0 and f.round is None for f in late)
    assert {r.address.layer for r in found.rounds} == {11}

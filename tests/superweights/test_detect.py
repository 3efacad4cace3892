"""Detection: a planted super weight is found at its exact address; the model stays as it was."""

import hashlib
import math
from collections import defaultdict

import pytest
import torch
from tests.support.traces import trace_prompt
from torch import nn

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, bias_out, weight_out_in
from swlora.superweights.detect import Candidate, persistence, trace

PROMPT = "Apple Inc. is a worldwide tech company."

# Linear, gated and plain, Conv1D, and slices of experts; MLP output and attention output
PLANTED = [
    ("llama", WeightAddress(1, "mlp.down_proj", 17, 33)),
    ("llama", WeightAddress(2, "self_attn.o_proj", 3, 29)),
    ("phi3", WeightAddress(0, "mlp.down_proj", 8, 2)),
    ("opt", WeightAddress(0, "fc2", 23, 39)),
    ("gpt_neox", WeightAddress(1, "mlp.dense_4h_to_h", 5, 38)),
    ("gpt2", WeightAddress(1, "mlp.c_proj", 17, 33)),
    ("gpt2", WeightAddress(2, "attn.c_proj", 3, 21)),
    ("mixtral", WeightAddress(1, "mlp.experts.3.down_proj", 17, 33)),
    ("mixtral", WeightAddress(0, "self_attn.o_proj", 3, 29)),
    ("olmoe", WeightAddress(0, "mlp.experts.4.down_proj", 2, 7)),
    ("qwen3_moe", WeightAddress(0, "mlp.experts.0.down_proj", 23, 27)),
    ("qwen3_moe", WeightAddress(1, "mlp.down_proj", 17, 33)),  # a plain block between experts
]


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def with_biases(model: nn.Module) -> nn.Module:
    """Fresh models have zero biases, which no share could be told by."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize(("model_type", "address"), PLANTED)
def test_a_planted_super_weight_is_found(model_type, address, make_model, tiny_tokenizer):
    model = make_model(model_type)
    twin = trace_prompt(model, tiny_tokenizer, PROMPT)
    Anatomy(model).weight_view(address).fill_(50.0)
    found = trace_prompt(model, tiny_tokenizer, PROMPT)
    best, second = found.candidates[:2]
    assert best.address == address
    assert best.weight == 50.0
    assert best.contribution_share == pytest.approx(1, abs=0.3)
    assert abs(best.weight * best.input_value) > 3 * abs(second.weight * second.input_value)
    assert address not in [c.address for c in twin.candidates[:1]]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "gpt_neox"])
def test_every_number_against_activations_kept_whole(model_type, make_model, tiny_tokenizer):
    model = with_biases(make_model(model_type))
    kept: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, nn.Module]] = {}
    anatomy = Anatomy(model)
    n_tokens = len(PROMPT.encode())
    for p in anatomy.all_projections():
        p.module.register_forward_hook(
            lambda m, x, y, p=p: kept.update(
                {(p.layer, p.name): (x[0].view(n_tokens, -1), y.view(n_tokens, -1), m)}
            )
        )
    found = trace_prompt(model, tiny_tokenizer, PROMPT)
    assert [(m.layer, m.module) for m in found.modules] == list(kept)
    for m in found.modules:
        for spike, activation in zip((m.input, m.output), kept[m.layer, m.module][:2], strict=True):
            assert spike.value == activation[spike.token, spike.channel]
            assert abs(spike.value) == activation.abs().max()
    assert len(found.candidates) == 6  # two output projections in each of three blocks
    for c in found.candidates:
        x, y, module = kept[c.address.layer, c.address.module]
        assert abs(c.output_value) == y.abs().max() == abs(y[c.token, c.address.out_channel])
        row = weight_out_in(module)[c.address.out_channel].tolist()
        fed = [w * value for w, value in zip(row, x[c.token].tolist(), strict=True)]
        bias = bias_out(module)
        own_bias = 0.0 if bias is None else float(bias[c.address.out_channel])
        assert math.fsum([*fed, own_bias]) == pytest.approx(c.output_value, rel=1e-4)
        k = max(range(len(fed)), key=lambda i: abs(fed[i]))
        assert (c.address.in_channel, c.weight, c.input_value) == (k, row[k], x[c.token, k])
        assert c.contribution == pytest.approx(fed[k], rel=1e-5)
        assert c.contribution_share == pytest.approx(abs(fed[k] / c.output_value), rel=1e-5)
        if bias is None:
            assert c.bias_share is None
        else:
            assert c.bias_share == pytest.approx(abs(own_bias / c.output_value), rel=1e-5) != 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_numbers_of_experts_token_by_token(model_type, make_model, tiny_tokenizer):
    model = make_model(model_type)
    anatomy = Anatomy(model)
    routed: dict[int, tuple[torch.Tensor, ...]] = {}
    for layer in range(3):
        if experts := anatomy.experts(layer):
            experts.register_forward_hook(lambda _m, x, _y, layer=layer: routed.update({layer: x}))
    found = trace_prompt(model, tiny_tokenizer, PROMPT)
    candidates = {c.address: c for c in found.candidates if "experts" in c.address.module}
    spikes = {(m.layer, m.module): m for m in found.modules}
    for layer, (hidden, index, share) in routed.items():
        experts = anatomy.experts(layer)
        inner: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        for t, slot in [(t, slot) for t in range(len(hidden)) for slot in range(2)]:
            e = int(index[t, slot])
            gate, up = (experts.gate_up_proj[e] @ hidden[t]).view(2, -1)
            inner[e][t] = nn.functional.silu(gate) * up * share[t, slot]
        best = 0.0
        for e, x in inner.items():
            name = f"mlp.experts.{e}.down_proj"
            c = next(c for a, c in candidates.items() if (a.layer, a.module) == (layer, name))
            y = {t: experts.down_proj[e] @ value for t, value in x.items()}
            largest = max(float(value.abs().max()) for value in y.values())
            assert abs(c.output_value) == pytest.approx(largest, rel=1e-4)
            j, k = c.address.out_channel, c.address.in_channel
            assert float(y[c.token][j]) == pytest.approx(c.output_value, rel=1e-4)
            assert float(x[c.token][k]) == pytest.approx(c.input_value, rel=1e-4)
            fed = experts.down_proj[e][j] * x[c.token]
            assert float(fed.abs().max()) == pytest.approx(abs(c.contribution), rel=1e-4)
            best = max(best, largest)
        assert abs(spikes[layer, "mlp.experts.down_proj"].output.value) == pytest.approx(best, 1e-4)
        most = max(
            float((experts.gate_up_proj[e] @ hidden[t]).abs().max())
            for e in inner
            for t in inner[e]
        )
        spike = spikes[layer, "mlp.experts.gate_up_proj"].output
        assert abs(spike.value) == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "falcon", "mixtral"])
def test_the_residual_stream(model_type, make_model, tiny_tokenizer):
    model = make_model(model_type)
    tokens = list(PROMPT.encode())
    states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    found = trace(Anatomy(model), [tokens])[0]
    assert found.stream.shape == (4, len(tokens), 24)
    for own, expected in zip(found.stream[:-1], states[:-1], strict=True):
        torch.testing.assert_close(own, expected[0])
    normed = Anatomy(model).final_norm(found.stream[-1])  # transformers keeps the last one normed
    torch.testing.assert_close(normed, states[-1][0])
    residual = trace_prompt(model, tiny_tokenizer, PROMPT).residual()
    assert len(residual) == 3
    for spike, state in zip(residual, found.stream[1:], strict=True):
        assert spike.value == state[spike.token, spike.channel]
        assert abs(spike.value) == state.abs().max()
    assert found.path(7, 5) == found.stream[1:, 7, 5].tolist()


STREAMS = {
    # the value at channel 1 before the first block and after each, beside 1.0 at channel 0
    "born and carried to the end": ([0, 0, 900, 901, 950, 940], 1, 1, 1.0),
    "of negative sign": ([0, 0, -900, -901, -950, -940], 1, -1, 1.0),
    "taken away in the last of three": ([0, 0, 900, 901, 950, 0.2], 1, 1, 2 / 3),
    "gone at once": ([0, 0, 900, 0.1, 0, 0], 1, 1, 0.0),
    "a gap, then another one": ([0, 0, 900, 0.1, 900, 900], 1, 1, 0.0),
    "cancels most": ([0, 900, 900, 900, 90, 80], 3, -1, 0.0),
    "cancels a part": ([0, 900, 900, 900, 500, 500], 3, -1, 0.0),
    "cancels too much": ([0, 900, 900, 900, -300, -300], 3, -1, 0.0),
    "turns it over": ([0, 900, 900, 900, -1300, -1300], 3, -1, 1.0),
    "made in the last block": ([0, 0, 0, 0, 0, 900], 4, 1, 0.0),
    "made in the last but one": ([0, 0, 0, 0, 900, 900], 3, 1, 1.0),
    "as large as half the largest": ([0, 0, 0.5, 0.5, 0.5, 0.4], 1, 1, 2 / 3),
    "ruled by another channel": ([0, 0, 0.4, 0.4, 0.4, 0.4], 1, 1, 0.0),
    "flips its sign later": ([0, 0, 900, 900, -900, -900], 1, 1, 1 / 3),
    "against what its block does": ([0, 0, -900, -900, -900, -900], 1, 1, 0.0),
}


@pytest.mark.parametrize("name", STREAMS)
def test_persistence(name):
    values, layer, sign, expected = STREAMS[name]
    stream = torch.zeros(len(values), 2, 3)
    stream[:, 1, 0] = 1.0
    stream[:, 0] = 5000.0  # another token, which must not matter
    stream[:, 1, 1] = torch.tensor(values, dtype=torch.float32)
    address = WeightAddress(layer, "mlp.down_proj", out_channel=1, in_channel=0)
    candidate = Candidate(address, 1.0, 7.0 * sign, 7.0 * sign, 1, 7.0 * sign, 1.0, None, 0.0)
    assert persistence(stream, candidate) == pytest.approx(expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "mistral", "mixtral", "qwen3_moe"])
def test_sequences_run_together_do_what_they_do_alone(model_type, make_model):
    changes = {"sliding_window": 6} if model_type == "mistral" else {}
    anatomy = Anatomy(make_model(model_type, **changes))
    sequences = [
        list(PROMPT.encode()),
        [7],
        list(b"So?"),
        [256, *b"Another, and longer than a few"],
    ]
    for ids, together in zip(sequences, trace(anatomy, sequences), strict=True):
        alone = trace(anatomy, [ids])[0]
        torch.testing.assert_close(together.stream, alone.stream)
        pairs = [(together.modules, alone.modules), (together.candidates, alone.candidates)]
        assert all(len(a) == len(b) > 0 for a, b in pairs)
        for a, b in zip(together.modules, alone.modules, strict=True):
            assert (a.layer, a.module) == (b.layer, b.module)
            for x, y in ((a.input, b.input), (a.output, b.output)):
                assert (x.token, x.channel) == (y.token, y.channel)
                assert x.value == pytest.approx(y.value, rel=1e-4, abs=1e-5)
        sizes = {c.address: c.contribution for c in alone.candidates}
        assert {c.address: c.contribution for c in together.candidates} == pytest.approx(
            sizes, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize(
    ("model_type", "outputs"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
    ],
)
def test_candidates_are_the_largest_contributions_first(
    model_type, outputs, make_model, tiny_tokenizer
):
    model = make_model(model_type)
    everything = trace_prompt(model, tiny_tokenizer, PROMPT).candidates
    assert len(everything) == 6  # two output projections in each of three blocks
    assert {c.address.module for c in everything} == outputs
    sizes = [abs(c.weight * c.input_value) for c in everything]
    assert sizes == sorted(sizes, reverse=True)


def test_a_spike_of_zero_has_a_finite_share(make_model, tiny_tokenizer):
    model = make_model("llama")
    Anatomy(model).projection(0, "mlp.down_proj").weight.zero_()
    found = trace_prompt(model, tiny_tokenizer, PROMPT)
    assert all(math.isfinite(c.contribution_share) for c in found.candidates)


def test_the_model_is_untouched(make_model, tiny_tokenizer):
    model = make_model("gpt2")
    before = weights_sha256(model)
    trace_prompt(model, tiny_tokenizer, PROMPT)
    assert weights_sha256(model) == before
    assert n_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_hooks_go_when_the_forward_pass_fails(
    model_type, error, make_model, tiny_tokenizer, monkeypatch
):
    model = make_model(model_type)
    before = weights_sha256(model)
    n_expected = (21 if model_type == "llama" else 12 + 3) + 3 + 1

    def fail(*_: object) -> None:
        assert n_hooks(model) == n_expected
        raise error

    monkeypatch.setattr(Anatomy(model).final_norm, "forward", fail)
    with pytest.raises(error):
        trace_prompt(model, tiny_tokenizer, PROMPT)
    assert n_hooks(model) == 0
    assert weights_sha256(model) == before


def test_activations_that_are_no_numbers(make_model, tiny_tokenizer):
    model = make_model("gpt2")
    Anatomy(model).projection(2, "mlp.c_proj").weight[3, 4] = math.nan
    with pytest.raises(UserError, match="not finite"):
        trace_prompt(model, tiny_tokenizer, PROMPT)
    assert n_hooks(model) == 0


@pytest.mark.parametrize(("prompt", "said"), [("", "no tokens"), ("x" * 257, "more tokens than")])
def test_a_prompt_that_cannot_be_run(prompt, said, make_model, tiny_tokenizer):
    with pytest.raises(UserError, match=said):
        trace_prompt(make_model("gpt2"), tiny_tokenizer, prompt)

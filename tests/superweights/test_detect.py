"""Detection: a planted super weight is found at its exact address; the model stays as it was."""

import hashlib
import math

import pytest
import torch
from torch import nn

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.detect import observed, scan

PROMPT = "Apple Inc. is a worldwide tech company."

# Linear, gated and plain, and Conv1D; MLP output and attention output
PLANTED = [
    ("llama", WeightAddress(1, "mlp.down_proj", 17, 33)),
    ("llama", WeightAddress(2, "self_attn.o_proj", 3, 29)),
    ("opt", WeightAddress(0, "fc2", 23, 39)),
    ("gpt_neox", WeightAddress(1, "mlp.dense_4h_to_h", 5, 38)),
    ("gpt2", WeightAddress(1, "mlp.c_proj", 17, 33)),
    ("gpt2", WeightAddress(2, "attn.c_proj", 3, 21)),
]


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("model_type", "address"), PLANTED)
def test_a_planted_super_weight_is_found(model_type, address, make_model, tiny_tokenizer):
    model = make_model(model_type)
    twin = scan(model, tiny_tokenizer, PROMPT, max_candidates=64)
    Anatomy(model).weight_view(address).fill_(50.0)
    found = scan(model, tiny_tokenizer, PROMPT, max_candidates=64)
    best, second = found.candidates[:2]
    assert best.address == address
    assert best.weight == 50.0
    assert best.contribution_share == pytest.approx(1, abs=0.3)
    assert abs(best.weight * best.input_value) > 3 * abs(second.weight * second.input_value)
    assert address not in [c.address for c in twin.candidates[:1]]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_every_number_against_activations_kept_whole(model_type, make_model, tiny_tokenizer):
    model = make_model(model_type)
    kept: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, nn.Module]] = {}
    anatomy = Anatomy(model)
    for p in anatomy.all_projections():
        p.module.register_forward_hook(
            lambda m, x, y, p=p: kept.update({(p.layer, p.name): (x[0][0], y[0], m)})
        )
    found = scan(model, tiny_tokenizer, PROMPT, max_candidates=4)
    assert found.prompt == PROMPT
    assert found.tokens == tiny_tokenizer.convert_ids_to_tokens(list(PROMPT.encode()))
    assert [(m.layer, m.module) for m in found.modules] == list(kept)
    for m in found.modules:
        for spike, activation in zip((m.input, m.output), kept[m.layer, m.module][:2], strict=True):
            assert spike.value == activation[spike.token, spike.channel]
            assert abs(spike.value) == activation.abs().max()
    for c in found.candidates:
        x, y, module = kept[c.address.layer, c.address.module]
        assert abs(c.output_value) == y.abs().max() == abs(y[c.token, c.address.out_channel])
        # The share that one input has in the spike, by setting that input to zero
        without = x[c.token].clone()
        without[c.address.in_channel] = 0
        fed = y[c.token] - module(without)
        assert fed[c.address.out_channel] == pytest.approx(c.weight * c.input_value, rel=1e-3)
        others = [
            abs(
                (y[c.token] - module(x[c.token].where(torch.arange(len(x[0])) != k, 0.0)))[
                    c.address.out_channel
                ]
            )
            for k in range(x.shape[1])
        ]
        assert max(others) == pytest.approx(abs(c.weight * c.input_value), rel=1e-3)
        share = abs(c.weight * c.input_value / c.output_value)
        assert c.contribution_share == pytest.approx(share, rel=1e-5)


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
    everything = scan(model, tiny_tokenizer, PROMPT, max_candidates=64).candidates
    assert len(everything) == 6  # two output projections in each of three blocks
    assert {c.address.module for c in everything} == outputs
    sizes = [abs(c.weight * c.input_value) for c in everything]
    assert sizes == sorted(sizes, reverse=True)
    few = scan(model, tiny_tokenizer, PROMPT, max_candidates=2).candidates
    assert few == everything[:2]


def test_a_spike_of_zero_has_a_finite_share(make_model, tiny_tokenizer):
    model = make_model("llama")
    Anatomy(model).projection(0, "mlp.down_proj").weight.zero_()
    found = scan(model, tiny_tokenizer, PROMPT, max_candidates=64)
    assert all(math.isfinite(c.contribution_share) for c in found.candidates)


def test_the_model_is_untouched(make_model, tiny_tokenizer):
    model = make_model("gpt2")
    before = weights_sha256(model)
    scan(model, tiny_tokenizer, PROMPT, max_candidates=3)
    assert weights_sha256(model) == before
    assert n_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_when_the_forward_pass_fails(make_model, tiny_tokenizer, monkeypatch):
    model = make_model("llama")
    before = weights_sha256(model)
    head = model.get_output_embeddings()

    def fail(*_: object) -> None:
        assert n_hooks(model) == 21
        raise MemoryError

    monkeypatch.setattr(head, "forward", fail)
    with pytest.raises(MemoryError):
        scan(model, tiny_tokenizer, PROMPT, max_candidates=3)
    assert n_hooks(model) == 0
    assert weights_sha256(model) == before


def test_hooks_go_when_the_body_fails(make_model):
    model = make_model("llama")
    with pytest.raises(KeyboardInterrupt), observed(Anatomy(model), lambda *_: None):
        assert n_hooks(model) == 21
        raise KeyboardInterrupt
    assert n_hooks(model) == 0


@pytest.mark.parametrize(("prompt", "said"), [("", "no tokens"), ("x" * 257, "more tokens than")])
def test_a_prompt_that_cannot_be_run(prompt, said, make_model, tiny_tokenizer):
    with pytest.raises(UserError, match=said):
        scan(make_model("gpt2"), tiny_tokenizer, prompt, max_candidates=3)

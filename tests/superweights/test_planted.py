"""Planted super weights are found and proved, massive activations on which nothing hangs are not.

The models are composed, not trained. Their text repeats 29 letters in an order of its own, which
the head spells out: logit(next) = <embedding, its code>. One neuron of an early MLP writes a
massive activation into a channel that the head does not read. In a planted model, a later neuron
is held off by that activation, and writes what looks like another letter's embedding as soon as it
is gone. Every model also has a late spike of two thirds the size that nothing reads.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from swlora.config import IdentifySpec
from swlora.models.anatomy import Anatomy, WeightAddress, weight_out_in
from swlora.models.load import LoadedModel
from swlora.result_json import as_json
from swlora.superweights.ablate import zeroed
from swlora.superweights.identify import identify

D, F, L, V = 40, 56, 4, 264
MASSIVE, LATE, CONSTANT, CODE = 60.0, 40.0, 3.0, 5.0
LETTERS = [*range(ord("a"), ord("z") + 1), *b" .\n"]
_COMMON = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "intermediate_size": F, "num_key_value_heads": 2},
    "gpt_neox": {**_COMMON, "intermediate_size": F},
    "opt": {**_COMMON, "ffn_dim": F, "word_embed_proj_dim": D},
    "gpt2": {"n_embd": D, "n_inner": F, "n_layer": L, "n_head": 4, "n_positions": 256},
}
SHAPES = {"gated Linear": ["llama"], "plain Linear": ["gpt_neox", "opt"], "Conv1D": ["gpt2"]}
KINDS = [(types[seed % len(types)], seed) for types in SHAPES.values() for seed in range(10)]


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Composed:
    """A model, the text that it predicts, and the address of its massive activation's weight."""

    model: Any
    text: str
    address: WeightAddress


class Composer:
    """Writes neurons into one random model."""

    def __init__(self, model_type: str, seed: int) -> None:
        self.draw = random.Random(seed)
        settings = {"vocab_size": V, "initializer_range": 0.03, "tie_word_embeddings": False}
        settings |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
        config = AutoConfig.for_model(
            model_type, **settings | {"max_position_embeddings": 256} | CONFIGS[model_type]
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
            codes = torch.linalg.qr(torch.cat([torch.ones(D - 3, 1), torch.randn(D - 3, D - 4)], 1))
            self.codes = codes.Q.T[
                1:
            ]  # orthonormal rows without a mean, which LayerNorm takes away
            embeddings = torch.randn(V, D - 4) / math.sqrt(D - 4) @ self.codes * CODE
        self.model, self.anatomy = model, Anatomy(model)
        self.family = self.anatomy.family
        self.constant, self.spike, self.late = self.draw.sample(range(D), 3)
        self.others = [c for c in range(D) if c not in (self.constant, self.spike, self.late)]
        self.order = self.draw.sample(LETTERS, len(LETTERS))
        self._write_language(embeddings)

    def _write_language(self, embeddings: Tensor) -> None:
        embeddings[self.order] = CODE * self.codes[: len(self.order)]
        table = self.model.get_input_embeddings().weight
        table[:V] = 0
        table[:V, self.others] = embeddings
        table[:V, self.constant] = CONSTANT
        head = self.model.get_output_embeddings().weight
        head.zero_()
        following = torch.tensor(self.order[1:] + self.order[:1])
        scale = 2.5 * MASSIVE / math.sqrt(D)  # the final norm divides by about MASSIVE / sqrt(D)
        head[following[:, None], torch.tensor(self.others)] = scale * self.codes[: len(self.order)]

    def neuron(self, layer: int, number: int, *directions: dict[int, float]) -> None:
        """Let a neuron read the given channels; a gated one has two directions, gate and up."""
        for name, direction in zip(self.family.mlp_in, directions, strict=False):
            weight = weight_out_in(self.anatomy.projection(layer, name))
            weight[number] = 0
            for channel, value in direction.items():
                weight[number, channel] = value

    def write(self, layer: int, number: int, channels: list[int], value: Tensor | float) -> None:
        """Let a neuron write `value` into channels, as active as it is on the text now."""
        module = self.anatomy.projection(layer, self.family.mlp_out)
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, F)))
        self.model(input_ids=torch.tensor([self.order * 2]))
        hook.remove()
        weight = weight_out_in(module)
        weight[:, number] *= 0.1
        weight[channels, number] = value / seen[0][:, number].median()


def compose(model_type: str, seed: int, *, planted: bool) -> Composed:
    c = Composer(model_type, seed)
    birth = c.draw.randrange(L - 2)
    cause, reader, late = c.draw.sample(range(F), 3)
    sign = c.draw.choice([-1.0, 1.0])
    c.neuron(birth, cause, {c.constant: 1.5}, {c.constant: 1.5})
    c.write(birth, cause, [c.spike], sign * MASSIVE)
    c.neuron(L - 1, late, {c.spike: sign}, {c.spike: sign})
    c.write(L - 1, late, [c.late], LATE)
    address = WeightAddress(birth, c.family.mlp_out, c.spike, cause)
    if planted:
        layer = c.draw.randrange(birth + 1, L)
        c.neuron(layer, reader, {c.constant: 1.0, c.spike: -2.0 * sign}, {c.constant: 2.0})
        with zeroed(c.anatomy, [address]):
            c.write(layer, reader, c.others, 1.2 * CODE * c.codes[c.draw.randrange(len(LETTERS))])
    return Composed(c.model, bytes(c.order * 12).decode(), address)


def shuffle(model: Any, seed: int) -> None:
    """Permute the weights of every projection: the same values, and nothing where it was.

    The head is made softer, or nothing could disturb what the embeddings alone predict.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in Anatomy(model).all_projections():
        flat = p.module.weight.view(-1)
        flat.copy_(flat[torch.randperm(len(flat), generator=generator)])
    model.get_output_embeddings().weight.mul_(0.03)


def identified(composed: Composed, tokenizer: Any, folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text(composed.text)
    loaded = LoadedModel(
        composed.model, tokenizer, "composed", None, "a composed model", (tokenizer.eos_token_id,)
    )
    spec = IdentifySpec(text=folder / "text.txt", windows=4, window_tokens=64)
    return as_json(identify(loaded, spec))


def proved(result: dict[str, Any]) -> list[WeightAddress]:
    keys = ("layer", "module", "out_channel", "in_channel")
    found = [c for c in result["candidates"] if c["verdict"] != "none"]
    return [WeightAddress(*(c[key] for key in keys)) for c in found]


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_a_planted_super_weight_is_found_and_proved(model_type, tiny_tokenizer, tmp_path):
    composed = compose(model_type, 100, planted=True)
    result = identified(composed, tiny_tokenizer, tmp_path)
    assert result["perplexity"] < 1.1
    assert proved(result) == [composed.address]
    assert result["layers"] == [composed.address.layer]
    best, *others = result["candidates"]
    assert (best["verdict"], best["agreement"], len(best["controls"])) == ("super", 1, 20)
    assert best["interval"][0] > 100 > 1.1 > best["largest_control"] > 0.9
    assert best["leave_one_out_ratio"] < 1.1
    late = [c for c in others if c["layer"] == L - 1 and c["contribution_share"] > 0.9]
    assert [c["verdict"] for c in late] == ["none"]
    assert abs(late[0]["output_value"]) > MASSIVE / 2
    doses = {point["scale"]: point["ratio"] for point in result["dose_curve"]["points"]}
    assert doses[0] > 100
    assert doses[2] < doses[0] / 50


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_a_massive_activation_alone_is_no_super_weight(model_type, tiny_tokenizer, tmp_path):
    composed = compose(model_type, 100, planted=False)
    result = identified(composed, tiny_tokenizer, tmp_path)
    assert result["perplexity"] < 1.1
    assert proved(result) == result["layers"] == []
    assert all(s["is_massive"] for s in result["search"]["settings"])
    keys = ("layer", "module", "out_channel", "in_channel")
    assert WeightAddress(*(result["search"]["rounds"][0][key] for key in keys)) == composed.address


@pytest.mark.slow
def test_30_of_30_are_found(tiny_tokenizer, tmp_path, one_thread):
    missed = []
    for model_type, seed in KINDS:
        composed = compose(model_type, seed, planted=True)
        found = proved(identified(composed, tiny_tokenizer, tmp_path))
        if found != [composed.address]:
            missed.append((model_type, seed, composed.address, found))
    assert len(KINDS) == 30
    assert missed == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["harmless", "shuffled"])
def test_29_of_30_nulls_have_none(kind, tiny_tokenizer, tmp_path, one_thread):
    """The same models without the reader of the massive activation; and planted ones, shuffled."""
    mistaken = []
    for model_type, seed in KINDS:
        composed = compose(model_type, seed, planted=kind == "shuffled")
        if kind == "shuffled":
            shuffle(composed.model, seed)
        result = identified(composed, tiny_tokenizer, tmp_path)
        assert result["perplexity"] < V
        if found := proved(result):
            mistaken.append((model_type, seed, found))
    assert len(mistaken) <= 1, mistaken

"""Published coordinates: the data file is whole, and only exact ids find anything in it."""

import math
from importlib import resources

import pytest
import yaml

from swlora.models.anatomy import FAMILIES, MOE_FAMILIES, WeightAddress
from swlora.superweights.known import compare, describe, known_weights
from swlora.superweights.proof import verdict

LLAMA_7B = WeightAddress(2, "mlp.down_proj", 3968, 7003)
OLMO_1B = [
    WeightAddress(1, "mlp.down_proj", 1764, 1710),
    WeightAddress(2, "mlp.down_proj", 1764, 8041),
]
ELSEWHERE = WeightAddress(5, "self_attn.o_proj", 1, 2)
# (hidden size, MLP width, layers) of each listed model, from their published configurations
SHAPES = {
    "huggyllama/llama-7b": (4096, 11008, 32),
    "huggyllama/llama-13b": (5120, 13824, 40),
    "huggyllama/llama-30b": (6656, 17920, 60),
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40),
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32),
    "mistralai/Mistral-7B-v0.1": (4096, 14336, 32),
    "allenai/OLMo-1B-0724-hf": (2048, 8192, 16),
    "allenai/OLMo-7B-0724-hf": (4096, 11008, 32),
    "microsoft/Phi-3-mini-4k-instruct": (3072, 8192, 32),
    "google/gemma-7b": (3072, 24576, 28),
    "tiiuae/falcon-7b": (4544, 18176, 32),
    "HuggingFaceTB/SmolLM2-1.7B": (2048, 8192, 24),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (2048, 8192, 24),
    "meta-llama/Llama-3.2-1B": (2048, 8192, 16),
    "Qwen/Qwen3-30B-A3B": (2048, 768, 48),  # of one expert
}


def data_file() -> dict:
    path = resources.files("swlora.superweights") / "known_super_weights.yaml"
    return yaml.safe_load(path.read_text("utf-8"))


def test_every_model_of_the_file_is_found_and_has_sources():
    content = data_file()
    assert set(content["models"]) == set(SHAPES)
    assert {s for entries in content["models"].values() for e in entries for s in e["sources"]} == (
        set(content["sources"])
    )
    for model_id, entries in content["models"].items():
        known = known_weights(model_id)
        assert len(known) == len(entries) == len({k.address for k in known})
        assert all(k.sources for k in known)


@pytest.mark.parametrize("model_id", list(SHAPES))
def test_coordinates_lie_inside_the_matrix_and_out_comes_first(model_id):
    """MLP and model differ in width: swapped channels would often fall outside."""
    n_out, n_in, n_layers = SHAPES[model_id]
    for known in known_weights(model_id):
        a = known.address
        assert any(f.feeds_residual(a.module) for f in (*FAMILIES, *MOE_FAMILIES))
        assert 0 <= a.layer < n_layers
        assert 0 <= a.out_channel < n_out
        assert 0 <= a.in_channel < n_in


def test_the_paper_lists_21_coordinates_of_9_models():
    paper = [
        (model_id, known.address)
        for model_id in SHAPES
        for known in known_weights(model_id)
        if any("table 2" in source and "2411.07191" in source for source in known.sources)
    ]
    assert len(paper) == 21
    assert len({model_id for model_id, _ in paper}) == 9


@pytest.mark.parametrize(
    "model_id",
    ["llama-7b", "huggyllama/llama-7", "huggyllama/llama-7b-chat", "x/huggyllama/llama-7b", ""],
)
def test_a_part_of_an_id_finds_nothing(model_id):
    assert known_weights(model_id) == []
    assert compare(model_id, [(LLAMA_7B, "super")]) is None


def test_case_does_not_matter():
    """The authors' own table misses models over the case of one letter."""
    assert known_weights("HuggyLlama/LLaMA-7B") == known_weights("huggyllama/llama-7b") != []


def test_a_misprint_is_kept_and_never_expected():
    (misprint,) = [k for k in known_weights("allenai/OLMo-1B-0724-hf") if k.misprint]
    assert misprint.address == WeightAddress(1, "mlp.down_proj", 1764, 8041)
    agreement = compare("allenai/OLMo-1B-0724-hf", [])
    assert agreement.not_found == OLMO_1B


def test_every_fate_of_a_published_coordinate():
    found = [(OLMO_1B[0], "super"), (OLMO_1B[1], "none"), (ELSEWHERE, "strong"), (LLAMA_7B, "none")]
    agreement = compare("allenai/OLMo-1B-0724-hf", found)
    assert agreement.verified == OLMO_1B[:1]
    assert agreement.harmless == OLMO_1B[1:]
    assert agreement.not_found == []
    assert agreement.extra == [ELSEWHERE]
    assert len(agreement.sources) == 2
    said = describe(agreement)
    assert f"verified here: {OLMO_1B[0]}; a candidate, but not proved" in said
    assert f"verified here and not published: {ELSEWHERE}" in said
    assert "no candidate here" not in said
    assert len(said.splitlines()) == 1


def test_a_candidate_that_is_not_proved_is_not_called_harmless():
    """Without it perplexity is 8 times what it was; without a random weight 1.57 times."""
    found = verdict(8.0, math.log(8.0), math.log(1.57))
    said = describe(compare("huggyllama/llama-7b", [(LLAMA_7B, found)]))
    assert said.endswith(f": a candidate, but not proved when zeroed alone: {LLAMA_7B}")


def test_a_coordinate_that_the_search_missed_is_said():
    agreement = compare("huggyllama/llama-7b", [(ELSEWHERE, "none")])
    assert (agreement.not_found, agreement.extra) == ([LLAMA_7B], [])
    assert f"no candidate here: {LLAMA_7B}" in describe(agreement)


def test_the_agreement_of_the_data_file_cannot_be_changed_by_a_caller():
    known_weights("huggyllama/llama-7b").clear()
    assert known_weights("huggyllama/llama-7b")

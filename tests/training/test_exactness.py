"""The tree step against the plain step: same loss, same gradient of every adapter matrix.

The plain step runs unmodified transformers and PEFT modules on the padded batch. In float32 every
tensor agrees to 1e-5 of its norm; in float64, where no module computes in float32 by its own
decree, to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from tests.support.adapters import attach, fill_b, move
from tests.support.gradients import measure
from tests.support.models import MakeModel
from tests.support.sequences import Pair, branching, chain, deep
from tests.support.tries import ORDERS

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.steps import StepOrder, plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import tree_layout
from swlora.models.anatomy import FAMILIES
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, scores not scaled": ("gpt2", {"scale_attn_weights": False}),
    "llama, grouped heads, own head": ("llama", {"tie_word_embeddings": False}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama, one key head, biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral, window 5": ("mistral", {"sliding_window": 5}),
    "mistral, window 70": ("mistral", {"sliding_window": 70}),
    "qwen2, one full layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "smollm3, rope on some layers": ("smollm3", {"no_rope_layer_interval": 2}),
    "gemma": ("gemma", {}),
    "gemma2, window 4, soft caps": ("gemma2", {"sliding_window": 4, "num_hidden_layers": 4}),
    "gemma3, window 4": ("gemma3_text", {"sliding_window": 4, "num_hidden_layers": 6}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.3}),
    "olmo2": ("olmo2", {}),
    "phi3, window 7": ("phi3", {"sliding_window": 7}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, not parallel": ("gpt_neox", {"use_parallel_residual": False}),
    "opt": ("opt", {}),
    "opt, norms behind, narrow embeddings": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    ),
}


FLOAT64_THROUGHOUT = ("gpt2", "gpt2, scores scaled by layer", "gpt_neox", "opt")


FLOAT64_BUT_NORMS_OR_ANGLES = ("olmo, clipped", "gemma")


def adapted(
    make_model: MakeModel,
    shape: str,
    *,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] = ("all-linear",),
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A tiny model of the shape, with adapters whose B is as large as after some training."""
    model_type, changes = SHAPES[shape]
    model = make_model(model_type, initializer_range=0.05, **changes)
    chosen = range(model.config.num_hidden_layers) if layers is None else layers
    spec = AdapterSpec(targets=list(targets), rank=3, alpha=7)
    peft_model = attach(model, spec, list(chosen), seed=1)
    fill_b(peft_model)
    train_mode(peft_model)
    return peft_model.to(dtype)


DATA: dict[str, Callable[[], list[Pair]]] = {"branching": branching, "deep": deep, "chain": chain}


def assert_same(
    peft_model: Any,
    sequences: TokenSequences,
    groups: Sequence[np.ndarray] | None = None,
    *,
    smoothing: float = 0.0,
    loss_tolerance: float = 1e-5,
    tolerance: float = 1e-5,
) -> None:
    """Trees of `groups` (default: one of everything) equal one padded batch of the same."""
    groups = [np.arange(len(sequences))] if groups is None else groups
    plain = PlainStep(peft_model, sequences, label_smoothing=smoothing)
    tree = TreeStep(peft_model, sequences, label_smoothing=smoothing)
    parameters = trainable_parameters(peft_model)
    loss, n_tokens, oracle = measure(plain, parameters, groups)
    tree_loss, tree_n_tokens, ours = measure(tree, parameters, groups)
    assert tree_n_tokens == n_tokens
    assert abs(tree_loss - loss) <= loss_tolerance * loss
    assert ours.keys() == oracle.keys()
    for name, expected in oracle.items():
        error = float((ours[name].double() - expected.double()).norm() / expected.double().norm())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def test_shapes_cover_every_family_that_can_run_trees() -> None:
    able = {t for f in FAMILIES if f.has_attention_interface for t in f.model_types}
    assert {model_type for model_type, _ in SHAPES.values()} == able


@pytest.mark.parametrize(("data", "nodes"), [("branching", 64), ("deep", 600), ("chain", 260)])
def test_data_branches_and_exceeds_a_chunk(data: str, nodes: int) -> None:
    sequences = TokenSequences.from_lists(DATA[data]())
    tree = build_tree(sequences, np.arange(len(sequences)))
    assert nodes < len(tree.token_ids) < len(sequences.tokens) / 1.5


@pytest.mark.parametrize("data", ["branching", "deep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_the_plain_step(
    make_model: MakeModel, shape: str, data: str
) -> None:
    assert_same(adapted(make_model, shape), TokenSequences.from_lists(DATA[data]()))


@pytest.mark.parametrize("data", ["deep", "chain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_long_paths_equal_the_plain_step(
    make_model: MakeModel, shape: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_layout, "PATH_NODES", 8)  # most nodes lie on such paths
    assert_same(adapted(make_model, shape), TokenSequences.from_lists(DATA[data]()))


@pytest.mark.parametrize("shape", ["gpt2", "mistral, window 70", "gemma3, window 4"])
def test_chain_of_prefixes(make_model: MakeModel, shape: str) -> None:
    assert_same(adapted(make_model, shape), TokenSequences.from_lists(chain()))


@pytest.mark.parametrize("shape", FLOAT64_THROUGHOUT)
@pytest.mark.parametrize("data", DATA)
def test_float64_agrees_to_rounding(make_model: MakeModel, shape: str, data: str) -> None:
    peft_model = adapted(make_model, shape, dtype=torch.float64)
    sequences = TokenSequences.from_lists(DATA[data]())
    assert_same(peft_model, sequences, smoothing=0.1, loss_tolerance=1e-12, tolerance=1e-11)


@pytest.mark.parametrize("shape", FLOAT64_BUT_NORMS_OR_ANGLES)
def test_float64_with_float32_inside(make_model: MakeModel, shape: str) -> None:
    peft_model = adapted(make_model, shape, dtype=torch.float64)
    sequences = TokenSequences.from_lists(deep())
    assert_same(peft_model, sequences, smoothing=0.1, loss_tolerance=1e-9, tolerance=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
@pytest.mark.parametrize("shape", ["gpt2", "llama, tied head", "gemma2, window 4, soft caps"])
def test_label_smoothing(make_model: MakeModel, shape: str, smoothing: float) -> None:
    sequences = TokenSequences.from_lists(branching())
    assert_same(adapted(make_model, shape), sequences, smoothing=smoothing)


@pytest.mark.parametrize("layers", [[0], [2], [1, 2], [0, 2]])
@pytest.mark.parametrize("shape", ["gpt2", "llama, grouped heads, own head", "opt"])
def test_some_layers(make_model: MakeModel, shape: str, layers: list[int]) -> None:
    peft_model = adapted(make_model, shape, layers=layers)
    assert_same(peft_model, TokenSequences.from_lists(deep()))


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ("gpt2", ["c_attn"]),
        ("gpt2", ["mlp.c_proj"]),
        ("gpt2", ["c_proj"]),
        ("llama, grouped heads, own head", ["q_proj", "v_proj"]),
        ("llama, grouped heads, own head", ["k_proj"]),
        ("llama, grouped heads, own head", ["down_proj"]),
        ("llama, one key head, biases", ["up_proj", "o_proj"]),
        ("phi3, window 7", ["gate_up_proj"]),
        ("gpt_neox", ["dense"]),
        ("opt", ["fc1", "k_proj"]),
    ],
)
def test_some_targets(make_model: MakeModel, shape: str, targets: list[str]) -> None:
    peft_model = adapted(make_model, shape, layers=[1, 2], targets=targets)
    assert_same(peft_model, TokenSequences.from_lists(branching()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", ["gpt2", "llama, grouped heads, own head", "mistral, window 5"])
def test_steps_of_several_trees(make_model: MakeModel, shape: str, order: StepOrder) -> None:
    peft_model = adapted(make_model, shape)
    sequences = TokenSequences.from_lists(deep())
    steps = plan_steps(
        sequences, sequences_per_step=12, max_tokens_per_tree=150, order=order, seed=1, epoch=0
    )
    assert len(steps) == 2
    for groups in steps:
        assert len(groups) >= 2
        assert_same(peft_model, sequences, groups)


@pytest.mark.parametrize(
    "pairs",
    [
        [([5, 6, 7], [8, 9, 0])],
        [([5, 6, 7], [8])],
        [([5, 6], [8])] * 3,
        [([5, 6], [7]), ([5, 6, 7], [8, 0]), ([5, 6, 7, 8], [0]), ([9, 9], [5])],
        [([5, 6] * 50, [5, 5] * 30)],
    ],
    ids=["one sequence", "one token", "duplicates", "nested prompts", "two tokens over and over"],
)
@pytest.mark.parametrize("shape", ["gpt2", "llama, grouped heads, own head", "mistral, window 5"])
def test_small_batches(make_model: MakeModel, shape: str, pairs: list[Pair]) -> None:
    assert_same(adapted(make_model, shape), TokenSequences.from_lists(pairs))


def test_an_id_given_twice_weighs_twice(make_model: MakeModel) -> None:
    peft_model = adapted(make_model, "gpt2")
    sequences = TokenSequences.from_lists(branching())
    assert_same(peft_model, sequences, [np.array([3, 1, 3, 8]), np.array([1, 1])])


def test_gradients_add_up_over_calls(make_model: MakeModel) -> None:
    peft_model = adapted(make_model, "llama, tied head")
    sequences = TokenSequences.from_lists(branching())
    step = TreeStep(peft_model, sequences)
    halves = np.array_split(np.arange(len(sequences)), 2)
    whole = measure(step, trainable_parameters(peft_model), halves).gradients
    peft_model.zero_grad(set_to_none=True)
    for half in halves:
        step([half])
    for name, parameter in trainable_parameters(peft_model).items():
        torch.testing.assert_close(parameter.grad.double(), whole[name].double())


PEFT_METHODS: dict[str, PeftConfig] = {
    "rslora": LoraConfig(r=3, use_rslora=True),
    "dora": LoraConfig(r=3, use_dora=True),
    "pissa": LoraConfig(r=3, init_lora_weights="pissa"),
    "ranks of their own": LoraConfig(r=2, rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 9}),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10),
    "loha": LoHaConfig(r=3),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_other_methods_of_peft(make_model: MakeModel, method: str) -> None:
    config = replace(PEFT_METHODS[method], target_modules=["q_proj", "v_proj", "down_proj"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        peft_model = get_peft_model(make_model("llama", initializer_range=0.05), config)
    move(trainable_parameters(peft_model).values(), 0.03)
    train_mode(peft_model)
    assert_same(peft_model, TokenSequences.from_lists(branching()))


# Few tokens, and lengths from short to past the smallest run of queries. The two tokens that all
# begin with differ: where all keys are alike, the gradient of a query is 0 and its error all noise.
few = st.integers(0, 2)


heads = st.integers(0, 70).map(lambda n: [5, 6] + [1] * n)


random_pairs = st.builds(
    lambda head, pairs: [(head + prompt, completion) for prompt, completion in pairs],
    heads,
    st.lists(
        st.tuples(st.lists(few, max_size=8), st.lists(few, min_size=1, max_size=12)),
        min_size=1,
        max_size=10,
    ),
)


@given(pairs=random_pairs, smoothing=st.sampled_from([0.0, 0.2]))
@settings(max_examples=50, deadline=None)
def test_random_tries_in_float64(
    make_model: MakeModel, pairs: list[Pair], smoothing: float
) -> None:
    peft_model = adapted(make_model, "gpt2", layers=[1, 2], dtype=torch.float64)
    sequences = TokenSequences.from_lists(pairs)
    assert_same(peft_model, sequences, smoothing=smoothing, loss_tolerance=1e-12, tolerance=1e-9)


@given(pairs=random_pairs)
@settings(max_examples=50, deadline=None)
def test_random_tries_in_float32(make_model: MakeModel, pairs: list[Pair]) -> None:
    peft_model = adapted(make_model, "llama, grouped heads, own head")
    assert_same(peft_model, TokenSequences.from_lists(pairs))

"""The choice among the ways of attention, with CPU tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.kernels.test_torch_attention import layout_of
from tests.kernels.test_tree_attention import Shape, make_inputs, relative_errors
from tests.kernels.test_tree_walk import MODEL_TYPES, make_tree
from tests.kernels.trees import random_tree
from tests.support.models import MakeModel
from tests.support.sequences import branching
from torch import Tensor

from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.evaluation.loss import dataset_loss
from swlora.kernels import cuda_attention, tree_walk
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.cuda_attention import attend, chosen, news, prefer
from swlora.kernels.torch_attention import CompiledTooOftenError
from swlora.kernels.tree_attention import chunk_attention
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.progress import Silent

KIND = "4/2 heads of 8, float32"


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    prefer({})
    news()
    yield
    prefer({})
    news()


def call(softcap: float | None = None) -> tuple[Any, ...]:
    tree = random_tree(3, 80)
    q, k, v, _ = make_inputs(tree, Shape(4, 2, 8), torch.float32)
    return layout_of(tree), q, k, v, Scoring(0.3, None, softcap)


def as_on_cuda(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    return attend(layout, query, key, value, scoring, last=chunk_attention)


def taking(seconds: float) -> Callable[..., Tensor]:
    def way(_layout: TreeLayout, query: Tensor, _k: Tensor, _v: Tensor, _s: Scoring) -> Tensor:
        import time

        time.sleep(seconds)
        return (query + _k.sum() + _v.sum()).transpose(1, 2)

    return way


def refusing(error: Exception) -> Callable[..., Tensor]:
    def way(*_args: Any) -> Tensor:
        raise error

    return way


def test_without_flex_a_dense_mask_is_taken_and_said() -> None:
    out = as_on_cuda(*call())
    assert relative_errors((out,), (chunk_attention(*call()),))[0] < 1e-6
    assert chosen() == {KIND: "dense"}
    (line,) = news()
    assert "dense" in line and "not flex (" in line and "chunks" not in line
    as_on_cuda(*call())
    assert news() == []  # tried once


def test_with_a_soft_cap_the_chunks_are_left() -> None:
    out = as_on_cuda(*call(softcap=2.0))
    assert torch.equal(out, chunk_attention(*call(softcap=2.0)))
    assert chosen() == {f"{KIND} soft cap": "chunks"}


@pytest.mark.parametrize(("flex_s", "expected"), [(0.0, "flex"), (0.05, "dense")])
def test_the_faster_way_is_taken(
    monkeypatch: pytest.MonkeyPatch, flex_s: float, expected: str
) -> None:
    monkeypatch.setattr(cuda_attention, "flex", taking(flex_s))
    monkeypatch.setattr(cuda_attention, "dense", taking(0.005))
    as_on_cuda(*call())
    assert chosen() == {KIND: expected}


def test_flex_is_taken_where_it_is_not_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "flex", taking(0.05))
    monkeypatch.setattr(cuda_attention, "dense", taking(0.045))
    as_on_cuda(*call())
    assert chosen() == {KIND: "flex"}


def test_what_was_chosen_before_is_taken_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "dense", refusing(AssertionError()))
    prefer({KIND: "chunks", "other": "unknown"})
    assert torch.equal(as_on_cuda(*call()), chunk_attention(*call()))
    assert news() == [] and chosen() == {KIND: "chunks"}


@pytest.mark.parametrize(("softcap", "instead"), [(None, "dense"), (2.0, "chunks")])
def test_flex_that_was_compiled_too_often_is_left_and_said(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, instead: str
) -> None:
    monkeypatch.setattr(cuda_attention, "flex", refusing(CompiledTooOftenError("32 times")))
    kind = KIND + (" soft cap" if softcap else "")
    prefer({kind: "flex"})
    out = as_on_cuda(*call(softcap))
    assert relative_errors((out,), (chunk_attention(*call(softcap)),))[0] < 1e-6
    assert chosen() == {kind: instead}
    assert news() == [f"attention ({kind}): 32 times; {instead} from here on"]


def test_where_nothing_works_the_reasons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "flex", refusing(NotImplementedError("no triton")))
    monkeypatch.setattr(cuda_attention, "dense", refusing(torch.OutOfMemoryError("of memory")))
    with pytest.raises(RunFailedError, match=r"no triton.*of memory.*ZeroDivisionError"):
        attend(*call(), last=refusing(ZeroDivisionError()))


def test_where_the_last_way_has_no_memory_whoever_calls_may_cut_the_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_attention, "flex", refusing(NotImplementedError("no triton")))
    monkeypatch.setattr(cuda_attention, "dense", refusing(torch.OutOfMemoryError("of memory")))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        attend(*call(), last=refusing(torch.OutOfMemoryError("no memory left")))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_has_the_states_and_gradients_of_the_chunks(
    make_model: MakeModel, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = TreeWalk(make_model(model_type).double(), 1)
    _, layout = make_tree()
    entry = walk.prefix(layout)

    def run() -> tuple[Tensor, Tensor]:
        hidden = entry.clone().requires_grad_()
        out = walk.suffix(layout, hidden)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return out, torch.autograd.grad((out * weights).sum(), hidden)[0]

    expected = run()
    monkeypatch.setattr(tree_walk, "tree_attention", as_on_cuda)
    assert max(relative_errors(run(), expected)) < 1e-11
    names = {("chunks" if "soft cap" in kind else "dense") for kind in chosen()}
    assert names == set(chosen().values())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_an_evaluation_may_be_the_first_that_attends(
    make_model: MakeModel, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in inference mode, and the trial computes gradients."""
    model, sequences = make_model(model_type), TokenSequences.from_lists(branching())
    expected = dataset_loss(model, sequences, Silent())
    monkeypatch.setattr(tree_walk, "tree_attention", as_on_cuda)
    found = dataset_loss(model, sequences, Silent())
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-5)
    assert found.n_tokens == expected.n_tokens
    assert set(chosen().values()) == {"dense" if model_type == "llama" else "chunks"}

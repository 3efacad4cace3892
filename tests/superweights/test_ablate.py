"""Ablation: scalars are zero while the body runs and afterwards what they were, bit for bit."""

import math
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import (
    scaled,
    text_loss,
    text_windows,
    zeroed,
)

MLP_OUT = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}
each_type = pytest.mark.parametrize("model_type", list(MLP_OUT))


def addresses(model_type: str) -> list[WeightAddress]:
    return [
        WeightAddress(1, MLP_OUT[model_type], 5, 38),
        WeightAddress(2, MLP_OUT[model_type], 23, 0),
    ]


@each_type
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, MemoryError])
def test_weights_come_back_bit_for_bit(model_type, error, make_model, weights_sha256):
    model = make_model(model_type)
    anatomy = Anatomy(model)
    first, second = addresses(model_type)
    anatomy.weight_view(first).fill_(math.nan)  # a value that arithmetic could not restore
    anatomy.weight_view(second).fill_(-0.0)
    before = weights_sha256(model)
    with suppress(RuntimeError, KeyboardInterrupt, MemoryError), zeroed(anatomy, [first, second]):
        assert weights_sha256(model) != before
        if error is not None:
            raise error
    assert weights_sha256(model) == before


@each_type
def test_the_named_scalars_and_no_others_are_zero_meanwhile(model_type, make_model, weights_sha256):
    model, expected = make_model(model_type), make_model(model_type)
    for a in addresses(model_type):
        weight = Anatomy(expected).projection(a.layer, a.module).weight
        is_conv1d = model_type == "gpt2"
        weight[(a.in_channel, a.out_channel) if is_conv1d else (a.out_channel, a.in_channel)] = 0
    with zeroed(Anatomy(model), addresses(model_type)):
        assert weights_sha256(model) == weights_sha256(expected)


def test_the_same_scalar_twice_is_restored(make_model, weights_sha256):
    model = make_model("llama")
    before = weights_sha256(model)
    with zeroed(Anatomy(model), addresses("llama")[:1] * 2):
        pass
    assert weights_sha256(model) == before


@each_type
def test_scaled_scalars_are_products_and_come_back(model_type, make_model, weights_sha256):
    model = make_model(model_type)
    anatomy, before = Anatomy(model), weights_sha256(model)
    scales = dict(zip(addresses(model_type), (0.35, -2.0), strict=True))
    expected = [float(anatomy.weight_view(a)) * scale for a, scale in scales.items()]
    with scaled(anatomy, scales):
        found = [float(anatomy.weight_view(a)) for a in scales]
    assert found == pytest.approx(expected, rel=1e-6)
    assert weights_sha256(model) == before


def test_one_scalar_that_cannot_be_restored_does_not_keep_the_others_away(make_model, monkeypatch):
    """As an interrupt between two restorations would."""
    anatomy = Anatomy(make_model("llama"))
    first, second = (anatomy.weight_view(a) for a in addresses("llama"))
    values = float(first), float(second)
    copy, is_armed = torch.Tensor.copy_, False

    def interrupted(view, value):
        if is_armed and view.data_ptr() == second.data_ptr():
            raise KeyboardInterrupt
        return copy(view, value)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), zeroed(anatomy, addresses("llama")):
        assert (float(first), float(second)) == (0, 0)
        is_armed = True
    assert (float(first), float(second)) == (values[0], 0)


def test_zeroing_nothing_is_an_error(make_model):
    with (
        pytest.raises(UserError, match="no weight was named"),
        zeroed(Anatomy(make_model("llama")), []),
    ):
        pass


def test_a_bad_address_among_good_ones_changes_nothing(make_model, weights_sha256):
    model = make_model("llama")
    before = weights_sha256(model)
    bad = WeightAddress(0, "mlp.down_proj", 999, 0)
    with (
        pytest.raises(UserError, match="outside"),
        zeroed(Anatomy(model), [*addresses("llama"), bad]),
    ):
        pass
    assert weights_sha256(model) == before


def test_text_loss_is_the_sum_over_predicted_tokens(make_model):
    model = make_model("gpt2")
    windows = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for window in windows:
        log_p = F.log_softmax(model(input_ids=window[None]).logits[0].double(), dim=-1)
        expected -= sum(float(log_p[i - 1, window[i]]) for i in range(1, 17))
    loss = text_loss(model, windows)
    assert loss.n_tokens == 3 * 16
    assert loss.sum_nats == pytest.approx(expected, rel=1e-6)
    assert loss.perplexity == pytest.approx(math.exp(expected / 48), rel=1e-5)


def test_windows_are_the_beginning_of_the_text(tiny_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("äbcdefghijk" * 3, encoding="utf-8")
    expected = list(("äbcdefghijk" * 3).encode())
    windows = text_windows(tiny_tokenizer, tmp_path / "text.txt", 2, 18)
    assert windows.tolist() == [expected[:18], expected[18:36]]
    shipped = text_windows(tiny_tokenizer, None, 4, 512)
    assert shipped.shape == (4, 512)


@pytest.mark.parametrize("says_so", [True, False])
def test_every_window_begins_as_the_tokenizer_begins_a_text(says_so, bos_tokenizer, tmp_path):
    """BOS is one of the window's tokens; the text goes on where the window before it ended."""
    text = "äbcdefghijk" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    windows = text_windows(bos_tokenizer(says_so=says_so), tmp_path / "text.txt", 2, 18)
    ids = list(text.encode())
    assert windows.tolist() == [[256, *ids[:17]], [256, *ids[17:34]]]
    with pytest.raises(UserError, match=r"has 36 tokens; 2 windows of 20 need 38 beside BOS: "):
        text_windows(bos_tokenizer(), tmp_path / "text.txt", 2, 20)


def test_a_text_that_begins_with_bos_is_no_tokenizer_that_puts_it(tiny_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("<s>abcde")
    windows = text_windows(tiny_tokenizer, tmp_path / "text.txt", 2, 3)
    assert windows.tolist() == [[256, *b"ab"], [*b"cde"]]


def test_texts_that_do_not_do(tiny_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("x" * 35)
    with pytest.raises(UserError, match=r"has 35 tokens; 2 windows of 18 need 36"):
        text_windows(tiny_tokenizer, tmp_path / "text.txt", 2, 18)
    (tmp_path / "text.txt").write_bytes(b"\xff" * 35)
    for path in (tmp_path / "text.txt", tmp_path / "gone.txt", tmp_path):
        with pytest.raises(UserError, match="cannot read the text"):
            text_windows(tiny_tokenizer, path, 1, 18)

"""The curve of single layers: what counts as a layer's loss, and how well gradients order them."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks.recipes.layer_curve import (
    by_layer,
    draw,
    model_of,
    rank_correlation,
    with_gradients,
)
from benchmarks.recipes.recipe import Recipe

from swlora.errors import UserError


def case(text: str, nll: float, seed: int = 0) -> dict[str, Any]:
    recipe = Recipe.parse(f"steps=4 {text}")
    of_dev = {"dev": {"nll": nll}, "seed": seed}
    return {"recipe": str(recipe), "settings": recipe.settings()} | of_dev


def test_a_layer_has_the_loss_of_its_best_rate() -> None:
    cases = [
        case("layers=3 rate=1e-3", 1.5),
        case("layers=3 rate=2e-3", 1.2),
        case("layers=3 rate=2e-3", 1.6, seed=1),
        case("layers=3 rate=4e-3", 1.45),
        case("layers=3 rate=8e-3", 1.7),
        case("layers=0 rate=1e-3", 1.9),
        case("layers=all", 1.0),
        case("layers=last:1", 1.1),
    ]
    first, third = by_layer(cases)
    assert (first["layer"], first["nll"], first["at_edge"]) == (0, 1.9, True)
    assert (third["layer"], third["nll"], third["seeds"]) == (3, pytest.approx(1.4), 2)
    assert third["recipe"] == "steps=4 layers=3 rate=0.002" and not third["at_edge"]


def test_a_rate_that_failed_with_a_seed_is_none_but_counts_as_tried() -> None:
    cases = [
        case("layers=3 rate=1e-3", 1.6),
        case("layers=3 rate=2e-3", 1.5),
        case("layers=3 rate=4e-3", 1.2),
        case("layers=3 rate=4e-3", 1.2, seed=1) | {"error": "not finite"},
        case("layers=5 rate=1e-3", 1.2) | {"error": "not finite"},
        case("layers=8", 1.4),
    ]
    third, eighth = by_layer(cases)
    assert (third["layer"], third["nll"], third["at_edge"]) == (3, 1.5, False)
    assert eighth["layer"] == 8


def test_more_seeds_count_before_a_lower_loss() -> None:
    cases = [case("layers=3 rate=1e-3", 1.5, seed) for seed in range(2)]
    cases += [case("layers=3 rate=2e-3", 1.4), case("layers=8", 1.4)]
    assert by_layer(cases)[0]["seeds"] == 2


@pytest.mark.parametrize("other", ["data=chats", "rank=8", "batch=4"])
def test_only_layer_and_rate_may_differ(other: str) -> None:
    key = other.partition("=")[0]
    with pytest.raises(UserError, match=f"trained with {key}="):
        by_layer([case("layers=3", 1.5), case(f"layers=5 {other}", 1.4)])


def test_a_layer_beyond_the_model_is_refused() -> None:
    rows = by_layer([case("layers=3", 1.5), case("layers=8", 1.4)])
    assert with_gradients(rows, [float(k) for k in range(9)])[1]["gradient_l1"] == 8
    with pytest.raises(UserError, match="layer 8 is not in a model of 8 layers"):
        with_gradients(rows, [1.0] * 8)


def test_one_layer_is_no_curve() -> None:
    with pytest.raises(UserError, match="no two layers"):
        by_layer([case("layers=3", 1.5), case("layers=all", 1.0)])


def test_ranks_alone_count() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_equal_values_share_their_rank() -> None:
    a, b = [1, 2, 2, 3], [1, 2, 3, 4]  # ranks 1, 2.5, 2.5, 4
    assert rank_correlation(a, b) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_the_picture_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    layers = [{"layer": k, "nll": 1.5 - k, "gradient_l1": 3.0 + k} for k in range(3)]
    for name in ("a.svg", "b.svg"):
        draw({"layers": layers}, tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8") and "<svg" in text


def test_the_model_is_looked_for_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "gemma.gguf"
    file.touch()
    assert model_of({"model": "builtin"}, None) == "builtin"
    assert model_of({"model": "owner/name"}, "owner/name") == "owner/name"
    assert model_of({"model": "gemma.gguf"}, str(file)) == str(file)
    with pytest.raises(UserError, match=r"are of the model other.gguf, not of .*gemma.gguf"):
        model_of({"model": "other.gguf"}, str(file))

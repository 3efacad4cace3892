"""What an adapter brings where a training starts from it, and what is refused beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tests.support.adapters import adapter_spec
from tests.support.models import MakeModel

from swlora.adapters.methods import adapt
from swlora.adapters.saved import save_adapter
from swlora.adapters.start import settled_start
from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Any:
    """A function method -> the folder of an adapter of that method in the layers 0 and 2."""

    def save(method: str, **facts: Any) -> Path:
        spec = adapter_spec(method)
        adapted = adapt(make_model("llama"), spec, [0, 2], seed=1, n_steps=12)
        adapted.finish()
        save_adapter(adapted.model, tmp_path / method, {"method": method, **facts})
        return tmp_path / method

    return save


@pytest.fixture
def settle(make_model: MakeModel) -> Any:
    anatomy = Anatomy(make_model("llama"))
    return lambda folder, **given: settled_start(AdapterSpec(start=folder, **given), anatomy)


@pytest.mark.parametrize(
    ("method", "settled", "rank"),
    [
        ("lora", "lora", 3),
        ("lora+", "lora+", 3),
        ("dora", "dora", 3),
        ("rslora", "rslora", 3),
        ("pissa", "lora", 6),  # as it is saved: a plain LoRA of twice the rank
        ("full", "full", None),
        ("supertuning", "supertuning", None),
    ],
)
def test_its_settings_are_those_of_the_adapter(
    method: str, settled: str, rank: int | None, saved: Any, settle: Any
) -> None:
    found = settle(saved(method))
    assert found.method == settled
    assert found.rank == (rank or AdapterSpec().rank)
    assert str(found.layers) == "0,2" and len(found.targets) == 7
    assert found.sparsity == (0.9 if method == "supertuning" else None)
    assert settle(saved(method), **{n: getattr(found, n) for n in ("method", "layers")}) == found
    again = AdapterSpec.model_validate(found.model_dump(mode="json"))  # in a run that goes on
    assert settle(again.start, **again.model_dump(exclude={"start"})) == found


def test_how_it_is_trained_is_the_new_trainings_own(saved: Any, settle: Any) -> None:
    folder = saved("lora+", settings={"lora_plus_ratio": 5.0})
    assert settle(folder).lora_plus_ratio == 5.0
    assert settle(folder, lora_plus_ratio=7.0).lora_plus_ratio == 7.0
    assert settle(folder, method="lora").method == "lora"
    assert settle(folder, dropout=0.2).dropout == 0.2
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "swlora.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.3}))
    assert settle(folder).dropout == 0.3
    assert settle(folder).method == "lora"  # of an adapter from elsewhere, nothing says more


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 4}, "leave out --rank, which is 3 there"),
        ({"alpha": 5, "rank": 3}, "leave out --alpha, which is 6.0 there"),
        ({"layers": "last:2"}, "leave out --layers, which is 0,2 there"),
        ({"layers": "super"}, "leave out --layers, which is 0,2 there"),
        ({"targets": "q_proj", "rank": 1}, "--rank, which is 3 there and --targets, which is "),
        ({"method": "dora"}, "--method dora conflicts with the adapter in .*, which is lora"),
    ],
)
def test_other_settings_beside_it_are_refused_by_name(
    given: dict[str, Any], named: str, saved: Any, settle: Any
) -> None:
    with pytest.raises(UserError, match=named) as refused:
        settle(saved("lora"), **given)
    assert "\n" not in str(refused.value)


def test_the_same_settings_in_other_words_are_taken(saved: Any, settle: Any) -> None:
    found = settle(saved("lora"), rank=3, alpha=6, layers="2,0", targets=["all-linear"])
    assert str(found.layers) == "0,2"


def test_a_rank_beside_a_method_without_one_is_refused(saved: Any, settle: Any) -> None:
    with pytest.raises(UserError, match=r"leave out --rank$"):
        settle(saved("full"), rank=8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True, "use_rslora": True}, "DoRA with rsLoRA's scale is no method here"),
        ({"bias": "all"}, "it has biases of its own"),
        ({"init_lora_weights": "pissa"}, "its start changed the model's own weights"),
        ({"peft_type": "LOHA"}, "its type is LOHA, and only LORA is trained on"),
        ({"modules_to_save": ["lm_head"]}, "it replaces whole modules"),
        ({"r": "many"}, "rank: must be a valid integer"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    changes: dict[str, Any], reason: str, saved: Any, settle: Any
) -> None:
    folder = saved("lora")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "swlora.json").unlink()
    with pytest.raises(UserError, match=rf"no training starts from .*: {reason}"):
        settle(folder)


def test_a_pruned_adalora_is_refused(saved: Any, settle: Any) -> None:
    with pytest.raises(UserError, match=r"no training starts from .*: AdaLoRA's ranks are pruned"):
        settle(saved("adalora"))


def test_an_adapter_beyond_the_blocks_is_refused(
    make_model: MakeModel, settle: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(make_model("llama"), config).save_pretrained(
        str(tmp_path / "wide"), save_embedding_layers=False
    )
    with pytest.raises(UserError, match=r"lm_head\.lora_A\.weight belongs to no projection"):
        settle(tmp_path / "wide")

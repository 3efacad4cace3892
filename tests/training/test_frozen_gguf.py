"""Training from a .gguf file's blocks: loss and gradient of the dequantised model, bit for bit."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.adapters import adapter_spec, randomise
from tests.support.gguf_files import SIZES, write_gguf

import swlora
from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.adapters.temporary import adapter_on
from swlora.config import ModelSpec
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError
from swlora.models import gguf_frozen
from swlora.models.load import load_model
from swlora.models.quantised_weight import QuantisedWeight
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

METHODS = ("lora", "lora+", "rslora", "dora", "adalora")


@pytest.fixture
def sequences():
    rng = np.random.default_rng(7)
    prompt = rng.integers(1, 200, 6).tolist()
    return TokenSequences.from_lists(
        [(prompt[: 3 + i % 4], rng.integers(1, 200, 20 + i % 3).tolist()) for i in range(9)]
    )


@pytest.fixture
def trained(make_model, tiny_tokenizer, tmp_path, sequences):
    """A function (family, kind, ...) -> for a frozen way: losses and gradients of two steps."""

    def run(family, kind, method="lora", dtype="bfloat16", step_class=TreeStep, layers=(0, 1)):
        path = tmp_path / "model.gguf"
        write_gguf(make_model(family, **SIZES[family]), tiny_tokenizer, path, kind=kind)
        return {
            frozen: measured(path, frozen, method, dtype, step_class, layers)
            for frozen in ("gguf", "dequantised")
        }

    def measured(path, frozen, method, dtype, step_class, layers):
        spec = ModelSpec(name=str(path), frozen=frozen, dtype=dtype, device="cpu")
        model = load_model(spec).model
        peft_model = adapt(model, adapter_spec(method), list(layers), seed=1, n_steps=9).model
        randomise(peft_model, 0.03)
        train_mode(peft_model)
        n_kept = sum(isinstance(p, QuantisedWeight) for p in peft_model.parameters())
        assert (n_kept > 5) == (frozen == "gguf")
        step, results = step_class(peft_model, sequences), []
        for ids in (np.arange(5), np.arange(5, 9)):
            loss = step([ids])
            results.append(torch.tensor(loss.sum_nats))
            for parameter in trainable_parameters(peft_model).values():
                results.append(parameter.grad.clone())
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad
        step.close()
        return results

    return run


def assert_equal(results):
    kept, plain = results["gguf"], results["dequantised"]
    assert len(kept) == len(plain)
    for a, b in zip(kept, plain, strict=True):
        assert torch.equal(a, b)
    assert all(float(gradient.abs().max()) > 0 for gradient in kept)


@pytest.mark.parametrize("family", SIZES)
def test_every_family(family, trained):
    assert_equal(trained(family, "Q8_0"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16"])
def test_every_type(kind, trained):
    assert_equal(trained("llama", kind))


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_that_leaves_the_weights_alone(method, trained):
    assert_equal(trained("llama", "Q4_K", method))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_float32(family, trained):
    assert_equal(trained(family, "Q6_K", dtype="float32"))


def test_padded_batches_and_a_frozen_prefix(trained):
    assert_equal(trained("llama", "Q4_K", step_class=PlainStep, layers=(1,)))
    assert_equal(trained("llama", "Q4_K", layers=(1,)))


@pytest.fixture
def file(make_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(make_model("llama", **SIZES["llama"]), tiny_tokenizer, path, kind="Q4_K")
    return path


@pytest.mark.parametrize("method", ["pissa", "full", "supertuning"])
def test_methods_that_change_the_weights_are_refused(method, file):
    model = load_model(ModelSpec(name=str(file), frozen="gguf", device="cpu")).model
    with pytest.raises(UserError, match=f"{method} changes the model's own weights.*dequantised"):
        adapt(model, adapter_spec(method), [0], seed=1)


def test_a_search_for_super_weights_has_them_dequantised(file, monkeypatch):
    monkeypatch.setattr(gguf_frozen, "KEPT_ABOVE_BYTES", 1000)
    given = {"model": str(file), "windows": 1, "window_tokens": 32, "max_candidates": 1}
    with pytest.raises(UserError, match=r"sets single weights to zero.*--frozen dequantised"):
        swlora.identify(**given, frozen="gguf")
    assert swlora.identify(**given).candidates is not None  # by itself


def test_a_model_is_as_it_was_after_an_adapter(file, tmp_path):
    model = load_model(ModelSpec(name=str(file), frozen="gguf", device="cpu")).model
    adapt(model_of(file), adapter_spec("lora"), [0], seed=1).model.save_pretrained(tmp_path / "a")
    ids, before = torch.tensor([[3, 4, 5]]), {n: id(p) for n, p in model.named_parameters()}
    logits = model(ids).logits
    with adapter_on(model, tmp_path / "a") as adapted:
        adapted(ids)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert torch.equal(model(ids).logits, logits)


def model_of(file):
    return load_model(ModelSpec(name=str(file), frozen="gguf", device="cpu")).model


def rows_of(tmp_path, n):
    path = tmp_path / "rows.jsonl"
    words = ("red", "blue", "green", "grey")
    rows = [{"prompt": f"{i % 7} is ", "completion": words[i % 4] * (1 + i % 3)} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(file, frozen, tmp_path):
    rows = str(rows_of(tmp_path, 40))
    given = {"model": str(file), "frozen": frozen, "dtype": "bfloat16", "dataset": rows}
    return {**given, "eval_file": rows}


def test_train_resume_evaluate_and_generate(file, tmp_path):
    kept, plain = (
        trained_and_used(file, frozen, tmp_path, max_steps=4, batch_size=4, eval_every_steps=2)
        for frozen in ("gguf", "dequantised")
    )
    assert len(kept.losses) == 4
    assert_same_run(kept, plain)


class Used(NamedTuple):
    """What a training gave, and what was made of its adapter."""

    losses: list[float]
    nll: float
    text: str
    adapter: dict[str, torch.Tensor]


def trained_and_used(file, frozen, tmp_path, **steps):
    given, run = settings(file, frozen, tmp_path), tmp_path / f"run-{frozen}"
    swlora.train(**given, **steps, output=run)
    model = {name: given[name] for name in ("model", "frozen", "dtype")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Used(
        [line["loss"] for line in lines if "loss" in line],
        swlora.evaluate(run, **given, max_new_tokens=4).nll,
        swlora.generate("3 is ", adapter=run, max_new_tokens=8, **model).text,
        load_file(run / "adapter" / "adapter_model.safetensors"),
    )


def assert_same_run(kept, plain):
    assert (kept.losses, kept.nll, kept.text) == (plain.losses, plain.nll, plain.text)
    assert kept.adapter.keys() == plain.adapter.keys()
    assert all(torch.equal(kept.adapter[name], plain.adapter[name]) for name in plain.adapter)

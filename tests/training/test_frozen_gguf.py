"""Training from a .gguf file's blocks: loss and gradient of the dequantised model, bit for bit."""

import numpy as np
import pytest
import torch
from tests.support.adapters import adapter_spec, randomise
from tests.support.gguf_files import SIZES, write_gguf

from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.config import ModelSpec
from swlora.data.token_sequences import TokenSequences
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

"""The examples in the docstrings of Python's functions run, with tiny weights as `builtin`."""

import doctest
from pathlib import Path

import pytest
from tests.support.gguf_models import save_tiny

import swlora
from swlora import api
from swlora.models import load


@pytest.fixture(scope="module")
def longer_model(tmp_path_factory) -> Path:
    """A tiny model with room for the rows of the sample, nearly a token for each byte."""
    folder = tmp_path_factory.mktemp("longer")
    save_tiny("llama", folder, max_position_embeddings=1024)
    return folder


@pytest.fixture
def builtin(longer_model, tmp_path, monkeypatch, no_java) -> None:
    """What "builtin" is in the examples; they work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_builtin", lambda: str(longer_model))


@pytest.mark.parametrize("name", api.__all__)
def test_the_example_of_a_function_runs(name, builtin) -> None:
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(swlora, name), name, globs={})
    assert test.examples, "no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=flags)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)

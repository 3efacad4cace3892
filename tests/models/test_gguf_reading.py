"""gguf's reader of a file is made once, whatever is read of it together."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from gguf.gguf_reader import GGUFReader
from gguf.tensor_mapping import TensorNameMap
from tests.support.gguf_files import write_gguf

from swlora.errors import UserError
from swlora.models.gguf_file import load_gguf, read_gguf_header
from swlora.models.gguf_reading import read_once
from swlora.models.gguf_weights import GgufWeights


@pytest.fixture
def path(make_model, tiny_tokenizer, tmp_path):
    """A model's file."""
    write_gguf(make_model("llama", head_dim=6), tiny_tokenizer, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


@pytest.fixture
def made(monkeypatch):
    """How many readers and tables of names were made, by their class."""
    counts = {GGUFReader: 0, TensorNameMap: 0}
    for kind in counts:

        def counted(self, *args, kind=kind, begin=kind.__init__, **settings):
            counts[kind] += 1
            begin(self, *args, **settings)

        monkeypatch.setattr(kind, "__init__", counted)
    return counts


@pytest.mark.parametrize(
    ("read", "tables"), [(load_gguf, 1), (read_gguf_header, 0), (GgufWeights, 1)]
)
def test_each_is_made_once(read, tables, path, made):
    read(path)
    assert made == {GGUFReader: 1, TensorNameMap: tables}


def test_what_it_says_is_what_gguf_reads(path):
    plain = GGUFReader(path)
    with read_once():
        quick = gguf.GGUFReader(path)
    assert [*quick.fields] == [*plain.fields] and type(quick.data) is np.ndarray
    for name, field in plain.fields.items():
        assert quick.fields[name].contents() == field.contents()
    for one, other in zip(quick.tensors, plain.tensors, strict=True):
        assert one[:2] == other[:2] and one.data.shape == other.data.shape
        assert one.data.tobytes() == other.data.tobytes()


def test_what_is_read_later_is_read_anew(path, make_model, tiny_tokenizer):
    load_gguf(path)
    path.unlink()
    other = make_model("llama", head_dim=6, intermediate_size=56)
    write_gguf(other, tiny_tokenizer, path)
    assert load_gguf(path)[0].config.intermediate_size == 56


def test_gguf_is_left_as_it_was(path):
    before = dict(vars(gguf))
    with read_once(), read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
    assert vars(gguf) == before
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError):
        load_gguf(path)
    assert vars(gguf) == before


def test_threads_read_side_by_side(path):
    before = dict(vars(gguf))
    with ThreadPoolExecutor(4) as pool:
        models = [model for model, _ in pool.map(load_gguf, [path] * 8)]
    first = models[0].state_dict()
    for model in models[1:]:
        torch.testing.assert_close(model.state_dict(), first, rtol=0, atol=0)
    assert vars(gguf) == before

"""Numbers from blocks: bit for bit those of the gguf package, in any stretch and order of rows."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tests.support.gguf_files import random_blocks

from swlora.models import gguf_blocks
from swlora.models.gguf_blocks import StoredMatrix, is_kept

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16")
ROWS, COLUMNS = 37, 768


def stored(name, rng):
    kind = Kind[name]
    if "Q" in name:
        blocks = random_blocks(kind, (ROWS, COLUMNS), rng)
    else:
        numbers = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        blocks = gguf.quantize(numbers, kind).view(np.uint8)
    raw = blocks.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    return StoredMatrix(torch.from_numpy(blocks), kind, COLUMNS), gguf.dequantize(raw, kind)


def same_bits(a, b):
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_every_type(name, dtype, monkeypatch):
    matrix, expected = stored(name, np.random.default_rng(1))
    dense = torch.from_numpy(expected).to(dtype)
    assert np.abs(expected).max() > 0.01
    assert same_bits(matrix.dense(dtype), dense)
    monkeypatch.setattr(gguf_blocks, "CHUNK_VALUES", 5 * COLUMNS)  # 37 rows: uneven stretches
    assert same_bits(matrix.dense(dtype), dense)
    ids = torch.tensor([5, 0, 36, 5, 5, 7, 1])
    assert same_bits(matrix.rows(ids, dtype), dense[ids])
    order = torch.randperm(ROWS)
    turned = StoredMatrix(matrix.blocks, matrix.kind, COLUMNS, order)
    assert same_bits(turned.dense(dtype), dense[order])
    assert same_bits(turned.rows(ids, dtype), dense[order][ids])


def test_types_that_are_not_kept():
    assert all(is_kept(Kind[name]) for name in KINDS)
    assert not is_kept(Kind.IQ4_XS)


def test_numbers_that_are_not_finite_are_counted():
    matrix, _ = stored("Q8_0", np.random.default_rng(1))
    assert matrix.n_not_finite() == 0
    matrix.blocks[36, :2] = 255  # a scale of NaN
    assert matrix.n_not_finite() == 32

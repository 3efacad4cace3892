"""Numbers from the blocks in which a .gguf file stores matrices, a stretch of rows at a time.

Each row is whole blocks of 32 or 256 numbers q, a few bits each, with scales d (and minima m) in
float16 beside them: d q, d q + m, or d s q - m t with small whole s and t. The arithmetic is that
of gguf.dequantize in float32, operation by operation, so the bits are the same; the layouts are
those of llama.cpp's ggml-common.h. Other types (IQ and the like) are left to the gguf package.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

CHUNK_VALUES = 1 << 20  # four mebibytes in float32: enough for two threads, and little memory
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (out, in) as its file stores it.

    blocks (out, bytes of a row) uint8, usually mapped from the file; `order` (out,) int64 says
    which row of them each row of the matrix is, None where they are in its order.
    """

    blocks: Tensor
    kind: Kind
    n_in: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return len(self.blocks), self.n_in

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in), dequantised in float32 and rounded once to `dtype`."""
        return self._dequantised(self.order, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows with these ids (N,) int64, (N, in), as those of `dense` are."""
        return self._dequantised(ids if self.order is None else self.order[ids], dtype)

    def n_not_finite(self) -> int:
        """Return how many of the numbers are NaN or infinite."""
        parts = (dequantise(self.blocks[p], self.kind) for p in self._parts(len(self.blocks)))
        return sum(int((~part.isfinite()).sum()) for part in parts)

    def _dequantised(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        n_out = len(self.blocks) if rows is None else len(rows)
        out = torch.empty(n_out, self.n_in, dtype=dtype)
        for part in self._parts(n_out):
            blocks = self.blocks[part] if rows is None else self.blocks[rows[part]]
            out[part] = dequantise(blocks, self.kind)
        return out

    def _parts(self, n_rows: int) -> Iterator[slice]:
        """Yield stretches of rows that hold about CHUNK_VALUES numbers."""
        step = max(1, CHUNK_VALUES // self.n_in)
        return (slice(start, start + step) for start in range(0, n_rows, step))


def dequantise(blocks: Tensor, kind: Kind) -> Tensor:
    """Return the numbers of rows of blocks (N, bytes of a row) uint8: (N, in), most in float32."""
    if kind in PLAIN:
        return blocks.view(PLAIN[kind])
    n_bytes = GGML_QUANT_SIZES[kind][1]
    return _NUMBERS[kind](blocks.reshape(-1, n_bytes)).view(len(blocks), -1)


def is_kept(kind: Kind) -> bool:
    """Say whether matrices of this type can stay in their blocks."""
    return kind in PLAIN or kind in _NUMBERS


def _half(raw: Tensor, at: int) -> Tensor:
    """Return a float16 of every block in float32, (n, 1)."""
    return raw[:, at : at + 2].view(torch.float16).float()


def _nibbles(raw: Tensor, at: int, width: int) -> Tensor:
    """Return the bytes from `at` on as their low and high halves: (n, groups, 2, width) uint8.

    `width` bytes give as many numbers of low halves, then of high ones.
    """
    n = len(raw)
    low, high = raw & 15, raw >> 4  # over whole blocks: contiguous bytes are quickest
    both = [part[:, at:].unflatten(1, (-1, width)) for part in (low, high)]
    return torch.stack(both, dim=2).view(n, -1, 2, width)


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].view(torch.int8).float().mul_(_half(raw, 0))


def _q4_0(raw: Tensor) -> Tensor:
    return _nibbles(raw, 2, 16).view(-1, 32).float().sub_(8).mul_(_half(raw, 0))


def _q4_1(raw: Tensor) -> Tensor:
    return _nibbles(raw, 4, 16).view(-1, 32).float().mul_(_half(raw, 0)).add_(_half(raw, 2))


def _fifth_bits(raw: Tensor, at: int) -> Tensor:
    """Return 16 where the number's fifth bit is set: bit i of four bytes for number i, (n, 32)."""
    bits = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return raw[:, at : at + 4, None].bitwise_and(bits).ne(0).view(-1, 32).to(torch.uint8) << 4


def _q5_0(raw: Tensor) -> Tensor:
    q = _nibbles(raw[:, 2:].contiguous(), 4, 16).view(-1, 32) | _fifth_bits(raw, 2)
    return q.float().sub_(16).mul_(_half(raw, 0))


def _q5_1(raw: Tensor) -> Tensor:
    q = _nibbles(raw, 8, 16).view(-1, 32) | _fifth_bits(raw, 4)
    return q.float().mul_(_half(raw, 0)).add_(_half(raw, 2))


def _scaled(q: Tensor, raw: Tensor) -> Tensor:
    """Return d s q - m t for q (n, 8, 32), with the six-bit s and t of Q4_K and Q5_K."""
    packed = raw[:, 4:16].unflatten(1, (3, 4))
    first, second, rest = packed.unbind(1)
    s = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], dim=1).float()
    t = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], dim=1).float()
    d, m = s.mul_(_half(raw, 0)), t.mul_(_half(raw, 2))
    return q.float().mul_(d[..., None]).sub_(m[..., None])


def _q4_k(raw: Tensor) -> Tensor:
    return _scaled(_nibbles(raw, 16, 32).view(-1, 8, 32), raw)


def _q5_k(raw: Tensor) -> Tensor:
    q = _nibbles(raw, 48, 32).view(-1, 8, 32)
    fifth = raw[:, 16:48].contiguous()  # bit j of byte i belongs to number i of group j
    for j in range(8):
        q[:, j] |= ((fifth >> j) & 1) << 4
    return _scaled(q, raw)


def _q6_k(raw: Tensor) -> Tensor:
    n = len(raw)
    low = _nibbles(raw[:, :128].contiguous(), 0, 64).view(n, 2, 4, 32)
    two_bits = raw[:, 128:192].contiguous().view(n, 2, 32)
    for k in range(4):
        low[:, :, k] |= ((two_bits >> (2 * k)) & 3) << 4
    d = raw[:, 192:208].view(torch.int8).float().mul_(_half(raw, 208))
    return low.view(n, 16, 16).float().sub_(32).mul_(d[..., None])


_NUMBERS: dict[Kind, Callable[[Tensor], Tensor]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}

"""What a training needs by arithmetic alone: bytes and FLOPs of models on any number of GPUs.

python -m benchmarks.arithmetic        prints the tables of docs/scaling.md; nothing is measured
"""

from dataclasses import dataclass

PEAK_FLOPS = 989e12  # an H100 SXM in bf16, without sparsity
SHARE = 0.4
RANK = 4
LENGTH = 4096
BYTES_A_CHANNEL = 13_950 / 576  # of a token and layer, kept for backward; the embedded model's
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s a GPU": 50e9}


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs; `kv` channels of keys, as many of values."""

    name: str
    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    is_tied: bool = False

    @property
    def maps(self) -> list[tuple[int, int]]:
        """The linear maps of a block, (channels in, channels out)."""
        d, i = self.hidden, self.inner
        return [(d, d), (d, self.kv), (d, self.kv), (d, d), (d, i), (d, i), (i, d)]

    @property
    def in_products(self) -> int:
        """Weights that a token is multiplied with: those of the blocks and of the head."""
        return self.layers * sum(a * b for a, b in self.maps) + self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        return self.in_products + (0 if self.is_tied else self.hidden * self.vocabulary)

    @property
    def trained(self) -> int:
        return RANK * self.layers * sum(a + b for a, b in self.maps)

    @property
    def flops_a_token(self) -> float:
        seen = LENGTH / 2
        return 4 * self.in_products + 12 * self.layers * self.hidden * seen

    @property
    def tokens_a_s(self) -> float:
        return SHARE * PEAK_FLOPS / self.flops_a_token


SHAPES = [
    Shape("0.1 B (SmolLM2)", 30, 576, 1536, 192, 49_152, is_tied=True),
    Shape("1 B (TinyLlama)", 22, 2048, 5632, 256, 32_000),
    Shape("8 B (Llama 3)", 32, 4096, 14_336, 1024, 128_256),
    Shape("70 B (Llama 3)", 80, 8192, 28_672, 1024, 128_256),
]


def main() -> None:
    print(
        "model | weights GB | adapter, gradient, moments MB | kept, GB | GFLOP a token | tokens/s"
    )
    for s in SHAPES:
        kept = BYTES_A_CHANNEL * s.hidden * s.layers * LENGTH
        print(
            f"| {s.name} | {2 * s.weights / 1e9:.2f} | {16 * s.trained / 1e6:.1f} | "
            f"{kept / 1e9:.1f} | {s.flops_a_token / 1e9:.2f} | {s.tokens_a_s:,.0f} |"
        )
    print("model | weights of a GPU, GB at 1, 8, 64, 1,024 | summed MB a step | tokens/s in all")
    for s in SHAPES:
        parts = " | ".join(f"{2 * s.weights / n / 1e9:.3g}" for n in (1, 8, 64, 1024))
        rates = " | ".join(f"{n * s.tokens_a_s:.2g}" for n in (8, 64, 1024))
        print(f"| {s.name} | {parts} | {8 * s.trained / 1e6:.1f} | {rates} |")
    for link, bytes_a_s in LINKS.items():
        # 4 bytes a weight and tree (read twice in bf16) against 4 FLOPs a weight and token
        print(f"{link}: trees of {SHARE * PEAK_FLOPS / bytes_a_s:,.0f} tokens")


if __name__ == "__main__":
    main()

"""What an arm will need of memory, foreseen from its shape; what does not fit is not started.

Ours is the product's own estimate (`training/step_memory.py`) for the largest tree of the steps.
That of the Trainers is an upper bound by hand, for T tokens a step, rows as long as the longest:

    model + adapters + T L (24 D + 10 I) values + 14 T V bytes

L: blocks from the lowest adapted one on, D: width, I: inner width, V: vocabulary. 24 D: what a
block keeps of its states, two norms in float32, queries, keys, values, their rotated copies, and
the inputs of the adapters. 10 I: gate, up, SiLU, their product, and the adapter's input. 14 V:
logits in bfloat16 and float32, their softmax and the gradients, of which a chunked loss keeps a
chunk. Copies of weights that ours makes where room is left are not needed, so not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arms import LORA_RANK, Arm
from benchmarks.token_rows import TokenRows
from benchmarks.trainer_steps import TARGETS

LIBRARIES_BYTES = 800_000_000  # torch, transformers, PEFT and TRL in a process
CHUNK_TOKENS = 512  # of a chunked loss
CHUNKED = ("trl", "unsloth")


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and the bytes that it and the adapters of some layers take."""

    config: Any
    value_bytes: int
    weights_bytes: int
    adapter_bytes: int  # in all its layers: weights, gradients and two moments in float32

    @classmethod
    def of(cls, model_folder: str) -> "Shape":
        """Read the shape of the model in a folder, in the dtype in which it would be trained."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from swlora.models.precision import resolve_dtype

        config = AutoConfig.from_pretrained(model_folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        value_bytes = resolve_dtype("auto", "cpu").itemsize
        maps = [m for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS]
        n_trained = sum(LORA_RANK * sum(m.weight.shape) for m in maps)
        return cls(config, value_bytes, value_bytes * model.num_parameters(), 16 * n_trained)


def refusal(arm: Arm, shape: Shape, rows: TokenRows, free_bytes: int) -> str | None:
    """Say why an arm is not started whose memory is not there, and what would fit; else None."""
    from swlora.disk_space import size

    needed = needed_bytes(arm, shape, rows)
    if needed <= free_bytes:
        return None
    fitting = (
        n
        for n in range(arm.batch - 1, 0, -1)
        if needed_bytes(replace(arm, batch=n), shape, rows) <= free_bytes
    )
    n_fits = next(fitting, None)
    remedy = f"{n_fits} would fit" if n_fits else "not even one would fit"
    return (
        f"not started: {arm.batch} rows a step would need about {size(needed)}, "
        f"and {size(free_bytes)} are free; {remedy}"
    )


def needed_bytes(arm: Arm, shape: Shape, rows: TokenRows) -> int:
    """Return the most bytes that the process of an arm will hold."""
    n_layers = int(shape.config.num_hidden_layers)
    n_with_graph = n_layers - min(arm.layers or (0,))
    always = LIBRARIES_BYTES + shape.weights_bytes + shape.adapter_bytes
    if arm.kind == "ours":
        return always + _ours_bytes(arm, shape, n_with_graph, rows)
    return always + _trainer_bytes(arm, shape, n_with_graph, rows.lengths)


def _ours_bytes(arm: Arm, shape: Shape, n_with_graph: int, rows: TokenRows) -> int:
    from swlora.training.step_memory import rough_memory_of

    n_nodes = _flat_nodes(arm, rows) if arm.layout == "flat" else _tree_nodes(arm, rows)
    memory = rough_memory_of(shape.config, n_with_graph, shape.value_bytes)
    return memory.peak_bytes(n_nodes)


def _tree_nodes(arm: Arm, rows: TokenRows) -> int:
    """Return the nodes of the largest tree of the steps."""
    from swlora.config import TrainSpec
    from swlora.data.prefix_tree import count_group_nodes
    from swlora.data.token_sequences import TokenSequences
    from swlora.training.schedule import step_plan

    sequences = TokenSequences(rows.tokens, rows.offsets, rows.trained)
    steps = step_plan(sequences, TrainSpec(batch_size=arm.batch), 0)(0)
    return int(count_group_nodes(sequences, [ids for groups in steps for ids in groups]).max())


def _flat_nodes(arm: Arm, rows: TokenRows) -> int:
    from swlora.config import TrainSpec

    longest = sorted(rows.lengths)[-arm.batch :]
    return max(longest[-1], min(sum(longest), TrainSpec().row_tokens))


def _trainer_bytes(arm: Arm, shape: Shape, n_with_graph: int, lengths: Sequence[int]) -> int:
    config, n_tokens = shape.config, arm.batch * max(lengths)
    block = n_with_graph * (24 * config.hidden_size + 10 * config.intermediate_size)
    n_scored = min(n_tokens, CHUNK_TOKENS) if arm.kind in CHUNKED else n_tokens
    kept = n_tokens * block * shape.value_bytes + n_scored * 14 * config.vocab_size
    if arm.kind != "unsloth":
        return int(kept)
    # Its loss is held against that of a second model, which makes all logits.
    return int(shape.weights_bytes + max(kept, n_tokens * 14 * config.vocab_size))

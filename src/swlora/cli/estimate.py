"""`swlora train --dry-run`: what a training would do and take, for a person."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from swlora.cli.command import Invocation
from swlora.cli.show import show_table
from swlora.disk_space import size
from swlora.interrupts import sigterm_interrupts
from swlora.layer_policy import layer_ranges
from swlora.plural import counted
from swlora.progress import duration

if TYPE_CHECKING:
    from swlora.estimate import Estimate

Line = tuple[str, str]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="say what the training would do, and take of memory, time and disk; a few steps are "
        "run for that, and nothing is written (but --json)",
    ),
]


def estimated(invocation: Invocation) -> "Estimate":
    """Look at a training before it is begun; print what it would take and return it."""
    from swlora.estimate import estimate_training

    with sigterm_interrupts():
        found = estimate_training(invocation.dry_job())
    show_table(estimate_lines(found))
    return found


def estimate_lines(found: "Estimate") -> list[Line]:
    """Return what a person reads, as names and values."""
    share = 100 * found.n_trainable / found.n_weights
    rank = f" of rank {found.rank}" if found.rank else ""
    assumed = (
        f" (assumed: {found.layers_found_by} finds them first)" if found.layers_found_by else ""
    )
    return [
        ("model", f"{found.model}; {counted(found.n_weights, 'weight')}, {found.dtype}"),
        ("adapter", f"{found.method}{rank} in layers {layer_ranges(found.layers)}{assumed}"),
        ("", f"on {_maps(found)}: {found.n_trainable:,} weights are trained, {share:.2g} %"),
        ("data", f"{found.data}; {counted(found.n_rows, 'row')}"),
        ("steps", _steps(found)),
        ("", _rate(found)),
        *_memory(found),
        ("time", _time(found)),
        ("disk", _disk(found)),
        *([("refused", found.refused)] if found.refused else []),
    ]


def _maps(found: "Estimate") -> str:
    """Name the adapted maps of a block, and how many they are in all layers."""
    names = [name.rpartition(".")[2] for name in found.maps]
    names = names if len(set(names)) == len(names) else list(found.maps)
    return f"{', '.join(names)} ({counted(sum(found.maps.values()), 'map')})"


def _rate(found: "Estimate") -> str:
    if found.learning_rate is None:
        return f"at the learning rate of {found.learning_rate_of}"
    return f"at a learning rate of {found.learning_rate:g}"


def _steps(found: "Estimate") -> str:
    epochs, tokens = counted(found.n_epochs, "epoch"), counted(found.n_tokens, "token")
    said = f"{found.n_steps:,} in {epochs}, {tokens}"
    if found.n_nodes is None:
        return f"{said}, in padded batches"
    ratio = found.n_tokens / found.n_nodes
    return f"{said}; {found.n_nodes:,} once what rows share is run together ({ratio:.2f} : 1)"


def _memory(found: "Estimate") -> Sequence[Line]:
    if (memory := found.memory) is None:
        return [
            ("memory", "-" if found.refused else "not foreseen on a GPU, nor with padded batches")
        ]
    name, n_bytes = max(memory.in_turns, key=lambda part: part[1])
    rest = (
        f"{name}, {counted(memory.step_tokens, 'token')} at once"
        if name == "largest step"
        else name
    )
    parts = [
        (memory.process_bytes, "libraries and data"),
        (memory.weights_bytes, "weights"),
        (memory.copies_bytes, "copies of weights, which make products faster"),
        (memory.adapter_bytes, "adapter, its gradients and the optimizer"),
        (n_bytes, rest),
    ]
    peak = f"{size(memory.peak_bytes)} at the peak; {size(memory.free_bytes)} are free now"
    return [("memory", peak), *(("", f"{size(n):>7}  {said}") for n, said in parts if n)]


def _time(found: "Estimate") -> str:
    if (time := found.time) is None:
        return "-"
    probed = "one that was" if time.probed_steps == 1 else f"{time.probed_steps} that were"
    return (
        f"about {duration(time.train_s)}, held-out rows included: "
        f"{counted(found.n_steps, 'step')} of about {time.step_s:.2g} s, by {probed} run"
    )


def _disk(found: "Estimate") -> str:
    parts = ", ".join(f"{size(n)} {what}" for what, n in found.disk.items() if n)
    said = f"{size(sum(found.disk.values()))} in the run folder ({parts})"
    if found.kept_states_bytes:
        said += f"; {size(found.kept_states_bytes)} of kept states in the cache"
        if found.missing_states_bytes < found.kept_states_bytes:
            said += f", {size(found.missing_states_bytes)} of them new"
    return said

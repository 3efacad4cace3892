"""`swlora merge`: an adapter and its base as one plain model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swlora.cli.command import CONFIG, JSON, Invocation
from swlora.cli.verbs import verb
from swlora.command_settings import SETTINGS
from swlora.disk_space import size
from swlora.interrupts import sigterm_interrupts

if TYPE_CHECKING:
    from swlora.deploy.merge import Merged


@verb(
    "merge",
    *(CONFIG, JSON),
    settings=SETTINGS["merge"],
    defaults={"model.name": "the one that the adapter was trained on"},
)
def merge(
    invocation: Invocation,
    adapter: Annotated[Path, typer.Option(help="adapter or run folder")],
    output: Annotated[Path, typer.Option(help="folder of the merged model, new or empty")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of the merged weights [default: the base's own]", show_default=False),
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="largest file of weights")] = 5.0,
    force: Annotated[
        bool,
        typer.Option("--force", help="also where the adapter was trained on other weights"),
    ] = False,
) -> None:
    """Add an adapter to its base's weights: a plain transformers model, proved to be the same.

    The sum is made in float32 and rounded once. What was written is loaded and compared with base
    and adapter on held text; where it differs by more than rounding does, nothing is kept.

    Example: `swlora merge --adapter runs/mine --output merged`

    Example: `swlora merge --adapter runs/mine --output merged --dtype bfloat16 --json report.json`
    """
    from swlora.deploy.merge import merge as merged_by
    from swlora.deploy.merge import merge_request

    spec = invocation.spec.model
    request = merge_request(adapter, output, spec, dtype, shard_gb, force=force)
    with sigterm_interrupts():
        merged = merged_by(request, invocation.progress)
    _show(merged)
    invocation.finish(merged)


def _show(merged: "Merged") -> None:
    print(f"changed weights: {merged.n_changed_weights:,}, written in {merged.dtype}")
    found, limit = merged.agreement, merged.tolerance_kl_nats_per_token
    print(f"largest difference of logits: {found.largest_logit_difference:.3g}")
    print(f"KL: {found.kl_nats_per_token:.3g} nats a token (at most {limit:g} is rounding)")
    share = found.share_of_equal_top_tokens
    print(f"equal top tokens: {share:.1%} of {found.n_tokens:,}")
    print(f"equal greedy continuations: {found.n_equal_continuations} of {found.n_continuations}")
    n_files = f" in {merged.files} files" if merged.files > 1 else ""
    print(f"merged model: {merged.output} ({size(merged.weights_bytes)}{n_files})")

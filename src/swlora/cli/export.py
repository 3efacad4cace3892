"""`swlora export`: a model, or a LoRA alone, as a GGUF file for llama.cpp and its kin."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swlora.cli.command import JSON, Invocation
from swlora.cli.verbs import verb
from swlora.command_settings import SETTINGS
from swlora.deploy.export_request import export_request
from swlora.disk_space import size
from swlora.interrupts import sigterm_interrupts

if TYPE_CHECKING:
    from swlora.deploy.gguf_export import Exported


@verb("export", JSON, settings=SETTINGS["export"])
def export(
    invocation: Invocation,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", dir_okay=False, help="write the model to this file")
    ] = None,
    gguf_lora: Annotated[
        Path | None,
        typer.Option("--gguf-lora", dir_okay=False, help="write the adapter alone to this file"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="with --gguf-lora: adapter or run folder")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16, bf16 or q8_0 [default: f16; of an adapter, f32]"),
    ] = None,
    base_gguf: Annotated[
        Path | None,
        typer.Option("--base-gguf", help="with --gguf: take metadata and tokenizer from this file"),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            help="folder with node-llama-cpp, in which the file is run "
            "[default: SWLORA_LLAMA_CPP, or a node_modules here or above]",
        ),
    ] = None,
) -> None:
    """Write a model or a LoRA as a GGUF file, and run it before it gets its name.

    llama.cpp continues eight prompts, and must write what the model does; without one the file is
    read back, and settings, tokens and logits are compared. What was found is in FILE.report.json.
    A file that computes something else is not kept.

    Example: `swlora export --gguf mine.gguf --model merged --type q8_0`

    Example: `swlora export --gguf-lora mine-lora.gguf --model builtin --adapter runs/mine`
    """
    paths = (gguf, gguf_lora, adapter, base_gguf, llama_cpp)
    request = export_request(invocation.spec.model, *paths, kind=kind)
    from swlora.deploy.gguf_export import export as export_model

    with sigterm_interrupts():
        exported = export_model(request, invocation.progress)
    _show(exported, request.output)
    invocation.finish(exported)


def _show(exported: "Exported", output: Path) -> None:
    check = exported.check
    print(f"{output}: {exported.architecture}, {exported.type}, {size(exported.n_bytes)}")
    print(f"checked by {check.by}:")
    print(f"  {check.agreement}")
    if check.largest_gap_nats:
        print(
            "  where continuations part, the model finds its own token likelier by "
            f"{check.largest_gap_nats:.2g} nats at most"
        )
    if (effect_nats := check.adapter_kl_nats_per_token) is not None:
        print(f"  the adapter moves its base by {effect_nats:.2g} nats a token")
    if (rounding := check.rounding) is not None:
        print(
            f"what {exported.type} costs, its weights beside the model's own: KL "
            f"{rounding.kl_nats_per_token:.2g} nats a token, "
            f"{rounding.share_of_equal_top_tokens:.1%} of {rounding.n_tokens:,} top tokens equal"
        )
    print(f"report: {output.name}.report.json")

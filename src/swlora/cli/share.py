"""The commands that take a model where it runs: to the Hub and from it, and to Ollama."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swlora.cli.command import JSON, Invocation
from swlora.cli.verbs import verb
from swlora.disk_space import size
from swlora.errors import UserError
from swlora.interrupts import sigterm_interrupts
from swlora.plural import counted
from swlora.printable import escaped

if TYPE_CHECKING:
    from swlora.deploy.hub_push import PushPlan

HF_MODEL = Annotated[Path | None, typer.Option("--model", help="a merged model's folder")]


@verb("push", JSON)
def push(
    invocation: Invocation,
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the Hub; made where there is none")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="adapter or run folder to publish")
    ] = None,
    model: HF_MODEL = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    revision: Annotated[
        str | None, typer.Option(help="branch to publish on, made where there is none")
    ] = None,
    message: Annotated[str | None, typer.Option(help="message of the commit")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="run folder of `swlora eval`, for the card's scores")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="the Hub's id of the licence, as apache-2.0, for the card"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and list the files, show the card, send none")
    ] = False,
) -> None:
    """Publish an adapter or a merged model on the Hugging Face Hub, with its card.

    Published are weights in safetensors and GGUF, configuration, tokenizer, reports and the card
    README.md; checkpoints, logs and data are not. The login is the Hub's own: `hf auth login`.

    Example: `swlora push --adapter runs/mine --repo mary/my-lora --private --dry-run`

    Example: `swlora push --model merged --repo mary/my-model --license apache-2.0`
    """
    from swlora.deploy import hub_push
    from swlora.deploy.hub_card import CardSources

    plan = hub_push.plan_push(repo, adapter, model, CardSources(scores, licence))
    _show_plan(plan)
    if dry_run:
        print(f"\n{plan.card}" if plan.writes_card else "the card README.md is yours, as it is")
        print("nothing was sent")
        invocation.finish(plan)
        return
    with sigterm_interrupts():
        pushed = hub_push.push(
            plan, private=private, revision=revision, message=message, progress=invocation.progress
        )
    seen = "private" if pushed.is_private else "public"
    print(f"published ({seen}): {pushed.url}")
    print(f"commit on {pushed.revision}: {pushed.commit}")
    print(f"back with: swlora pull {plan.repo} --revision {pushed.commit} --output FOLDER")
    invocation.finish(pushed)


@verb("pull", JSON)
def pull(
    invocation: Invocation,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub")],
    output: Annotated[Path, typer.Option(help="new folder, complete or absent")],
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit [default: the newest]")
    ] = None,
    max_gb: Annotated[float, typer.Option(min=0, help="refuse what is larger")] = 20.0,
) -> None:
    """Take a model, an adapter or GGUF files from the Hugging Face Hub into a folder.

    Only safetensors, GGUF, JSON, text, templates and tokenizers are taken, never pickles or code.
    Every file is held against the Hub's hash of it; swlora-pull.json names the commit.

    Example: `swlora pull mary/my-lora --output adapters/mary`
    """
    from swlora.deploy import hub_pull

    with sigterm_interrupts():
        pulled = hub_pull.pull(repo, revision, output, max_gb=max_gb, progress=invocation.progress)
    _show_sizes(pulled.n_bytes)
    _show_left_out(pulled.left_out)
    print(f"{pulled.kind} of {repo} at {pulled.commit}: {output}")
    invocation.finish(pulled)


@verb("package", JSON)
def package(
    invocation: Invocation,
    gguf: Annotated[Path, typer.Option(help="the model as GGUF")],
    model: Annotated[
        str, typer.Option("--model", help="what the GGUF was made of: merged folder, base, builtin")
    ],
    output: Annotated[Path, typer.Option(help="new folder, complete or absent")],
    ollama: Annotated[bool, typer.Option("--ollama", help="for Ollama: write a Modelfile")] = False,
    gguf_lora: Annotated[
        Path | None, typer.Option(help="an adapter as GGUF, to be applied to it")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="prompts are chats, or passed on as they are [default: chats, where the model "
            "has a chat template and its merged adapter was trained on chats]",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="a Go template of your own, where none can be made")
    ] = None,
    system: Annotated[str | None, typer.Option(help="the system turn of every chat")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="of sampling [default: Ollama's]")
    ] = None,
    num_ctx: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of context [default: the model's, at most 8192]"),
    ] = None,
) -> None:
    """Put a GGUF model where Ollama takes it: a folder with a Modelfile that says all it needs.

    The chat template is translated into Ollama's language and compared with the model's own; one
    that cannot be translated exactly is refused. For an adapter that was trained on prompts and
    completions give `--no-chat`.

    Example: `swlora package --ollama --gguf tuned.gguf --model merged --output ollama/tuned`
    """
    from swlora.config import ModelSpec
    from swlora.deploy import ollama as deploy

    if not ollama:
        raise UserError("swlora package makes folders for Ollama so far: give --ollama")
    if template is not None and chat is False:
        raise UserError("--no-chat writes no template; leave --template out")
    settings = deploy.Settings(chat, template, system, temperature, num_ctx)
    packaged = deploy.package(gguf, gguf_lora, ModelSpec(name=model), output, settings)
    for name, how in packaged.files.items():
        print(f"{output / name} ({'a hard link' if how == 'link' else 'a copy'})")
    print(f"{output / deploy.MODELFILE}")
    for note in packaged.notes:
        print(f"note: {note}")
    print("run it with:", *packaged.commands, sep="\n  ")
    invocation.finish(packaged)


def _show_plan(plan: "PushPlan") -> None:
    print(f"{plan.kind} in {plan.folder}, for {plan.repo}")
    _show_sizes(plan.n_bytes)
    _show_left_out(plan.left_out)
    for change in plan.changes:
        print(f"note: {escaped(change)}")


def _show_sizes(n_bytes: dict[str, int]) -> None:
    from swlora.cli.show import show_table

    total = (counted(len(n_bytes), "file"), size(sum(n_bytes.values())))
    show_table([*((escaped(name), size(n)) for name, n in n_bytes.items()), total])


def _show_left_out(names: list[str]) -> None:
    if names:
        print(f"left out: {', '.join(map(escaped, names))}")

"""The commands: each function parses, calls one function of the pipeline and shows the result."""

from pathlib import Path
from typing import Annotated

import typer

from swlora import caches
from swlora.cli import chat, export, merge, share, start
from swlora.cli.command import (
    CONFIG,
    JSON,
    OUTPUT,
    OUTPUT_IF_ASKED,
    PROCESSES,
    RESUME,
    Invocation,
)
from swlora.cli.estimate import DryRun, estimated
from swlora.cli.process import no_library_notes
from swlora.cli.show import (
    show_candidates,
    show_evaluation,
    show_recovered,
    show_scores,
    show_training,
)
from swlora.cli.verbs import Adapter, Metrics, app, named_metric, verb
from swlora.command_settings import SETTINGS
from swlora.errors import UserError
from swlora.interrupts import sigterm_interrupts

__all__ = ["app", "export", "merge", "share", "start"]


@verb("identify", OUTPUT, PROCESSES, CONFIG, JSON, settings=SETTINGS["identify"])
def identify(
    invocation: Invocation,
    figure: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="PNG, SVG or PDF [default: in the run folder]"),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="adapter or run folder: the same once more with it in the weights, and both side "
            "by side; takes twice as long",
        ),
    ] = None,
) -> None:
    """Find super weights, prove each by setting it to zero, and measure how they work.

    Example: `swlora identify --model builtin --figure spikes.png --json found.json`

    Example: `swlora identify --model builtin --adapter runs/mine --deep`
    """
    with invocation.job() as job:
        from swlora import pipeline

        result = pipeline.identify(job, figure, adapter)
    show_candidates(result)
    invocation.finish(result)


@verb(
    "train",
    *(OUTPUT, RESUME, PROCESSES, CONFIG, JSON),
    settings=SETTINGS["train"],
)
def train(invocation: Invocation, dry_run: DryRun = False) -> None:
    """Train a LoRA adapter in the chosen layers.

    Example: `swlora train --model builtin --dataset e2e-dataset --layers every:4 --output run`

    Example: `swlora train --model builtin --dataset e2e-dataset --dry-run --json estimate.json`
    """
    if dry_run:
        invocation.finish(estimated(invocation))
        return
    with invocation.job() as job:
        from swlora import pipeline

        result = pipeline.train(job)
    show_training(result)
    invocation.finish(result)


@verb("recover", JSON)
def recover(
    invocation: Invocation,
    run: Annotated[Path, typer.Argument(help="the folder of a training that did not end")],
    output: Annotated[Path, typer.Option(help="folder of the adapter that is made")],
) -> None:
    """Make an adapter of the newest checkpoint of a training that failed or was stopped.

    The run is left as it is, and can still be continued with `--resume`.

    Example: `swlora recover runs/mine --output rescued`
    """
    from swlora.recovery import recover as recover_adapter

    result = recover_adapter(run, output, invocation.progress)
    show_recovered(result)
    invocation.finish(result)


@verb("data", CONFIG, JSON, settings=SETTINGS["data"])
def data(
    invocation: Invocation,
    rows: Annotated[int, typer.Option(min=0, help="training rows that are shown")] = 3,
) -> None:
    """Show what would be trained: rows as the model sees them, counts, lengths, what is shared.

    Nothing is trained, and of the model only tokenizer and configuration are read. Bad and
    over-long rows are counted, and not refused as a training does.

    Example: `swlora data --model builtin --dataset rows.jsonl --rows 5`

    Example: `swlora data --model builtin --dataset e2e-dataset --split test --json data.json`
    """
    from swlora.cli.data import show_preview
    from swlora.preview import preview_data

    result = preview_data(invocation.spec, rows, invocation.progress)
    show_preview(result)
    invocation.finish(result)


@verb("eval", OUTPUT, PROCESSES, CONFIG, JSON, settings=SETTINGS["eval"])
def evaluate(invocation: Invocation, adapter: Adapter = None, metrics: Metrics = None) -> None:
    """Generate for every prompt and score the texts; measure the loss of the references.

    Scores are exact match, token F1, chrF, sacrebleu's BLEU and ROUGE-L; with E2E data or several
    references of a prompt the official five of E2E as well. Documents have a loss only.

    Example: `swlora eval --model builtin --adapter run --dataset e2e-dataset --split test`

    Example: `swlora eval --adapter run --dataset rows.jsonl --metrics mine.py:share_of_json`
    """
    metric = named_metric(metrics)
    with invocation.job() as job:
        from swlora import pipeline

        result = pipeline.evaluate_adapter(job, adapter, metric)
    show_evaluation(result)
    invocation.finish(result)


@verb(
    "train-eval",
    *(OUTPUT, RESUME, PROCESSES, CONFIG, JSON),
    settings=SETTINGS["train-eval"],
)
def train_evaluate(
    invocation: Invocation, metrics: Metrics = None, dry_run: DryRun = False
) -> None:
    """Train an adapter, then evaluate it.

    Example: `swlora train-eval --model builtin --dataset sample --layers super --output run`
    """
    metric = named_metric(metrics)
    if dry_run:
        invocation.finish(estimated(invocation))
        return
    with invocation.job() as job:
        from swlora import pipeline

        trained, evaluated = pipeline.train_evaluate(job, metric)
    show_training(trained)
    show_evaluation(evaluated)
    invocation.finish({"train": trained, "eval": evaluated})


@verb("compare", JSON)
def compare(
    invocation: Invocation,
    config: Annotated[Path, typer.Option(help="YAML with the study, such as studies/e2e.yaml")],
    output: Annotated[
        Path | None, typer.Option(help="folder, made or continued [default: runs/NAME-OF-CONFIG]")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="run these arms only: lora,super,super-last")
    ] = None,
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="chosen layers get no controls; reported as such")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the plan, run nothing")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto|local",
            help="make the runs on this Ray cluster, many at a time; local starts one here",
        ),
    ] = None,
    ray_cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPUs of a run there [default: a machine's, or a GPU's share]"),
    ] = None,
) -> None:
    """Compare methods and choices of layers: several seeds, controls, intervals.

    The same command again goes on where it stopped.

    Example: `swlora compare --config studies/e2e.yaml --output runs/e2e`
    """
    from swlora.study import compare as study
    from swlora.study import overview

    overrides = {"controls": False if no_controls else None}
    if ray_cpus is not None and ray is None:
        raise UserError("--ray-cpus is for runs on a Ray cluster: give --ray too")
    where = None if ray is None else study.RayAddress(ray, ray_cpus)
    request = study.Request(config, output or Path("runs") / config.stem, only, overrides, where)
    no_library_notes()
    if dry_run:
        plans = study.plan(request)
        overview.show_plans(plans)
        invocation.finish(plans)
    else:
        with sigterm_interrupts():
            result = study.compare(request)
        overview.show_results(result, request.output)
        invocation.finish(result)


@verb("score", OUTPUT_IF_ASKED, JSON)
def score(
    invocation: Invocation,
    predictions: Annotated[Path, typer.Option(help="one output a line, in the MRs' order")],
    references: Annotated[
        Path, typer.Option(help="E2E CSV, or groups of lines separated by blank lines")
    ],
) -> None:
    """Score existing outputs; no model is involved.

    Example: `swlora score --predictions out.txt --references testset_w_refs.csv`
    """
    from swlora.evaluation.scoring_files import score_files

    result = invocation.recorded(lambda: score_files(predictions, references))
    show_scores(result)
    invocation.finish(result)


@verb("generate", OUTPUT_IF_ASKED, CONFIG, JSON, settings=SETTINGS["generate"])
def generate(
    invocation: Invocation,
    prompt: Annotated[str, typer.Option(help="the text to continue, or the message to answer")],
    adapter: Adapter = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="write the prompt as a user's turn, by the tokenizer's chat template "
            "[default: as the adapter was trained]",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="a system turn before the prompt; implies --chat")
    ] = None,
) -> None:
    """Generate text from the base model or an adapter.

    Example: `swlora generate --model builtin --adapter run --prompt "name[Aromi], area[riverside]"`
    """
    from swlora.evaluation.prompting import Prompt, generate_text

    spec, asked = invocation.spec, Prompt(prompt, chat, system)
    result = invocation.recorded(lambda: generate_text(spec, asked, adapter, invocation.progress))
    typer.echo(result.text)
    invocation.finish(result)


@verb(
    "chat",
    *(CONFIG, JSON),
    settings=SETTINGS["chat"],
    defaults={f"decode.{name}": value for name, value in chat.DEFAULTS.items()},
)
def talk(
    invocation: Invocation,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="a system turn before the first one")] = None,
) -> None:
    """Talk with a model or an adapter; /help lists what else can be typed.

    Example: `swlora chat --model builtin --adapter run --system "Answer in one sentence."`
    """
    invocation.finish(chat.talk(invocation.spec, adapter, system, invocation.progress))


@verb("serve", CONFIG, settings=SETTINGS["serve"])
def serve(invocation: Invocation) -> None:
    """Serve the web page and an API like OpenAI's.

    Example: `swlora serve --model builtin --runs runs`
    """
    from swlora.web import server

    server.serve(invocation.spec, lambda: invocation.progress)


@verb("cache", JSON)
def cache(
    invocation: Invocation,
    clear: Annotated[
        str | None,
        typer.Option(help=f"remove all, or some of {', '.join(caches.KINDS)} (comma-separated)"),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="only what was not used for so long: 90m, 12h, 7d, 2w")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="with --clear: do not ask")] = False,
) -> None:
    """List what swlora keeps in its cache folder, and clear it.

    What is in use is never removed; what is removed is made again when it is needed.

    Example: `swlora cache --clear prefix --older-than 7d`
    """
    from swlora.cli.cache import list_and_clear

    invocation.finish(list_and_clear(clear, older_than, yes=yes))

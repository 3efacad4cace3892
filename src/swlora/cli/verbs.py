"""The commands: each parses, calls one function of the pipeline and shows the result."""

from pathlib import Path
from typing import Annotated

import typer

from swlora.cli.app import (
    Adapter,
    Config,
    Debug,
    Json,
    Output,
    OutputIfAny,
    Overrides,
    Resume,
    app,
)
from swlora.cli.flags import (
    ADAPTER,
    DATA,
    DECODE,
    EVAL_DATA,
    EVALUATION,
    IDENTIFY,
    MODEL,
    SERVE,
    TRAIN,
    with_flags,
)
from swlora.cli.jobs import (
    finish,
    no_library_notes,
    open_job,
    progress,
    quiet_or_job,
    sigterm_interrupts,
)
from swlora.cli.show import show_candidates, show_scores, show_training
from swlora.config import load_spec


@app.command("identify")
@with_flags(*MODEL, *IDENTIFY, "seed")
def identify_command(
    overrides: Overrides,
    figure: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="PNG, SVG or PDF [default: in the run folder]"),
    ] = None,
    output: Output = None,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Find super weights and prove each by setting it to zero.

    Example: `swlora identify --model builtin --figure spikes.png --json found.json`
    """
    with open_job("identify", output, config, overrides) as job:
        from swlora import pipeline

        result = pipeline.identify(job, figure)
    show_candidates(result)
    finish(result, json, job)


@app.command("train")
@with_flags(*MODEL, *DATA, *ADAPTER, *TRAIN, *IDENTIFY, "seed")
def train_command(
    overrides: Overrides,
    output: Output = None,
    resume: Resume = False,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Train a LoRA adapter in the chosen layers.

    Example: `swlora train --model builtin --dataset e2e-dataset --layers last:4 --output run`
    """
    with open_job("train", output, config, overrides, resume) as job:
        from swlora import pipeline

        _, result = pipeline.train(job)
    show_training(result)
    finish(result, json, job)


@app.command("eval")
@with_flags(*MODEL, *EVAL_DATA, *EVALUATION, *DECODE, "seed")
def eval_command(
    overrides: Overrides,
    adapter: Adapter = None,
    output: Output = None,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Generate for every prompt and score with the official E2E metrics.

    Example: `swlora eval --model builtin --adapter run --dataset e2e-dataset --split test`
    """
    with open_job("eval", output, config, overrides) as job:
        from swlora import pipeline

        result = pipeline.evaluate_adapter(job, adapter)
    show_scores(result)
    finish(result, json, job)


@app.command("train-eval")
@with_flags(*MODEL, *DATA, *EVALUATION, *ADAPTER, *TRAIN, *DECODE, *IDENTIFY, "seed")
def train_eval_command(
    overrides: Overrides,
    output: Output = None,
    resume: Resume = False,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Train an adapter, then evaluate it.

    Example: `swlora train-eval --model builtin --dataset sample --layers super --output run`
    """
    with open_job("train-eval", output, config, overrides, resume) as job:
        from swlora import pipeline

        result = pipeline.train_evaluate(job)
    show_training(result["train"])
    show_scores(result["eval"])
    finish(result, json, job)


@app.command("compare")
def compare_command(
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
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Compare methods and choices of layers: several seeds, controls, intervals.

    The same command again goes on where it stopped.

    Example: `swlora compare --config studies/e2e.yaml --output runs/e2e`
    """
    from swlora.study import compare, overview

    overrides = {"controls": False if no_controls else None}
    request = compare.Request(config, output or Path("runs") / config.stem, only, overrides)
    no_library_notes()
    if dry_run:
        result = compare.plan(request)
        overview.show_plans(result)
    else:
        with sigterm_interrupts():
            result = compare.compare(request)
        overview.show_results(result, request.output)
    finish(result, json, None)


@app.command("score")
def score_command(
    predictions: Annotated[Path, typer.Option(help="one output a line, in the MRs' order")],
    references: Annotated[
        Path, typer.Option(help="E2E CSV, or groups of lines separated by blank lines")
    ],
    output: OutputIfAny = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Score existing outputs; no model is involved.

    Example: `swlora score --predictions out.txt --references testset_w_refs.csv`
    """
    with quiet_or_job("score", output, None, {}) as job:
        from swlora.evaluation.scoring_files import score_files

        result = score_files(predictions, references)
    show_scores(result)
    finish(result, json, job)


@app.command("generate")
@with_flags(*MODEL, *DECODE, "seed")
def generate_command(
    overrides: Overrides,
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
    output: OutputIfAny = None,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Generate text from the base model or an adapter.

    Example: `swlora generate --model builtin --adapter run --prompt "name[Aromi], area[riverside]"`
    """
    with quiet_or_job("generate", output, config, overrides) as job:
        from swlora.evaluation.prompting import Prompt, generate_text

        spec, asked = load_spec(config, overrides), Prompt(prompt, chat, system)
        result = generate_text(spec, asked, adapter, progress())
    typer.echo(result["text"])
    finish(result, json, job)


@app.command("serve")
@with_flags(*MODEL, *SERVE)
def serve_command(overrides: Overrides, config: Config = None, debug: Debug = False) -> None:
    """Serve the web page and an API like OpenAI's.

    Example: `swlora serve --model builtin --runs runs`
    """
    from swlora.web.server import serve

    serve(load_spec(config, overrides), progress)

"""The command line: each verb parses, calls one function of the pipeline and shows the result.

Exit codes: 0 done, 2 usage or bad input, 1 failure, 130 interrupted.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from swlora.cli_flags import (
    ADAPTER,
    DATA,
    DECODE,
    IDENTIFY,
    MODEL,
    SERVE,
    TRAIN,
    flag_name,
    with_flags,
)
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.results import show_candidates, show_scores, show_training

if TYPE_CHECKING:
    from swlora.pipeline import Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Fine-tune language models with LoRA fast, and find their super weights.\n\n"
        "The whole job on a real model: `swlora train-eval --model builtin --layers super`"
    ),
)

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these settings; flags win")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="also write the result here, as JSON"),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="run folder [default: runs/COMMAND-TIME]")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of a failure")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the unfinished run in --output")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="adapter or run folder [default: the base model]")
]
Overrides = dict[str, Any]


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
    with _job("identify", output, config, overrides) as job:
        from swlora import pipeline

        result = pipeline.identify(job, figure)
    show_candidates(result)
    _finish(result, json, job)


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
    with _job("train", output, config, overrides, resume) as job:
        from swlora import pipeline

        _, result = pipeline.train(job)
    show_training(result)
    _finish(result, json, job)


@app.command("eval")
@with_flags(*MODEL, *DATA, *DECODE, "seed")
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
    with _job("eval", output, config, overrides) as job:
        from swlora import pipeline

        result = pipeline.evaluate_adapter(job, adapter)
    show_scores(result)
    _finish(result, json, job)


@app.command("train-eval")
@with_flags(*MODEL, *DATA, *ADAPTER, *TRAIN, *DECODE, *IDENTIFY, "seed")
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
    with _job("train-eval", output, config, overrides, resume) as job:
        from swlora import pipeline

        result = pipeline.train_evaluate(job)
    show_training(result["train"])
    show_scores(result["eval"])
    _finish(result, json, job)


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
    _quiet_libraries()
    if dry_run:
        result = compare.plan(request)
        overview.show_plans(result)
    else:
        with _sigterm_interrupts():
            result = compare.compare(request)
        overview.show_results(result, request.output)
    _finish(result, json, None)


@app.command("score")
@with_flags("seed")
def score_command(
    overrides: Overrides,
    predictions: Annotated[Path, typer.Option(help="one output a line, in the MRs' order")],
    references: Annotated[
        Path, typer.Option(help="E2E CSV, or groups of lines separated by blank lines")
    ],
    output: Output = None,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Score existing outputs; no model is involved.

    Example: `swlora score --predictions out.txt --references testset_w_refs.csv`
    """
    with _quiet_or_job("score", output, config, overrides) as job:
        from swlora.evaluation.scoring_files import score_files

        result = score_files(predictions, references)
    show_scores(result)
    _finish(result, json, job)


@app.command("generate")
@with_flags(*MODEL, *DECODE, "seed")
def generate_command(
    overrides: Overrides,
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    adapter: Adapter = None,
    output: Output = None,
    config: Config = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Generate text from the base model or an adapter.

    Example: `swlora generate --model builtin --adapter run --prompt "name[Aromi], area[riverside]"`
    """
    with _quiet_or_job("generate", output, config, overrides) as job:
        from swlora.pipeline import generate_text

        spec = load_spec(config, overrides)
        result = generate_text(spec, prompt, adapter, _progress())
    typer.echo(result["text"])
    _finish(result, json, job)


@app.command("serve")
@with_flags(*MODEL, *SERVE)
def serve_command(overrides: Overrides, config: Config = None, debug: Debug = False) -> None:
    """Serve the web page and an API like OpenAI's.

    Example: `swlora serve --model builtin --runs runs`
    """
    from swlora.web.server import serve

    serve(load_spec(config, overrides), _progress)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it has its own, changing, ways with interruptions and errors.
        with command.make_context("swlora", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
    except UserError as error:
        _fail(error, error.exit_code, arguments)
    except KeyboardInterrupt as error:
        _fail(error, 130, arguments)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's
            _fail_usage(error)
        _fail(error, 1, arguments)


def _fail_usage(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        verb = error.ctx.command_path if getattr(error, "ctx", None) else "swlora"
        message = error.format_message().rstrip(".")
        print(f"swlora: {message}; see {verb} --help", file=sys.stderr)
    raise SystemExit(2)


def _fail(error: BaseException, exit_code: int, arguments: Sequence[str]) -> NoReturn:
    if "--debug" in arguments:
        raise error
    if isinstance(error, UserError):
        message = str(error)
    elif exit_code == 130:
        message = str(error) or "interrupted"
    else:
        text = " ".join(str(error).split())[:300]
        message = f"{type(error).__name__}: {text} (--debug shows where)"
    print(f"swlora: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def _progress() -> Any:
    from swlora.terminal import make_progress

    _quiet_libraries()
    return make_progress()


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def _job(
    command: str,
    output: Path | None,
    config: Path | None,
    overrides: Overrides,
    resume: bool = False,
) -> Iterator["Job"]:
    from swlora.runs import Run, default_folder

    if resume:
        if output is None:
            raise UserError("--resume needs the run's folder: --output DIR")
        given = [path for path, value in overrides.items() if value is not None]
        if config is not None or given:
            raise UserError(
                "--resume continues with the settings in the run's config.yaml; "
                f"leave out {'--config' if config else flag_name(given[0])}"
            )
        run, spec = Run.reopen(output, command)
    else:
        spec = load_spec(config, overrides)
        run = Run.create(output or default_folder(command), spec, command)
    with run, _sigterm_interrupts():
        from swlora.pipeline import Job

        yield Job(spec, run, _progress())


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that it is recorded as cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet_or_job(
    command: str, output: Path | None, config: Path | None, overrides: Overrides
) -> Iterator["Job | None"]:
    """Give short commands a run folder only where one was asked for."""
    if output is not None:
        with _job(command, output, config, overrides) as job:
            yield job
    else:
        load_spec(config, overrides)
        yield None


def _finish(result: dict[str, Any], json: Path | None, job: "Job | None") -> None:
    if job is not None:
        if not (job.run.folder / "result.json").exists():
            job.run.write_result(result)
        print(f"run folder: {job.run.folder}")
    if json is not None:
        from swlora.files import write_json

        write_json(json, result)


if __name__ == "__main__":
    main()

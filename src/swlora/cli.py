"""The command line: each verb parses, calls one function of the pipeline and shows the result.

Exit codes: 0 done, 2 usage or bad input, 1 failure, 130 interrupted.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swlora.cli_flags import ADAPTER, DATA, DECODE, IDENTIFY, MODEL, TRAIN, with_flags
from swlora.config import RunSpec, load_spec
from swlora.errors import UserError

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
Json = Annotated[Path | None, typer.Option("--json", help="also write the result here, as JSON")]
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
        Path | None, typer.Option(help="PNG or SVG [default: in the run folder]")
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
    _show_candidates(result)
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
    _show_training(result)
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
    _show_scores(result)
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
    _show_training(result["train"])
    _show_scores(result["eval"])
    _finish(result, json, job)


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
    _show_scores(result)
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
    from swlora.pipeline import generate_text

    with _quiet_or_job("generate", output, config, overrides) as job:
        result = generate_text(_spec(config, overrides), prompt, adapter, _progress())
    typer.echo(result["text"])
    _finish(result, json, job)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        command.main(args=arguments, prog_name="swlora", standalone_mode=False)
    except UserError as error:
        _fail(error, error.exit_code, arguments)
    except KeyboardInterrupt as error:
        _fail(error, 130, arguments)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
            error.show()
            raise SystemExit(error.exit_code) from None
        if type(error).__name__ == "Abort":
            _fail(error, 130, arguments)
        _fail(error, 1, arguments)


def _fail(error: BaseException, exit_code: int, arguments: Sequence[str]) -> None:
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


def _spec(config: Path | None, overrides: Overrides) -> RunSpec:
    return load_spec(config, overrides)


def _progress() -> Any:
    from transformers.utils import logging

    from swlora.terminal import make_progress

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return make_progress()


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
                f"leave out {'--config' if config else given[0]}"
            )
        run, spec = Run.reopen(output)
    else:
        spec = _spec(config, overrides)
        run = Run.create(output or default_folder(command), spec, command)
    from swlora.pipeline import Job

    with run:
        yield Job(spec, run, _progress())


@contextmanager
def _quiet_or_job(
    command: str, output: Path | None, config: Path | None, overrides: Overrides
) -> Iterator["Job | None"]:
    """Give short commands a run folder only where one was asked for."""
    if output is not None:
        with _job(command, output, config, overrides) as job:
            yield job
    else:
        _spec(config, overrides)
        yield None


def _finish(result: dict[str, Any], json: Path | None, job: "Job | None") -> None:
    if job is not None:
        if not (job.run.folder / "result.json").exists():
            job.run.write_result(result)
        print(f"run folder: {job.run.folder}")
    if json is not None:
        from swlora.files import write_json

        write_json(json, result)


def _show_candidates(result: dict[str, Any]) -> None:
    print(f"perplexity of the intact model: {result['perplexity']:.2f}")
    header = ("layer", "module", "out", "in", "weight", "ratio", "verdict")
    rows = [
        (
            str(c["layer"]),
            c["module"],
            str(c["out_channel"]),
            str(c["in_channel"]),
            f"{c['weight']:.3f}",
            f"{c['ratio']:.2f}",
            c["verdict"],
        )
        for c in result["candidates"]
    ]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    if result["layers"]:
        print(f"layers with a verified super weight: {', '.join(map(str, result['layers']))}")
    else:
        print("no super weight: setting any one candidate to zero barely matters in this model")
    print(f"figure: {result['figure']}")


def _show_training(result: dict[str, Any]) -> None:
    print(
        f"trained {result['rows']} rows in {result['train_s']:.0f} s, "
        f"{result['examples_per_s']:.1f} examples/s"
    )
    print(f"adapter: {result['adapter']}")


def _show_scores(result: dict[str, Any]) -> None:
    from swlora.evaluation.report import scores_table

    print(scores_table(result))
    if "predictions" in result:
        print(f"predictions: {result['predictions']}")


if __name__ == "__main__":
    main()

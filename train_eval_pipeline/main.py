"""The original training and evaluation command, translated to the flags of `swlora`.

    cd train_eval_pipeline && python -m main --mode "train" | "eval" | "train_eval"

Flags that are not listed by --help are handed on to `swlora` as they are (--train-rows 1000).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swlora import cli
from swlora.config import DEFAULT_DATASET, DEFAULT_MODEL

PEFT_FOLDER = Path(__file__).resolve().parents[1] / "runs" / "peft_model"
MODES = {"train": "train", "eval": "eval", "train_eval": "train-eval"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate the original flags and run `swlora` with them; exit codes are those of `swlora`.

    A model or data set that was not named is left to `swlora`, whose defaults are the same.
    """
    parser = _parser()
    given, others = parser.parse_known_args(arguments)
    flags = [] if given.path_to_model is None else ["--model", given.path_to_model]
    if given.path_to_tokenizer not in (None, given.path_to_model):
        flags += ["--tokenizer", given.path_to_tokenizer]
    flags += [] if given.path_to_dataset is None else ["--dataset", given.path_to_dataset]
    flags += _training(given, parser) if given.mode != "eval" else _evaluation(given, parser)
    if given.mode == "train_eval":
        flags += ["--eval-batch-size", str(given.validation_batch_size)]
    cli.main([MODES[given.mode], *flags, *others])


def _training(given: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    if given.mode == "train":
        _say_unused(given, parser, ["validation_batch_size"], "it only trains")
    layers = _joined(given.lora_layers_to_transform) or "all"
    return [
        *("--output", str(given.path_to_peft_model)),
        *("--rank", str(given.lora_rank)),
        *("--alpha", str(given.lora_alpha)),
        *("--dropout", str(given.lora_dropout)),
        *("--targets", _joined(given.lora_target_modules) or "all-linear"),
        *("--layers", layers),
        *("--epochs", "1"),  # however few the rows are
    ]


def _evaluation(given: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    unused = [name for name in vars(given) if name.startswith("lora_")]
    _say_unused(given, parser, unused, "the saved adapter knows its own")
    batch_size = str(given.validation_batch_size)
    return ["--adapter", str(given.path_to_peft_model), "--eval-batch-size", batch_size]


def _joined(values: list[list[str]] | None) -> str:
    """Join repeated, space-separated and comma-separated values into one comma-separated list."""
    return ",".join(value.strip(",") for repeat in values or [] for value in repeat)


def _say_unused(
    given: argparse.Namespace, parser: argparse.ArgumentParser, names: list[str], reason: str
) -> None:
    for name in names:
        if getattr(given, name) != parser.get_default(name):
            print(f"swlora: --mode {given.mode} needs no --{name}: {reason}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m main",
        usage="%(prog)s --mode {train,eval,train_eval} [flags, see --help]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--mode", choices=list(MODES), required=True)
    add("--path_to_model", help=f"Hub id, folder or builtin [default: {DEFAULT_MODEL}]")
    add("--path_to_tokenizer", help="Hub id or folder [default: the model's own]")
    add("--path_to_peft_model", type=Path, default=PEFT_FOLDER, help="[default: %(default)s]")
    add("--path_to_dataset", help=f"Hub id, folder or file [default: {DEFAULT_DATASET}]")
    add("--lora_rank", type=int, default=4, help="[default: %(default)s]")
    add("--lora_alpha", type=float, default=32.0, help="[default: %(default)s]")
    add("--lora_dropout", type=float, default=0.1, help="[default: %(default)s]")
    several = {"nargs": "+", "action": "append"}
    add("--lora_target_modules", **several, help="names [default: all-linear]")
    add("--lora_layers_to_transform", **several, help="layer numbers [default: all layers]")
    add("--validation_batch_size", type=int, default=8, help="[default: %(default)s]")
    return parser


if __name__ == "__main__":
    main()

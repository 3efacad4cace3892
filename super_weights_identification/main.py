"""The original identification command, translated to the flags of `swlora identify`.

    cd super_weights_identification && python -m main

Flags that are not listed by --help are handed on to `swlora` as they are (--figure spikes.png).
"""

import argparse
from collections.abc import Sequence

from swlora import cli
from swlora.config import DEFAULT_MODEL


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate the original flags and run `swlora identify`; exit codes are those of `swlora`."""
    parser = argparse.ArgumentParser(
        prog="python -m main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model_help = f"Hub id, folder or builtin [default: {DEFAULT_MODEL}]"
    parser.add_argument("--path_to_model", help=model_help)
    parser.add_argument("--path_to_tokenizer", help="[default: the model's own]")
    given, others = parser.parse_known_args(arguments)
    flags = [] if given.path_to_model is None else ["--model", given.path_to_model]
    if given.path_to_tokenizer not in (None, given.path_to_model):
        flags += ["--tokenizer", given.path_to_tokenizer]
    cli.main(["identify", *flags, *others])


if __name__ == "__main__":
    main()

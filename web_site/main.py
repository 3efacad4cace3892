"""The original command of the web page: `python -m web_site.main` in the repository's root.

Flags are those of `swlora serve`; without any, the page is at http://127.0.0.1:8000.
"""

import sys
from collections.abc import Sequence

from swlora import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `swlora serve`; exit codes are those of `swlora`."""
    cli.main(["serve", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()

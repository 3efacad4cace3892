"""The original command of the web page: `python -m web_site.main` in the repository's root."""

import sys

MESSAGE = (
    "swlora: the web page is not part of this version; "
    "generate text with: swlora generate --model builtin --prompt 'name[Aromi], area[riverside]'"
)


def main() -> None:
    """Say that there is no web page yet; exit code 1."""
    print(MESSAGE, file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Log lines on stderr in which nothing that came from a client can pass for another line."""

import logging
import sys

from swlora.printable import escaped

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class EscapingFormatter(logging.Formatter):
    """Writes a record as one line; the lines of a traceback are indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record with every control character escaped."""
        lines = super().format(record).split("\n")
        return "\n    ".join(escaped(line) for line in lines)


def configure_logging() -> None:
    """Send what the server and its libraries say to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter(_FORMAT))
    for name, level in (("swlora.web", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)

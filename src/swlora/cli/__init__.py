"""The command line: each verb parses, calls one function of the pipeline and shows the result."""

from swlora.cli.entry import main

__all__ = ["main"]

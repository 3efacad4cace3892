"""The llama.cpp that exported files are tested in, or a skip that says why there is none."""

import pytest

from swlora.deploy.llama_cpp import INSTALL, VARIABLE, LlamaCpp, find_llama_cpp


def require_llama_cpp() -> LlamaCpp:
    """Return the installation of `make test`, or one that is named; else skip the test."""
    found = find_llama_cpp()
    if found is None:
        pytest.skip(f"no llama.cpp: `{INSTALL}`, and {VARIABLE} names its folder")
    return found

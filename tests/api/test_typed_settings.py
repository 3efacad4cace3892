"""The typed keyword arguments: those of the configuration, in signatures and for type checkers."""

import inspect
from typing import Unpack, get_args, get_type_hints

import pytest
from tests.support.typed_settings import CALLED, FUNCTIONS, OWN, TARGET, source

import swlora
from swlora.api import settings as typed
from swlora.api.call import TAKEN
from swlora.command_settings import keyword


def test_the_settings_are_those_of_the_configuration() -> None:
    assert TARGET.read_text(encoding="utf-8") == source(), "renew them: make settings"


@pytest.mark.parametrize("command", FUNCTIONS)
def test_a_function_shows_the_settings_of_its_command(command) -> None:
    function = getattr(swlora, CALLED.get(command, command))
    wanted = {keyword(path) for path in TAKEN[command]}
    assert wanted <= inspect.signature(function).parameters.keys()
    (seen,) = get_args(function.__annotations__["settings"])
    assert function.__annotations__["settings"] == Unpack[seen]
    assert seen is getattr(typed, FUNCTIONS[command])
    assert get_type_hints(seen).keys() == wanted - {keyword(p) for p in OWN.get(command, ())}


def test_defaults_are_shown() -> None:
    shown = inspect.signature(swlora.train).parameters
    assert shown["rank"].default == 4 and str(shown["layers"].default) == "all"
    assert "settings" not in shown

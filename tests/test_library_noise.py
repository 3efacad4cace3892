"""What libraries draw stays off the terminal, and only while they are called."""

import threading

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging

from swlora.config import ModelSpec
from swlora.library_noise import quiet_libraries
from swlora.models.load import load_model


@pytest.fixture(autouse=True)
def bars_of_transformers(monkeypatch):
    """On, whatever a test before this one did."""
    monkeypatch.setattr(logging, "_tqdm_active", True)


def drawn(capsys) -> str:
    """What a bar writes now."""
    capsys.readouterr()
    for _ in tqdm([1], desc="a bar"):
        pass
    for _ in logging.tqdm([1], desc="a bar of transformers"):
        pass
    return capsys.readouterr().err


def test_bars_are_hidden_inside_and_drawn_again_outside(capsys):
    verbosity = logging.get_verbosity()
    before = drawn(capsys)
    assert "a bar:" in before
    with pytest.raises(KeyError), quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        assert drawn(capsys) == ""
        with quiet_libraries():
            assert drawn(capsys) == ""
        assert drawn(capsys) == ""
        raise KeyError
    assert ("a bar:" in drawn(capsys), logging.get_verbosity()) == (True, verbosity)


def test_threads_may_overlap(capsys):
    """The first to enter leaves first."""
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with quiet_libraries():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with quiet_libraries():
        leave.set()
        thread.join()
        assert drawn(capsys) == ""
    assert "a bar:" in drawn(capsys)


def test_loading_a_model_draws_nothing(capsys, model_folder):
    folder = model_folder("llama")  # saving it may draw
    capsys.readouterr()
    load_model(ModelSpec(name=str(folder), device="cpu"))
    assert capsys.readouterr() == ("", "")

"""What shows progress in Python: bars in a notebook, nothing elsewhere unless asked for."""

import re
import sys
import time
from types import SimpleNamespace

import pytest
from tests.support.small_runs import Heard

from swlora.api.bars import Bars, in_notebook, shown
from swlora.errors import UserError
from swlora.progress import Silent


def kernel(*parts: str) -> SimpleNamespace:
    """What IPython says of the shell that runs a program."""
    shell = SimpleNamespace(config=dict.fromkeys(parts))
    return SimpleNamespace(get_ipython=lambda: shell)


def test_a_notebook_gets_bars_by_itself(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook() and isinstance(shown(None), Silent)
    monkeypatch.setitem(sys.modules, "IPython", kernel("TerminalIPythonApp"))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", kernel("IPKernelApp"))
    assert isinstance(shown(None), Bars) and isinstance(shown(False), Silent)


def test_what_is_given_is_used(monkeypatch) -> None:
    heard = Heard()
    assert shown(heard) is heard and isinstance(shown(True), Bars)
    with pytest.raises(UserError, match=r"True, False or a .*Progress, not str"):
        shown("yes")  # type: ignore[arg-type]


def test_a_bar_tells_how_far_the_work_is(capsys) -> None:
    bars = Bars()
    with bars.task("train", 4) as task:
        task.advance(2)
        bars.say("data: rows.csv")
        task.advance(2.0, "loss 1.250")
    with bars.task("load the model") as task:
        pass
    found = capsys.readouterr()
    assert found.out == "data: rows.csv\n"
    assert "train: 100%" in found.err and "4/4" in found.err and "loss 1.250" in found.err
    assert "load the model (00:00)" in found.err and "it/s]load" not in found.err


def test_what_was_done_before_says_nothing_of_the_pace(capsys) -> None:
    with Bars().task("train", 1000, 900) as task:
        for _ in range(3):
            time.sleep(0.2)
            task.advance(1)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "903/1000" in last and 1 < float(re.findall(r"([\d.]+)it/s", last)[0]) < 6

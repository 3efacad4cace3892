"""Whether the Hub can be reached: every way of not reaching it is a quick no."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from swlora.hub import OFFLINE_VARIABLES, cached_file, hub_reachable, offline_variable


@pytest.fixture
def online(monkeypatch):
    """A function: what the Hub answers, a status or an error -> the questions asked."""
    for variable in OFFLINE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    hub_reachable.cache_clear()
    questions: list[tuple[str, float]] = []

    def answers(answer: int | Exception) -> list[tuple[str, float]]:
        def head(url: str, timeout: float) -> SimpleNamespace:
            questions.append((url, timeout))
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(status_code=answer)

        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
        return questions

    yield answers
    hub_reachable.cache_clear()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (200, True),
        (307, True),
        (404, True),
        (429, True),
        (403, False),
        (407, False),
        (500, False),
        (503, False),
        (OSError("no route"), False),
        (TimeoutError(), False),
        (RuntimeError("anything"), False),
    ],
)
def test_answers(answer, expected, online):
    questions = online(answer)
    assert hub_reachable() is hub_reachable() is expected
    assert questions == [("https://huggingface.co", 5.0)]  # asked once, and not for long


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
@pytest.mark.parametrize(
    "variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"]
)
def test_offline_mode_asks_nobody(variable, value, online, monkeypatch):
    questions = online(200)
    monkeypatch.setenv(variable, value)
    assert offline_variable() == variable
    assert hub_reachable() is False
    assert questions == []


def test_a_variable_that_is_off_changes_nothing(online, monkeypatch):
    online(200)
    for variable in OFFLINE_VARIABLES:
        monkeypatch.setenv(variable, "0")
    assert offline_variable() is None
    assert hub_reachable() is True


def test_files_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached_file("some/model", "config.json") is None
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    found = cached_file("some/model", "config.json")
    assert found == str(repository / "snapshots" / "c0ffee" / "config.json")
    assert cached_file("some/model", "config.json", "v2") is None

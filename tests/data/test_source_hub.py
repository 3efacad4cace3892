"""Data of the Hub: one commit is read, fallbacks are said, refusals are errors."""

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from tests.support.data_files import E2E, write_e2e

from swlora.config import DEFAULT_DATASET, DataSpec
from swlora.data import e2e, hub_data
from swlora.data.hub_data import HubUnreachableError
from swlora.data.sources import load_dataset
from swlora.errors import DataError, UserError
from swlora.hub import OFFLINE_VARIABLES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("no_settings_from_outside")


class Table(dict[str, list[str]]):
    column_names = property(lambda self: list(self))

    def __len__(self) -> int:
        return len(next(iter(self.values())))


def hub_tables() -> dict[str, Table]:
    columns = ("meaning_representation", "human_reference")
    return {
        split: Table(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        for split, rows in zip(("train", "validation", "test"), E2E.values(), strict=True)
    }


def fake_hub(
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], str],
    load: Callable[[], dict[str, Table]] = hub_tables,
) -> list[object]:
    """Replace the two Hub libraries; the list returned fills with the calls made."""
    calls: list[object] = []

    class Api:
        def dataset_info(self, *args: object, **options: object) -> object:
            calls.append((args, options))
            return SimpleNamespace(sha=answer())

    def load_dataset(*args: object, **options: object) -> dict[str, Table]:
        calls.append((args, options))
        return load()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(e2e, "HUB_ROWS", {"train": 2, "validation": 3, "test": 3})
    return calls


def raising(error: Exception) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def test_the_hub_is_asked_for_one_commit_of_its_parquet_branch(monkeypatch, tmp_path):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    dataset = load_dataset(DataSpec())
    branch = {"revision": "refs/convert/parquet", "timeout": 5.0}
    assert calls == [((DEFAULT_DATASET,), branch), ((DEFAULT_DATASET,), {"revision": COMMIT})]
    assert "refs/convert/parquet at 0123456789ab" in dataset.source
    folder = load_dataset(DataSpec(name=write_e2e(tmp_path / "e2e")))
    assert (dataset.train, dataset.dev, dataset.test) == (folder.train, folder.dev, folder.test)
    assert (dataset.name, dataset.sha256) == (folder.name, folder.sha256)


@pytest.mark.parametrize(
    "change",
    [
        lambda tables: tables.pop("validation"),
        lambda tables: tables["test"].pop("human_reference"),
        lambda tables: [column.append("more") for column in tables["train"].values()],
    ],
)
def test_other_data_under_its_name_is_refused(monkeypatch, change):
    tables = hub_tables()
    change(tables)
    fake_hub(monkeypatch, lambda: COMMIT, lambda: tables)
    with pytest.raises(
        DataError, match=r"tuetschek/e2e_nlg \w+ is .*, not \d rows of .*SWLORA_E2E"
    ):
        load_dataset(DataSpec())


def test_bad_rows_of_the_hub(monkeypatch):
    tables = hub_tables()
    tables["validation"]["human_reference"][1] = ""
    fake_hub(monkeypatch, lambda: COMMIT, lambda: tables)
    with pytest.raises(DataError, match="e2e_nlg validation, row 2: its completion is empty"):
        load_dataset(DataSpec())
    assert load_dataset(DataSpec(skip_bad_rows=True)).counts.n_bad == 1


@pytest.mark.parametrize("variable", OFFLINE_VARIABLES)
def test_offline_goes_straight_to_the_sample(monkeypatch, variable):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    monkeypatch.setenv(variable, "1")
    dataset = load_dataset(DataSpec())
    assert calls == []
    assert dataset.name == "sample"
    assert dataset.sha256 == load_dataset(DataSpec(name="sample")).sha256
    assert "not E2E" in dataset.source and f"{variable} is set" in dataset.source
    assert "SWLORA_E2E" in dataset.source
    monkeypatch.setenv(variable, "0")
    assert load_dataset(DataSpec()).name == "E2E NLG"


def test_data_that_were_named_are_loaded_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = DataSpec(name=DEFAULT_DATASET)
    said = r"tuetschek/e2e_nlg cannot be loaded, since .* HF_HUB_OFFLINE is set; .*--dataset sample"
    with pytest.raises(HubUnreachableError, match=said) as refused:
        load_dataset(named)
    assert refused.value.exit_code == 2
    monkeypatch.setenv("SWLORA_E2E", write_e2e(tmp_path / "e2e"))
    assert load_dataset(named).name == "E2E NLG"


def status(code: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    return HfHubHTTPError(f"status {code}", response=response)


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), OSError("no route"), status(503)])
def test_no_connection_falls_back_to_the_sample_and_says_so(monkeypatch, error):
    calls = fake_hub(monkeypatch, raising(error))
    dataset = load_dataset(DataSpec())
    assert len(calls) == 1
    assert dataset.name == "sample"
    assert f"the Hub cannot be reached: {type(error).__name__}: " in dataset.source
    assert "\n" not in dataset.source


def test_a_hub_that_hangs_is_left_soon(monkeypatch):
    release = threading.Event()
    fake_hub(monkeypatch, lambda: str(release.wait(60)))
    monkeypatch.setattr(hub_data, "HUB_TIMEOUT_S", 0.25)
    try:
        assert "no answer in 0.25 s" in load_dataset(DataSpec()).source
    finally:
        release.set()


def test_a_connection_lost_while_loading_falls_back(monkeypatch):
    fake_hub(monkeypatch, lambda: COMMIT, raising(ConnectionError("gone")))
    assert "cannot be reached: ConnectionError: gone" in load_dataset(DataSpec()).source


def test_a_refusal_is_an_error_and_not_a_reason_to_use_other_data(monkeypatch):
    fake_hub(monkeypatch, raising(status(404)))
    with pytest.raises(UserError, match=r"the Hub refuses tuetschek/e2e_nlg: .*status 404"):
        load_dataset(DataSpec())
    fake_hub(monkeypatch, lambda: COMMIT, raising(RuntimeError("scripts are no longer supported")))
    with pytest.raises(UserError, match=r"cannot load .*scripts are no longer.*SWLORA_E2E"):
        load_dataset(DataSpec())


def test_the_folder_in_the_environment_comes_first(monkeypatch, tmp_path):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    folder = write_e2e(tmp_path / "e2e")
    monkeypatch.setenv("SWLORA_E2E", folder)
    assert load_dataset(DataSpec()) == load_dataset(DataSpec(name=folder))
    monkeypatch.setenv("SWLORA_E2E", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"SWLORA_E2E: the folder .*elsewhere has no trainset\.csv"):
        load_dataset(DataSpec())
    assert calls == []

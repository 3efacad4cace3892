"""A study's folder: one process at a time, and what is recorded in it outlives the others."""

import json

import pytest
import yaml

from swlora.errors import UserError
from swlora.study.folder import StudyFolder, check_folder
from swlora.study.spec import StudySpec

SPEC = StudySpec.model_validate({"arms": ["lora"]})
OTHER_SPEC = StudySpec.model_validate({"arms": ["lora"], "seeds": [7]})
RUN = "runs/lora/seed-0"


def test_a_study_goes_on_from_what_is_recorded_when_its_turn_comes(tmp_path):
    first = StudyFolder(tmp_path / "study", "s", SPEC)
    late = StudyFolder(tmp_path / "study", "s", SPEC)
    with first:
        first.record_run(RUN, status="done", seconds=12.5)
        first.record(status="done")
    with late:
        assert late.facts["started_at"] == first.facts["started_at"]
    facts = json.loads((tmp_path / "study" / "study.json").read_text())
    assert facts["runs"] == {RUN: {"status": "done", "seconds": 12.5}}


def test_a_study_that_came_too_late_spares_the_files_of_the_other(tmp_path, monkeypatch):
    first = StudyFolder(tmp_path / "study", "s", SPEC)
    with first:
        first.record_run(RUN, status="done")
        before = [(tmp_path / "study" / n).read_bytes() for n in ("study.yaml", "study.json")]
        monkeypatch.setattr("swlora.study.folder.check_folder", lambda *_: False)  # as it was then
        with (
            pytest.raises(UserError, match="another process is at work"),
            StudyFolder(tmp_path / "study", "late", OTHER_SPEC),
        ):
            pass
        after = [(tmp_path / "study" / n).read_bytes() for n in ("study.yaml", "study.json")]
    assert after == before


def test_another_study_that_took_the_folder_is_seen_once_it_is_locked(tmp_path):
    late = StudyFolder(tmp_path / "study", "s", OTHER_SPEC)
    with StudyFolder(tmp_path / "study", "s", SPEC):
        pass
    with pytest.raises(UserError, match="holds another study"), late:
        pass


def test_a_study_that_cannot_start_is_not_in_use(tmp_path):
    with StudyFolder(tmp_path / "study", "s", SPEC):
        pass
    path = tmp_path / "study" / "study.json"
    facts = path.read_text()
    path.write_text("{")
    with pytest.raises(UserError, match="holds no readable"), StudyFolder(path.parent, "s", SPEC):
        pass
    path.write_text(facts)
    with StudyFolder(tmp_path / "study", "s", SPEC):
        pass


def test_a_folder_of_an_older_version_lacks_settings_that_came_since(tmp_path):
    """They have their defaults there; another value is another study."""
    with StudyFolder(tmp_path / "study", "s", SPEC):
        pass
    path = tmp_path / "study" / "study.yaml"
    old = yaml.safe_load(path.read_text())
    for name in ("train_split", "columns", "train_on", "dataset_revision"):
        del old["data"][name]
    path.write_text(yaml.safe_dump(old))
    assert check_folder(tmp_path / "study", SPEC)
    other = StudySpec.model_validate({"arms": ["lora"], "data": {"train_on": "last-turn"}})
    with pytest.raises(UserError, match=r"holds another study \(data\.train_on: all-turns there"):
        check_folder(tmp_path / "study", other)


def test_a_study_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(UserError, match="file is a file and no folder; choose another --outp"):
            check_folder(path, SPEC)

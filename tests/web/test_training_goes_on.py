"""A training of the page that was stopped: whether it may go on, and what is said where not."""

import json
import os

from tests.support.data_files import write_rows
from tests.support.page_reading import look
from tests.support.page_training import press, start, status_of
from tests.support.servers import until


def test_only_runs_of_this_model_and_these_data_go_on(trainer, data, loaded, tmp_path):
    run = tmp_path / "runs/mine"
    write_rows(run / "checkpoint/state-1.json", [{}])
    facts = {"command": "train", "status": "failed", "started_at": "2030-01-01T10:00:00Z"}
    (run / "run.json").write_text(json.dumps(facts))
    config = {"data": {"name": str(data / "rows.jsonl")}, "model": {"name": loaded.name}}
    for changed, said in (
        ({"data": {"name": str(tmp_path / "outside.jsonl")}}, "its data do not lie in"),
        ({"data": {"name": str(data / "../outside.jsonl")}}, "its data do not lie in"),
        ({"data": config["data"] | {"eval_file": "/etc/passwd"}}, "its data do not lie in"),
        ({"model": {"name": "other"}}, "of another model"),
        ({"model": {"name": "o" * 300}}, "of another model"),
        ({"model": {"name": "~nobody\0"}}, "of another model"),
        ({"model": {"name": os.path.relpath(loaded.name)}}, ""),
        ({"model": {"name": f"{loaded.name}/"}}, ""),  # as a shell completes it
        ({}, ""),
    ):
        (run / "config.yaml").write_text(json.dumps(config | changed))
        text = look(trainer, "/runs/mine").text
        assert (said in text) if said else "Resume" in text
        if said:
            assert said in press(trainer, "resume", status=409)


def test_a_training_that_is_not_let_go_on_says_why(trainer, tmp_path):
    """Its run folder is as it was: the process ended before it entered it."""
    run = tmp_path / "runs/mine"
    start(trainer)
    until((run / "ready").exists)
    press(trainer, "stop")
    until(lambda: status_of(tmp_path / "runs") == "cancelled")
    until(lambda: "as if it had never stopped" in look(trainer, "/runs/mine").text)
    (run / "refuse").touch()
    press(trainer, "resume")
    until(lambda: "It did not go on" in look(trainer, "/runs/mine").text)
    text = look(trainer, "/runs/mine").text
    assert "mine: torch was 1 and is now 2; --force-resume" in text and str(tmp_path) not in text
    assert "as if it had never stopped" not in text and "Resume" in text
    (run / "refuse").unlink()
    press(trainer, "resume")
    until(lambda: status_of(tmp_path / "runs") == "done")

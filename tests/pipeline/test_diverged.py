"""A training whose numbers become none: nothing of it is a result, and the rows are named."""

import pytest
from tests.support.whole_jobs import make_spec, run_in

from swlora.errors import DivergedError
from swlora.runs import read_run

pytestmark = pytest.mark.usefixtures("no_drawings")


def test_weights_that_cannot_be_used_are_no_result_and_their_rows_are_named(
    model_folder, rows, tmp_path
):
    changes = {"train__learning_rate": 1e38, "train__max_steps": 1, "train__warmup_fraction": 0.0}
    spec = make_spec(model_folder("llama"), rows, **changes)
    expected = r"step 1 made weights .*lower --learning-rate \(rows of that step: \S*train.jsonl, "
    expected += r"line 1, 2, 3\)$"
    with pytest.raises(DivergedError, match=expected) as failed:
        run_in(tmp_path / "run", spec)
    assert len(str(failed.value).splitlines()) == 1
    facts = read_run(tmp_path / "run")
    assert facts["status"] == "failed" and facts["error"]["code"] == "diverged"
    assert not (tmp_path / "run" / "adapter").exists()

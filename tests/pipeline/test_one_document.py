"""A training on a single document, of which nothing can be held out."""

import pytest
from tests.support.small_runs import make_spec

from swlora.errors import UserError
from swlora.job import Job
from swlora.progress import Silent
from swlora.run_record import MemoryRecord


def test_a_share_of_it_is_refused_and_a_run_that_was_given_one_goes_on(model_folder, tmp_path):
    """Older versions took it; the page's form gave one to every run."""
    (tmp_path / "book.txt").write_text("A text.")
    files = {"data.name": str(tmp_path / "book.txt")}
    spec = make_spec(model_folder("llama"), files, data__eval_share=0.05)
    with pytest.raises(UserError, match="is one document, so none can be held out: leave out --ev"):
        assert Job(spec, MemoryRecord(), Silent()).dataset
    older = MemoryRecord()
    older.facts["resumed"] = 1
    assert not Job(spec, older, Silent()).dataset.dev

"""A record in memory answers as a run folder does."""

from swlora.config import RunSpec
from swlora.run_record import MemoryRecord, RunRecord
from swlora.runs import Run


def told(run: RunRecord) -> None:
    run.begin()
    run.record(a=1)
    run.record_source(model="m")
    run.add_timing("train", 1.5)
    run.add_timing("train", 0.5)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 0.5})
    run.truncate_metrics(2)
    run.write_result({"train": {"rows": 3}})
    run.write_result({"eval": {"nll": 1.0}})


def test_memory_tells_the_same_as_a_folder(tmp_path) -> None:
    folder, memory = Run.prepare(tmp_path / "run", RunSpec(), "train"), MemoryRecord()
    for run in (folder, memory):
        told(run)
    assert memory.metrics() == folder.metrics() == [{"step": s, "loss": 0.5} for s in (1, 2)]
    assert memory.read_result() == folder.read_result()
    assert memory.timings_s == folder.facts["timings_s"]
    assert {"a": 1, "model": "m"}.items() <= memory.facts.items() <= folder.facts.items()
    assert memory.folder is memory.checkpoint is None

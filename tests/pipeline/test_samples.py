"""Texts that are generated while a training is under way, which do not change it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.support.small_runs import DEV, Heard, make_spec, same_weights, signal_in_step
from tests.support.whole_jobs import naive_text

from swlora import pipeline
from swlora.adapters.on_base import with_adapter
from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.evaluation.held_out import Measurements, watch_of
from swlora.evaluation.samples import MAX_FILE_BYTES, MAX_PROMPTS, read_prompts, shown
from swlora.job import Job
from swlora.loss_sum import LossSum
from swlora.models.load import load_model
from swlora.runs import Run
from swlora.samples_file import SAMPLES, Sample, add_samples, read_samples

pytestmark = pytest.mark.usefixtures("no_drawings")
PROMPTS = ["name[A], food[x]\n", "name[Zoe], food[zz]\n"]


def trained(folder: Path, spec: RunSpec) -> Heard:
    said = Heard()
    with Run.create(folder, spec, "train") as run:
        pipeline.train(Job(spec, run, said))
    return said


def test_a_training_is_the_same_with_and_without(model_folder, data, tmp_path):
    changes = {"adapter__dropout": 0.2, "train__eval_every_steps": 3}
    sampled = {"train__sample_prompts": PROMPTS, "train__sample_tokens": 7}
    trained(tmp_path / "without", make_spec(model_folder("llama"), data, **changes))
    said = trained(tmp_path / "with", make_spec(model_folder("llama"), data, **changes, **sampled))
    for name in ("adapter", "best"):
        assert same_weights(tmp_path / "with" / name, tmp_path / "without" / name)
    samples = read_samples(tmp_path / "with")
    assert [(s.step, s.prompt) for s in samples] == [(n, p) for n in (3, 6, 8) for p in PROMPTS]
    assert [line for line in said.lines if line.startswith("after step 8: name[A], food[x] → ")]


def test_they_are_what_the_adapter_says(model_folder, tiny_tokenizer, data, tmp_path):
    changes = {"train__eval_every_steps": 4, "train__sample_tokens": 9}
    spec = make_spec(model_folder("llama"), data, train__sample_prompts=PROMPTS, **changes)
    trained(tmp_path / "run", spec)
    model = with_adapter(load_model(spec.model), tmp_path / "run" / "adapter", print).model
    said = [s.text for s in read_samples(tmp_path / "run") if s.step == 8]
    with torch.no_grad():
        expected = [naive_text(model, tiny_tokenizer, prompt) for prompt in PROMPTS]
    assert [" ".join(text.split()) for text in said] == expected


def test_their_time_is_that_of_the_measurement(monkeypatch):
    """And so no more of the training's, whose seconds a study compares."""
    now_s = [0.0]

    def slow_loss(*_arguments):
        now_s[0] += 3.0
        return (LossSum(2.0, 1),)

    def slow_sampler(_model, _step, _measurement):
        now_s[0] += 200.0

    monkeypatch.setattr("swlora.evaluation.held_out.dealt_losses", slow_loss)
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    adapted, planned = SimpleNamespace(model=torch.nn.Linear(1, 1)), Measurements(2, None, False)
    watch = watch_of(adapted, [0], planned, print, None, slow_sampler)
    assert watch.measure(2)["eval_s"] == 203


def test_at_every_other_measurement(model_folder, data, tmp_path):
    changes = {"train__eval_every_steps": 2, "train__sample_every": 2, "train__sample_tokens": 3}
    spec = make_spec(model_folder("llama"), data, train__sample_prompts="A text.", **changes)
    trained(tmp_path / "run", spec)
    assert [s.step for s in read_samples(tmp_path / "run")] == [4, 8]


def test_a_run_that_goes_on_has_each_once(model_folder, data, tmp_path):
    changes = {"train__eval_every_steps": 2, "train__sample_tokens": 3}
    spec = make_spec(model_folder("llama"), data, train__sample_prompts=PROMPTS, **changes)
    trained(tmp_path / "whole", spec)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "append_metrics", signal_in_step(4))
        trained(tmp_path / "run", spec)
    run, spec = Run.reopen(tmp_path / "run", "train")
    with run:
        pipeline.train(Job(spec, run, Heard()))
    whole, stopped = ((tmp_path / name / SAMPLES).read_text() for name in ("whole", "run"))
    assert whole == stopped


def test_no_held_out_rows(model_folder, data, tmp_path):
    spec = make_spec(model_folder("llama"), data, train__sample_prompts="x")
    job = Job(spec, Run.prepare(tmp_path / "run", spec, "train"), Heard())
    job.dataset = replace(job.dataset, dev=[])  # as data of the Hub may be
    with pytest.raises(UserError, match="--sample-prompts are continued where held-out rows"):
        pipeline.train(job)


def test_settings_that_do_not_go_together():
    for train in ({"eval_every_steps": 0}, {"shard": True}):
        with pytest.raises(ValueError, match="--sample-prompts needs"):
            RunSpec.model_validate({"train": {"sample_prompts": "x", **train}})


def test_prompts_are_texts_or_lines_of_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("one \n\n  two\n")
    (tmp_path / "rows.jsonl").write_text('"three\\n"\n' + json.dumps({**DEV[0], "prompt": "4"}))
    given = ["a text", str(tmp_path / "prompts.txt"), str(tmp_path / "rows.jsonl"), "x.txt\ny"]
    assert read_prompts(given) == ["a text", "one ", "  two", "three\n", "4", "x.txt\ny"]
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf"of Windows"\r\n"a\xe2\x80\xa8line"\n')
    assert read_prompts([str(tmp_path / "rows.jsonl")]) == ["of Windows", "a\u2028line"]
    assert read_prompts([]) == []


@pytest.mark.parametrize(
    ("name", "content", "mistake"),
    [
        ("no.txt", None, "there is no file"),
        ("empty.txt", b" \n", "holds no prompt"),
        ("bytes.txt", b"\xff\xfe", "cannot be read as text"),
        ("rows.jsonl", b'{"text": "x"}\n', r"line 1 is neither a JSON string nor has a"),
        ("rows.jsonl", b"[" * 100_000, r"line 1 is neither a JSON string nor has a"),
        ("long.txt", "ä".encode() * MAX_FILE_BYTES, "is longer than 1,048,576 bytes"),
        ("long.txt", b"x" + "ä".encode() * MAX_FILE_BYTES, "is longer than 1,048,576 bytes"),
        ("rows.jsonl", b"[1", r"line 1 is neither a JSON string nor has a"),
        ("many.txt", b"x\n" * (MAX_PROMPTS + 1), "64 prompts at most, not 65"),
    ],
)
def test_bad_files(name, content, mistake, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=mistake):
        read_prompts([str(tmp_path / name)])


def test_lines_that_are_torn_are_left_out(tmp_path):
    add_samples(tmp_path, [Sample(1, "p", "t"), Sample(1, "q", "u")])
    add_samples(tmp_path, [Sample(2, "p", "v")])
    with (tmp_path / SAMPLES).open("a") as file:
        file.write('[1]\n{"step": "1", "prompt": "", "text": ""}\n{"step": 3, "pro')
    assert [s.step for s in read_samples(tmp_path)] == [1, 1, 2]
    add_samples(tmp_path, [Sample(1, "p", "new")])  # done again
    assert read_samples(tmp_path) == [Sample(1, "p", "new")]
    assert read_samples(tmp_path / "nowhere") == []


def test_of_a_long_file_of_samples_the_newest_are_shown_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("swlora.samples_file.MAX_BYTES", 150)
    for step in range(1, 6):
        add_samples(tmp_path, [Sample(step, "p", "t" * 20)])
    assert [s.step for s in read_samples(tmp_path)] == [4, 5]
    assert (tmp_path / SAMPLES).read_text().count("\n") == 5


def test_what_is_shown_is_short_and_harmless():
    samples = [Sample(5, "a\nb", "\x1b[31m" + "x" * 300)] * 5
    lines = shown(samples)
    assert len(lines) == 4 and lines[-1] == "and 2 more"
    assert lines[0].startswith("after step 5: a b → \\x1b[31mxxx") and len(lines[0]) < 150
    assert shown([Sample(1, "a", "")]) == ["after step 1: a → (nothing)"]

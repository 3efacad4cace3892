"""Runs on a cluster, played here: machines that see the study's folder, and others."""

import json
import tempfile

import pytest

from swlora.config import RunSpec, dump_yaml
from swlora.errors import DivergedError, RunFailedError, UserError
from swlora.study.folder import StudyFolder
from swlora.study.live import Board
from swlora.study.plan import Task
from swlora.study.ray_cluster import GOES_ON, Node, _cluster, connect
from swlora.study.ray_runner import MOST_LOST, RayRunner
from swlora.study.remote_work import look_around, order_of, unpack, work_on
from swlora.study.runner import Outcome
from swlora.study.spec import StudySpec

SPEC = StudySpec.model_validate({"arms": ["lora"]})
TASKS = [
    Task("runs", "lora", f"seed-{seed}", f"runs/lora/seed-{seed}", RunSpec(seed=seed))
    for seed in (0, 1)
]


class FakeCluster:
    """Does the work of orders here; `losses` says by folder how often a run is lost first.

    It is lost in the place of the message `lost_at`.
    """

    n_cpus = n_at_once = 2
    lost_at = "began"

    def __init__(self, children, sees_study=True):
        self.children, self.sees_study = children, sees_study
        self.losses, self.orders, self.works = {}, [], {}

    def look_around(self, _order):
        return self.sees_study

    def start(self, folder, order):
        order = dict(order) if self.sees_study else {**order, "token": "another"}
        self.orders.append(order)
        self.works[folder] = work_on(order, self.children)

    def messages(self, _wait_s):
        for folder, work in list(self.works.items()):
            message = next(work, {"kind": "cancelled"})
            if message["kind"] == self.lost_at and self.losses.get(folder, 0):
                self.losses[folder] -= 1
                work.close()
                message = {"kind": "lost", "reason": "the node died"}
            if message["kind"] not in GOES_ON:
                del self.works[folder]
                work.close()
            yield folder, message

    def cancel(self, **_how):
        for work in self.works.values():
            work.close()

    def forget(self):
        self.works.clear()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Look after a run's process often."""
    monkeypatch.setattr("swlora.study.remote_work.LOOK_EVERY_S", 0.05)


@pytest.fixture
def folder(tmp_path):
    with StudyFolder(tmp_path / "study", "s", SPEC) as folder:
        yield folder


@pytest.fixture
def runner_on(folder, view):
    return lambda cluster: RayRunner(SPEC, folder, Board(), view, cluster)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The temporary folder of a machine."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def told(folder, task=TASKS[0]):
    return json.loads((folder.folder / "study.json").read_text())["runs"][task.folder]


@pytest.mark.parametrize("sees_study", [True, False])
def test_runs_end_up_in_the_folder_of_the_study(
    sees_study, runner_on, folder, children, view, scratch
):
    cluster = FakeCluster(children, sees_study)
    runner = runner_on(cluster)
    runner.ahead(TASKS)
    assert len(cluster.works) == 2  # both at a time
    assert [runner.run(task) for task in TASKS] == [Outcome("done")] * 2
    for task in TASKS:
        run = folder.folder / task.folder
        assert json.loads((run / "run.json").read_text())["status"] == "done"
        assert (run / "config.yaml").read_text() == dump_yaml(task.spec)
        assert (run / "log.txt").read_text() == f"working in {task.folder}\n"
        assert told(folder, task)["host"] and told(folder, task)["load_before"] >= 0
    assert list(scratch.iterdir()) == []
    again = runner_on(FakeCluster(children, sees_study))
    assert again.run(TASKS[0]) == Outcome("done")
    assert len(children.calls) == 2
    assert [line.split(" on ")[0] for line in view.lines if "begins" in line] == [
        f"{task.folder} begins" for task in TASKS
    ]


def test_a_lost_run_begins_again_and_not_for_ever(runner_on, folder, children, view):
    cluster = FakeCluster(children)
    cluster.losses = {TASKS[0].folder: 1, TASKS[1].folder: MOST_LOST + 1}
    runner = runner_on(cluster)
    assert runner.run(TASKS[0]) == Outcome("done")
    assert runner.run(TASKS[1]) == Outcome("failed", "it was lost 4 times: the node died")
    assert told(folder, TASKS[1])["status"] == "failed"
    assert sum("it begins again" in line for line in view.lines) == 1 + MOST_LOST


@pytest.mark.parametrize(
    ("task", "act", "outcome"),
    [
        (TASKS[0], {}, Outcome("done")),
        (
            Task("rates", "lora", "0.01", "rates/lora/0.01", RunSpec()),
            {"fail": "too high", "error": {"code": DivergedError.code, "message": "too high"}},
            Outcome("failed", "too high", has_diverged=True),
        ),
    ],
    ids=["done", "diverged"],
)
def test_a_lost_run_that_came_to_its_end_is_over(task, act, outcome, runner_on, children, view):
    children.acts = {task.folder: act}
    cluster = FakeCluster(children)
    cluster.losses, cluster.lost_at = {task.folder: 1}, "ended"
    assert runner_on(cluster).run(task) == outcome
    assert len(children.calls) == 1
    assert sum("it begins again" in line for line in view.lines) == 1
    assert sum(f"{task.folder} goes on on" in line for line in view.lines) == 1


def test_a_run_that_fails_says_why(runner_on, children):
    children.acts = {TASKS[0].folder: {"fail": "RunFailedError: no more space"}}
    assert runner_on(FakeCluster(children)).run(TASKS[0]) == Outcome(
        "failed", "RunFailedError: no more space"
    )


def test_an_interruption_stops_what_runs_and_leaves_what_waits(runner_on, folder, children, view):
    children.acts = {TASKS[0].folder: {"hang": True}}
    view.stop_at = "hanging"
    runner = runner_on(FakeCluster(children))
    runner.ahead(TASKS[:1])
    with pytest.raises(KeyboardInterrupt):
        runner.run(TASKS[0])
    assert told(folder)["status"] == "cancelled"
    view.stop_at = None
    again = runner_on(FakeCluster(children))
    assert again.run(TASKS[0]) == Outcome("done")
    assert [call["resume"] for call in children.calls] == ["False", "True"]


def test_other_data_than_the_study_is_no_result(runner_on, folder, children, view):
    folder.record(data_sha256="the study's")
    cluster = FakeCluster(children)

    def with_data(folder_of_run, order):
        FakeCluster.start(cluster, folder_of_run, order)
        work = cluster.works[folder_of_run]

        def changed():
            for message in work:
                if message["kind"] == "ended":
                    path = folder.folder / folder_of_run / "run.json"
                    facts = json.loads(path.read_text())
                    path.write_text(json.dumps(facts | {"data_sha256": "another"}))
                yield message

        cluster.works[folder_of_run] = changed()

    cluster.start = with_data
    outcome = runner_on(cluster).run(TASKS[0])
    assert outcome.status == "failed" and outcome.reason.endswith("other data than the study")
    assert not (folder.folder / TASKS[0].folder).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "1.0"}}, "torch is "),
        ({"paths": {"data": "gone.jsonl"}}, "does not have the data gone.jsonl"),
    ],
)
def test_a_machine_that_cannot_do_it_says_why(change, said, tmp_path):
    order = order_of(TASKS[0], dump_yaml(TASKS[0].spec), tmp_path, "token", 1) | change
    for work in (look_around, work_on):
        (message,) = work(order)
        assert message["kind"] == "refused" and said in message["reason"]


def test_files_stay_in_their_folder(tmp_path):
    unpack({"adapter/a.txt": b"x"}, tmp_path / "run")
    assert (tmp_path / "run/adapter/a.txt").read_bytes() == b"x"
    for name in ("../x", "/tmp/x", "a/../../x"):
        with pytest.raises(RunFailedError, match="no name in a run"):
            unpack({name: b""}, tmp_path / "run")


@pytest.mark.parametrize(
    ("nodes", "n_cpus", "wants_gpu", "shares"),
    [
        ([(8, 0), (16, 0)], None, False, (8, 0, 3)),  # all of the smaller one
        ([(8, 0), (16, 0)], 4, None, (4, 0, 6)),
        ([(32, 8), (4, 0)], None, None, (4, 1, 8)),  # an eighth; none where there is no GPU
        ([(32, 8)], 32, True, (32, 1, 1)),
        ([(0, 0), (2, 0)], None, None, (2, 0, 1)),  # a head that is not to work
    ],
)
def test_machines_are_shared_out(nodes, n_cpus, wants_gpu, shares):
    made = [Node(str(k), f"host-{k}", *node) for k, node in enumerate(nodes)]
    cluster = _cluster(None, made, n_cpus, wants_gpu)
    assert (cluster.n_cpus, cluster.n_gpus, cluster.n_at_once) == shares


def test_more_than_any_machine_has_is_refused():
    with pytest.raises(
        UserError, match=r"no machine .* has 9 CPUs for a run \(a: 8 CPUs, 0 GPUs\)"
    ):
        _cluster(None, [Node("1", "a", 8, 0)], 9, None)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'swlora\[ray\]'"):
        connect("local")

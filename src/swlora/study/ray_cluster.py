"""Orders for runs, carried to the machines of a Ray cluster and their messages back.

Ray is imported where a cluster is asked for. What it would do by itself and does not do here: wait
for minutes for an address at which nothing answers, try again for ever what ran out of memory.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from swlora.errors import UserError, brief
from swlora.plural import counted

CONNECTS_S = 5.0
ANSWERS_S = 20.0  # how long a cluster may take to say that it is one
GOES_ON = ("began", "alive", "metrics")  # messages after which others follow
SEEN_S = 60.0  # how long a machine may take to say what it has
LOCAL_STORE_BYTES = 256 << 20  # of objects; only a run's files pass through it


@dataclass(frozen=True)
class Node:
    """A machine of the cluster and what Ray may use of it."""

    id: str
    host: str
    n_cpus: int
    n_gpus: int


@dataclass
class RayCluster:
    """A cluster that this process is connected to: each run gets CPUs and GPUs of its own."""

    ray: Any
    nodes: list[Node]
    n_cpus: int
    n_gpus: int
    _running: dict[Any, str] = field(default_factory=dict)  # stream of messages -> its run's folder

    @property
    def n_at_once(self) -> int:
        """How many runs the cluster does at a time."""
        return sum(_n_runs(node, self.n_cpus, self.n_gpus) for node in self.nodes)

    def describe(self) -> str:
        """Say what runs where, in a line."""
        hosts = ", ".join(
            f"{node.host} {_n_runs(node, self.n_cpus, self.n_gpus)}" for node in self.nodes
        )
        gpus = f" and {counted(self.n_gpus, 'GPU')}" if self.n_gpus else ""
        return (
            f"Ray: {counted(len(self.nodes), 'node')}, {counted(self.n_cpus, 'CPU')}{gpus} "
            f"a run; runs at a time: {hosts}"
        )

    def look_around(self, order: Mapping[str, Any]) -> bool:
        """Ask every machine for what an order needs; say whether all see the study's folder.

        Raises UserError that names the first machine that cannot do it.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        streams = [
            _remote(self.ray, "look_around")
            .options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            )
            .remote(dict(order))
            for node in self.nodes
        ]
        seen = True
        for node, stream in zip(self.nodes, streams, strict=True):
            ready, _ = self.ray.wait([stream], timeout=SEEN_S)
            if not ready:
                raise UserError(f"{node.host} did not begin a task within {SEEN_S:.0f} s")
            message = self._next(stream)
            if message["kind"] != "seen":
                raise UserError(str(message.get("reason")))
            seen = seen and bool(message["sees_study"])
        return seen

    def start(self, folder: str, order: Mapping[str, Any]) -> None:
        """Hand in the order for the run in `folder`."""
        task = _remote(self.ray, "work_on").options(num_cpus=self.n_cpus, num_gpus=self.n_gpus)
        self._running[task.remote(dict(order))] = folder

    def messages(self, wait_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (folder, message) of those that come within `wait_s`.

        Beside what a run sends itself: `lost` {reason}, where its process or machine is gone, and
        `failed` {reason}, where it is no use to begin it again.
        """
        if not self._running:
            return
        streams = list(self._running)
        ready, _ = self.ray.wait(streams, num_returns=1, timeout=wait_s)
        for stream in ready:
            message = self._next(stream)
            folder = self._running[stream]
            if message["kind"] not in GOES_ON:
                del self._running[stream]
            yield folder, message

    def cancel(self, *, at_once: bool = False) -> None:
        """Let all runs stop after their present step, or kill their processes."""
        for stream in self._running:
            self.ray.cancel(stream, force=at_once)

    def forget(self) -> None:
        """Take no more notice of what runs."""
        self._running.clear()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.ray.shutdown()

    def _next(self, stream: Any) -> dict[str, Any]:
        errors = self.ray.exceptions
        try:
            message: dict[str, Any] = self.ray.get(next(stream))
            return message
        except StopIteration:
            return {"kind": "lost", "reason": "its messages ended"}
        except errors.TaskCancelledError:
            return {"kind": "cancelled"}
        except errors.OutOfMemoryError:
            more = "give a run more of a machine with --ray-cpus"
            return {"kind": "failed", "reason": f"its machine ran out of memory; {more}"}
        except errors.RayTaskError as error:
            return {"kind": "failed", "reason": brief(error.cause)}
        except errors.RayError as error:
            return {"kind": "lost", "reason": str(error).strip().splitlines()[0][:200]}


def connect(
    address: str, n_cpus: int | None = None, *, wants_gpu: bool | None = None
) -> RayCluster:
    """Connect to the cluster at `address`, as in ray.init; "local" starts one on this machine.

    A run gets `n_cpus`; by default those of a machine, divided by its GPUs where each run has one.
    `wants_gpu` None: where the cluster has GPUs. Raises UserError where Ray is not installed, the
    address does not answer, or no machine has what a run needs.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs the package ray: pip install 'swlora[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster started here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    is_local = address == "local"
    if not is_local:
        _check_answers(address)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": LOCAL_STORE_BYTES}
    try:
        ray.init(
            address=address,
            logging_level="ERROR",
            log_to_driver=False,
            **(own if is_local else {}),
        )
    except Exception as error:
        raise UserError(f"--ray {address}: {brief(error)}") from error
    try:
        nodes = [_node(facts) for facts in ray.nodes() if facts["Alive"]]
        return _cluster(ray, nodes, n_cpus, wants_gpu)
    except BaseException:
        ray.shutdown()
        raise


def _check_answers(address: str) -> None:
    """Raise UserError where no Ray cluster answers at once: ray.init would try for minutes."""
    no_answer = f"--ray {address}: no Ray cluster answers there"
    if "://" in address:
        raise UserError(
            f"--ray {address}: give HOST:PORT of the cluster, and run on one of its machines; "
            "Ray's client has no streams of messages"
        )
    host, colon, port = address.rpartition(":")
    if colon:
        if not port.isdigit():
            raise UserError(f"--ray {address}: give HOST:PORT, auto or local")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECTS_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"{no_answer} ({brief(error)})") from error
    elif address != "auto":
        raise UserError(f"--ray {address}: give HOST:PORT, auto or local")
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += ["--address", address] if colon else []
    try:
        done = subprocess.run(command, timeout=ANSWERS_S, capture_output=True)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{no_answer} within {ANSWERS_S:.0f} s") from error
    if done.returncode:
        raise UserError(no_answer)


def _node(facts: Mapping[str, Any]) -> Node:
    resources = facts["Resources"]
    n_cpus, n_gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    return Node(facts["NodeID"], facts["NodeManagerHostname"], n_cpus, n_gpus)


def _cluster(ray: Any, nodes: list[Node], n_cpus: int | None, wants_gpu: bool | None) -> RayCluster:
    """Share out the machines among runs; those on which none fits are left out."""
    if wants_gpu is None:
        wants_gpu = any(node.n_gpus for node in nodes)
    n_gpus = int(wants_gpu)
    fit = [node for node in nodes if node.n_cpus and node.n_gpus >= n_gpus]
    if n_cpus is None:
        n_cpus = min((node.n_cpus // (node.n_gpus if n_gpus else 1) for node in fit), default=1)
        n_cpus = max(1, n_cpus)
    fit = [node for node in fit if _n_runs(node, n_cpus, n_gpus)]
    if not fit:
        has = ", ".join(
            f"{n.host}: {counted(n.n_cpus, 'CPU')}, {counted(n.n_gpus, 'GPU')}" for n in nodes
        )
        gpu = " and a GPU" if n_gpus else ""
        raise UserError(
            f"no machine of the Ray cluster has {counted(n_cpus, 'CPU')}{gpu} for a run ({has})"
        )
    return RayCluster(ray, fit, n_cpus, n_gpus)


def _n_runs(node: Node, n_cpus: int, n_gpus: int) -> int:
    return min(node.n_cpus // n_cpus, node.n_gpus // n_gpus if n_gpus else node.n_cpus)


def _remote(ray: Any, work: str) -> Any:
    """Return a function of `remote_work` as a task of Ray, whose messages are a stream.

    It travels by value, so that a machine without swlora can say so. Lost runs are begun again by
    who ordered them, who counts how often.
    """

    def carry_out(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            from swlora.study import remote_work
        except ImportError as error:
            import platform

            reason = f"{platform.node()} has no swlora like the one here: {error}"
            yield {"kind": "refused", "reason": reason}
            return
        yield from getattr(remote_work, work)(order)

    return ray.remote(max_retries=0, num_returns="streaming")(carry_out)

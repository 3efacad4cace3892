"""Hidden states below the lowest adapted block, computed once and kept in a file.

They depend on the tokens up to a node and on frozen weights only, so they are constants: kept by
node of the data set's trie, (n_nodes, D) in the model's dtype, under a folder named by a hash of
everything that they depend on. A tree that needs a state that is not there yet has the whole fixed
group of sequences computed that owns it (data/fixed_groups.py), never itself: so a state has the
same bits whichever step, epoch or run asks first, and a run does not depend on what others left.
Beside every state lies its checksum, 0 for none yet: what a disk or a crash changed is noticed when
it is read, and computed again. Plain reads and writes instead of a mapping, so that a full disk is
an error that can be caught and the pages do not count as the process's memory.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swlora.caches import ABOUT, LOCK, PREFIX, about, disk_bytes, remove
from swlora.data.fixed_groups import (
    GROUP_NODES,
    MAX_REPEATED_SHARE,
    MAX_TREE_NODES,
    fixed_groups,
)
from swlora.data.prefix_tree import PrefixTree, build_tree, count_nodes, number_nodes
from swlora.data.token_sequences import TokenSequences
from swlora.disk_space import free_bytes, size
from swlora.errors import RunFailedError, UserError
from swlora.files import read_json, write_json
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.locks import lock
from swlora.models.fingerprint import add_weights, config_values
from swlora.paths import cache_dir
from swlora.processes import world
from swlora.versions import package_versions

GIB = 1 << 30
FORMAT = 4  # another one where the same states would have other bits
CHECKSUM = np.dtype(np.uint32)


def n_cache_bytes(base_model: Any, sequences: TokenSequences) -> int:
    """Return the size of a cache for `sequences`: a state and a checksum for every node."""
    state_bytes = int(base_model.config.hidden_size) * next(base_model.parameters()).element_size()
    return int(count_nodes(sequences) * (state_bytes + CHECKSUM.itemsize))


class PrefixCache:
    """Reads states at the cut from a file, and computes those that are not there by fixed groups.

    It is there where `limit_gb` and the disk, of which `kept_bytes` are for others, have room for
    all of it. After a failure of the disk it computes every tree by itself, to the end. `say` gets
    a line when the cache is used, or cannot be.
    """

    def __init__(
        self,
        walk: TreeWalk,
        sequences: TokenSequences,
        *,
        limit_gb: float,
        say: Callable[[str], None],
        kept_bytes: int = 0,
    ) -> None:
        self._walk, self._sequences = walk, sequences
        self._say = say
        self._n_nodes = count_nodes(sequences)
        name = Path(walk.base_model.config._name_or_path or "a model").name
        self._owner = f"{name}: states of {self._n_nodes:,} tokens below layer {walk.cut}"
        parameter = next(walk.base_model.parameters())
        self._width = int(walk.base_model.config.hidden_size)
        self._dtype: torch.dtype = parameter.dtype
        self._state_bytes = self._width * parameter.element_size()
        self._data: int | None = None
        self._opened = ExitStack()  # the lock and the files
        self.n_read_trees = self.n_computed_groups = self.n_damaged_trees = 0
        n_bytes, limit_bytes = n_cache_bytes(walk.base_model, sequences), int(limit_gb * GIB)
        if n_bytes > limit_bytes:
            say(
                f"no prefix cache: it needs {n_bytes / GIB:.1f} GiB and --cache-gb allows "
                f"{limit_gb:g}"
            )
            return
        self._numbers = number_nodes(sequences)
        self._groups = fixed_groups(sequences)
        folder = cache_folder(walk, sequences)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if world().local_rank == 0:
                _make_room(folder, limit_bytes - n_bytes)
            missing = n_bytes - (disk_bytes(folder) if folder.is_dir() else 0)
            if missing > (free := max(0, free_bytes(folder) - kept_bytes)):
                say(
                    f"no prefix cache: it needs {size(missing)} more in {cache_dir()}, whose disk "
                    f"has {size(free)} to spare"
                )
                return
            self._open(folder)
        except (OSError, RunFailedError) as error:
            self._give_up(error)

    def __call__(self, tree: PrefixTree, layout: TreeLayout) -> Tensor:
        """Return the hidden state at the cut, (1, T, D), of the T nodes of a tree."""
        if self._data is None:
            return self._walk.prefix(layout)
        try:
            states = self._kept(self._numbers[tree.node_source])
        except OSError as error:
            self._give_up(error)
            return self._walk.prefix(layout)
        return states.to(layout.token_ids.device)[None]

    def _kept(self, nodes: np.ndarray) -> Tensor:
        """Return the states of nodes (T,), (T, D), from the file; compute what is not there."""
        missing = nodes[self._checksums[nodes] == 0]
        if world().is_shared:
            missing = self._still_missing(missing)
        self._compute(missing)
        states, damaged = self._read(nodes)
        if len(damaged):
            self._note_damage()
            self._compute(damaged)
            states, damaged = self._read(nodes)
            if len(damaged):
                raise OSError("the prefix cache does not give back what was written")
        self.n_read_trees += not len(missing)
        return states

    def _still_missing(self, nodes: np.ndarray) -> np.ndarray:
        """Return those of the nodes whose states no other process of the run has kept either."""
        assert self._data is not None
        n_whole = os.fstat(self._data).st_size // self._state_bytes
        for group in self._groups.owners(nodes).tolist():
            first, end = self._groups.first_node[group : group + 2].tolist()
            n_bytes = (min(end, n_whole) - first) * CHECKSUM.itemsize
            kept = os.pread(self._sums, max(0, n_bytes), first * CHECKSUM.itemsize)
            n_kept = len(kept) // CHECKSUM.itemsize
            self._checksums[first : first + n_kept] = np.frombuffer(kept, CHECKSUM, n_kept)
        missing: np.ndarray = nodes[self._checksums[nodes] == 0]
        return missing

    def _compute(self, nodes: np.ndarray) -> None:
        """Compute and keep the states of all groups that own any of the nodes."""
        groups = self._groups
        for group in groups.owners(nodes).tolist():
            tree = build_tree(self._sequences, groups.sequence_ids(group))
            hidden = self._walk.prefix(TreeLayout(tree, self._walk.base_model.device))
            self._write(int(groups.first_node[group]), hidden[0, groups.n_shared[group] :])
            self.n_computed_groups += 1

    @property
    def is_open(self) -> bool:
        """Whether states are read and kept."""
        return self._data is not None

    @property
    def missing_share(self) -> float:
        """How many of the states are not there yet, as a share of all."""
        return float((self._checksums == 0).mean())

    def close(self) -> None:
        """Let go of the files; the cache stays for later runs."""
        self._data = None
        self._opened.close()

    def _open(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        in_use = lock(folder / LOCK, alone=False, wait=True, make=True)  # not to be evicted
        assert in_use  # it waited
        self._opened.enter_context(in_use)
        header = {"format": FORMAT, "n_nodes": self._n_nodes, "row_bytes": self._state_bytes}
        opening = lock(folder / "opening", alone=True, wait=True, make=True)  # one after another
        assert opening
        with opening:
            if _header(folder) != header:
                for stale in ("states", "checksums"):
                    (folder / stale).unlink(missing_ok=True)
                write_json(folder / ABOUT, about(self._owner))
                write_json(folder / "header.json", header)
            self._sums = self._open_file(folder / "checksums")
            self._data = self._open_file(folder / "states")
        os.utime(folder)
        self._checksums = np.zeros(self._n_nodes, CHECKSUM)
        saved = os.pread(self._sums, self._checksums.nbytes, 0)
        n_whole = os.fstat(self._data).st_size // self._state_bytes  # a cut file lost the others
        n_saved = min(len(saved) // CHECKSUM.itemsize, n_whole)
        self._checksums[:n_saved] = np.frombuffer(saved, CHECKSUM, n_saved)
        if share := 1 - self.missing_share:
            self._say(f"prefix cache: {share:.0%} of the states are there from an earlier run")

    def _open_file(self, path: Path) -> int:
        """Open a file until `close`; return its descriptor."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._opened.callback(os.close, descriptor)
        return descriptor

    def _read(self, nodes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return the states of nodes (T,), (T, D), and those nodes whose states are damaged."""
        states = torch.empty(len(nodes), self._width, dtype=self._dtype)
        view = states.view(torch.uint8).numpy().data.cast("B")
        assert self._data is not None
        for first, start, stop in _stretches(nodes):
            target = view[start * self._state_bytes : stop * self._state_bytes]
            if os.preadv(self._data, [target], first * self._state_bytes) != len(target):
                raise OSError("the prefix cache is shorter than its header says")
        found = self._checksums_of(view)
        damaged = []
        for k in np.flatnonzero(found != self._checksums[nodes]):
            # Another process, of other threads, may have written the state since.
            place = int(nodes[k]) * CHECKSUM.itemsize
            if os.pread(self._sums, CHECKSUM.itemsize, place) == found[k].tobytes():
                self._checksums[nodes[k]] = found[k]
            else:
                damaged.append(nodes[k])
        return states, np.array(damaged, dtype=np.int64)

    def _checksums_of(self, states: memoryview) -> np.ndarray:
        size = self._state_bytes
        sums = [zlib.crc32(states[at : at + size]) or 1 for at in range(0, len(states), size)]
        return np.array(sums, CHECKSUM)

    def _write(self, first: int, hidden: Tensor) -> None:
        """Keep states (T, D) of the nodes from number `first` on."""
        states = hidden.detach().to("cpu", self._dtype).contiguous()
        view = states.view(torch.uint8).numpy().data.cast("B")
        assert self._data is not None
        _write_all(self._data, view, first * self._state_bytes)
        sums = self._checksums_of(view)
        _write_all(self._sums, memoryview(sums.tobytes()), first * CHECKSUM.itemsize)
        self._checksums[first : first + len(sums)] = sums

    def _note_damage(self) -> None:
        if not self.n_damaged_trees:
            self._say("prefix cache: states in it are damaged; they are computed again")
        self.n_damaged_trees += 1

    def _give_up(self, error: OSError | RunFailedError) -> None:
        reason = getattr(error, "strerror", None) or error
        self._say(f"going on without the prefix cache: {reason}")
        self.close()


def cache_folder(walk: TreeWalk, sequences: TokenSequences) -> Path:
    """Return where the states are kept, whether it is there or not."""
    return cache_dir() / PREFIX / (content_key(walk, sequences) + _of_machine())


def _of_machine() -> str:
    """Return what sets apart the caches of several machines, which may have one cache folder.

    The processes of one machine share a cache, as runs do: a state is computed by who needs it
    first, in the same way by all.
    """
    us = world()
    return f"-{us.machine}" if us.size > us.local_size else ""


def content_key(walk: TreeWalk, sequences: TokenSequences) -> str:
    """Hash everything the states at the cut depend on: tokens, frozen weights, cut, dtype.

    Also what decides their last bits: how groups are cut, the packages and the kind of device.
    """
    digest = hashlib.sha256()
    model = walk.base_model
    rounding = [GROUP_NODES, MAX_TREE_NODES, MAX_REPEATED_SHARE, package_versions()]
    limits_tokens = walk.rotary.limits_tokens
    facts = [FORMAT, walk.cut, config_values(model.config), *limits_tokens, rounding]
    facts.append(model.device.type)
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(np.ascontiguousarray(sequences.tokens).data)
    digest.update(np.ascontiguousarray(sequences.offsets).data)
    above = {id(p) for block in walk.anatomy.blocks[walk.cut :] for p in block.parameters()}
    named = walk.anatomy.backbone.named_parameters()
    add_weights(digest, ((name, weight) for name, weight in named if id(weight) not in above))
    return digest.hexdigest()[:32]


def _stretches(nodes: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut nodes (T,) into stretches of consecutive numbers: (number of the first, start, stop)."""
    bounds = np.flatnonzero(np.diff(nodes) != 1) + 1
    starts = [0, *bounds.tolist()]
    stops = [*bounds.tolist(), len(nodes)]
    return [(int(nodes[a]), a, b) for a, b in zip(starts, stops, strict=True)]


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        n_written = os.pwrite(descriptor, data, offset)
        data, offset = data[n_written:], offset + n_written


def _header(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / "header.json")
    except UserError:
        return None


def _make_room(keep: Path, allowed_bytes: int) -> None:
    """Remove the least recently used caches until the others fit; those in use stay."""
    others = [folder for folder in keep.parent.iterdir() if folder.is_dir() and folder != keep]
    others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    total_bytes = 0
    for folder in others:
        total_bytes += disk_bytes(folder)
        if total_bytes > allowed_bytes:
            remove(PREFIX, folder)

"""What each of several processes holds of a sharded model, found by processes that load it."""

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any


def held_by_each(model: Path, folder: Path, dtype: str = "float32", n: int = 2) -> list[Any]:
    """Load a model's parts in n processes; return by rank what `_held` found of each."""
    port = str(random.SystemRandom().randrange(20_000, 32_000))
    context = multiprocessing.get_context("forkserver")
    results = [folder / f"held-{rank}.json" for rank in range(n)]
    processes = []
    for rank in range(n):
        environment = {
            **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)},
            **{"LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        own = context.Process(target=_load, args=(environment, model, dtype, results[rank]))
        own.start()
        processes.append(own)
    try:
        for own in processes:
            own.join(100)
        assert [own.exitcode for own in processes] == [0] * n
    finally:
        for own in processes:
            own.kill()
    return [json.loads(path.read_text()) for path in results]


def _load(environment: dict[str, str], model: Path, dtype: str, result: Path) -> None:
    os.environ |= environment | {"HF_HUB_OFFLINE": "1"}
    from swlora.config import ModelSpec
    from swlora.models.sharded import load_sharded_model
    from swlora.processes import joined
    from swlora.processes.tensors import start_group

    with joined():
        start_group("cpu")
        spec = ModelSpec(name=str(model), dtype=dtype, device="cpu", threads=1)
        result.write_text(json.dumps(_held(load_sharded_model(spec).model)))


def _held(model: Any) -> dict[str, Any]:
    """Return the bytes of its parameters, here and in all, and what it is when it is gathered."""
    from swlora.models.identity import weights_sample_sha256
    from swlora.models.sharded_weight import is_sharded, own_part, whole

    parameters = dict(model.named_parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        "whole": [name for name, p in parameters.items() if not is_sharded(p)],
        "own_bytes": sum(own_part(p).nbytes for p in parameters.values()),
        "all_bytes": sum(p.nbytes for p in parameters.values()),
        "is_tied": head.weight is embedding.weight,
        "sample": weights_sample_sha256(model),
        "sums": {name: float(whole(p).double().sum()) for name, p in parameters.items()},
        "dtypes": {name: str(p.dtype) for name, p in parameters.items()},
        "buffers": {n: [str(b.dtype), b.double().tolist()] for n, b in model.named_buffers()},
    }

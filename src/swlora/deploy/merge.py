"""A merged model: an adapter added to its base's weights, written, read back and compared.

The weights are computed one by one from the files. What was written is loaded by transformers alone
and compared, in float32, with the base and the adapter as PEFT runs them: what differs then is the
rounding to the output's dtype, or a mistake.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.saved import WEIGHTS, adapter_folder, load_adapter, read_facts
from swlora.config import ModelSpec
from swlora.deploy.agreement import (
    LEAST_EFFECT_NATS,
    MOST_OF_EFFECT,
    Agreement,
    held_texts,
    measure_agreement,
    measure_effect,
    n_comparisons,
)
from swlora.deploy.first_difference import first_difference
from swlora.deploy.in_float32 import computed_in_float32
from swlora.deploy.merge_base import (
    MergeBase,
    check_base,
    open_base,
    read_folder,
)
from swlora.deploy.merge_report import MERGE_REPORT
from swlora.deploy.merged_card import merged_card
from swlora.deploy.merged_folder import (
    DTYPES,
    changed_dtypes,
    plan_merge,
    write_rest,
    write_weights,
)
from swlora.deploy.new_folder import check_new, new_folder
from swlora.errors import RunFailedError, UserError
from swlora.files import sha256_of, write_json, write_text
from swlora.memory import peak_memory_bytes
from swlora.models.identity import BaseModel
from swlora.progress import Progress
from swlora.result_json import as_json
from swlora.versions import package_versions

# Mean KL in nats a token: about ten times what rounding alone gave (docs/decisions.md).
TOLERANCE_NATS = {"float32": 1e-7, "float16": 1e-4, "bfloat16": 2e-2}
# KL of the merged model, as a share of the KL that the adapter makes, from which on it is noted
LARGE_SHARE = 0.1
# |y - y'| / |y| of a module's output, beyond what rounding explains.
MODULE_LIMIT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class MergeRequest:
    """What is merged: `dtype` None keeps that of each weight of the base."""

    adapter: Path
    output: Path
    model: ModelSpec
    dtype: str | None = None
    shard_gb: float = 5.0
    force: bool = False


def merge_request(
    adapter: Path,
    output: Path,
    model: ModelSpec,
    dtype: str | None,
    shard_gb: float,
    *,
    force: bool,
) -> MergeRequest:
    """Return what flags, or keyword arguments, ask for; UserError for what cannot be."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"merge takes no dtype {dtype!r}; it takes {', '.join(DTYPES)}")
    if not 0.001 <= shard_gb < math.inf:  # as of --shard-gb
        raise UserError(f"shard_gb must be at least 0.001 and finite, not {shard_gb}")
    return MergeRequest(adapter, output, model, dtype, shard_gb, force)


@dataclass(frozen=True)
class Merged:
    """The merge report: what was merged, and how far the result agrees with base and adapter.

    `dtype` is that of the changed weights, the one that rounds most where they have several.
    `adapter` is what training noted of it, `adapter_sha256` the hash of its weights.
    """

    output: Path
    base: BaseModel
    adapter: dict[str, Any]
    adapter_sha256: str
    dtype: str
    n_changed_weights: int
    untied_head: bool
    files: int
    weights_bytes: int
    agreement: Agreement
    kl_nats_per_token: float
    share_of_equal_top_tokens: float
    adapter_kl_nats_per_token: float
    tolerance_kl_nats_per_token: float
    notes: list[str]
    merge_s: float
    compare_s: float
    peak_memory_bytes: int
    packages: dict[str, str]


def merge(request: MergeRequest, progress: Progress) -> Merged:
    """Merge as `request` says; return the report, which lies in the folder too.

    Raises UserError for what does not fit together, and RunFailedError where the result does not
    agree with base and adapter or cannot be written: then nothing is left at the output.
    """
    from swlora.evaluation.decode import end_tokens

    folder = adapter_folder(request.adapter)
    check_new(request.output)
    base = open_base(folder, request.model)
    progress.say(f"base: {base.loaded.source}")
    named, notes = base.identify(), []
    if difference := check_base(folder, named, base.loaded):
        if not request.force:
            raise UserError(
                f"{difference}; give --model the one it was trained on, or --force if this is the "
                "same model in another format"
            )
        notes.append(difference)
    merging = MergedWeights(folder, base.loaded.model)
    merging.check_own(base.tensor)
    notes += merging.notes
    dtype = DTYPES[request.dtype] if request.dtype else None
    plan = plan_merge(base, merging, dtype, int(request.shard_gb * 1e9))
    if plan.untied:
        notes.append("head and embedding, one weight in the base, are two: the adapter moved one")
    for note in notes:
        progress.say(f"note: {note}")
    with new_folder(request.output, plan.n_bytes) as scratch:
        start_s = time.perf_counter()
        with progress.task("merge", sum(map(len, plan.shards))) as task:
            write_weights(scratch, plan, base, merging, dtype, lambda: task.advance())
        widest, facts = dtype or base.dtype, read_facts(folder)
        ends = end_tokens(base.loaded, is_chat=bool(facts.get("is_chat")))
        write_rest(scratch, plan, base.loaded.tokenizer, widest, ends)
        merged_s = time.perf_counter()
        name = _roundest(changed_dtypes(base, merging, dtype))
        agreement, effect = compare(scratch, base, folder, widest, name, progress)
        effect_nats = effect.kl_nats_per_token
        if felt := _note_on_rounding(agreement.kl_nats_per_token, effect_nats, name):
            notes.append(felt)
            progress.say(f"note: {felt}")
        report = Merged(
            output=request.output,
            base=named,
            adapter=_adapter_facts(facts),
            adapter_sha256=sha256_of(folder / WEIGHTS),
            dtype=name,
            n_changed_weights=len(merging.changed),
            untied_head=plan.untied,
            files=len(plan.shards),
            weights_bytes=plan.n_bytes,
            agreement=agreement,
            kl_nats_per_token=agreement.kl_nats_per_token,
            share_of_equal_top_tokens=agreement.share_of_equal_top_tokens,
            adapter_kl_nats_per_token=effect_nats,
            tolerance_kl_nats_per_token=TOLERANCE_NATS[name],
            notes=notes,
            merge_s=merged_s - start_s,
            compare_s=time.perf_counter() - merged_s,
            peak_memory_bytes=peak_memory_bytes("cpu"),
            packages=package_versions(),
        )
        written = as_json(report) | {"output": request.output.name}
        write_json(scratch / MERGE_REPORT, written)
        write_text(scratch / "README.md", merged_card(written))
    return report


def _roundest(dtypes: set[torch.dtype]) -> str:
    """Return which of the dtypes rounds most, by its name; "float32" where none does more.

    A base may hold several: a float32 tensor among bfloat16 matrices makes the sum no more exact.
    """
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return max(names & TOLERANCE_NATS.keys(), key=TOLERANCE_NATS.__getitem__, default="float32")


def compare(
    scratch: Path,
    base: MergeBase,
    adapter: Path,
    dtype: torch.dtype,
    name: str,
    progress: Progress,
) -> tuple[Agreement, Agreement]:
    """Compare what was written, and the base alone, with base and adapter.

    dtype: in which all weights are read. name: that to which changed ones were rounded. Raises
    RunFailedError where what was written differs beyond the tolerance, or by more than half of what
    the adapter does: rounding to a narrow dtype can take a light one away. Both models are views of
    their files, and hold one block in float32 at a time.
    """
    reference, model = load_adapter(base.read_whole(), adapter), read_folder(scratch, dtype)
    texts = held_texts(base.loaded.tokenizer, base.loaded.context_tokens)
    with computed_in_float32(reference), computed_in_float32(model):
        with progress.task("compare with base and adapter", n_comparisons(texts)) as task:
            found = measure_agreement(reference, model, texts, lambda: task.advance())
            effect = measure_effect(reference, texts)
        kl, effect_nats = found.kl_nats_per_token, effect.kl_nats_per_token
        most = MOST_OF_EFFECT * effect_nats
        if effect_nats > LEAST_EFFECT_NATS and TOLERANCE_NATS[name] >= kl > most:
            raise RunFailedError(
                f"the merged model is as far from base and adapter as the base is, and was not "
                f"kept: in {name} rounding moves it by {kl:.2g} nats a token, the adapter by "
                f"{effect_nats:.2g}; merge with --dtype float32"
            )
        if kl <= TOLERANCE_NATS[name]:
            return found, effect
        first = first_difference(reference, model, texts.windows, MODULE_LIMIT[name])
    where = "no single module stands out"
    if first is not None:
        where = f"the first to differ is {first.module}, by {first.relative:.1%} of its output"
    raise RunFailedError(
        f"the merged model is not base and adapter, and was not kept: {found}, where at most "
        f"{TOLERANCE_NATS[name]:g} nats come from rounding to {name}; {where}"
    )


def _note_on_rounding(kl_nats: float, effect_nats: float, dtype: str) -> str | None:
    """Say so where rounding moves the model by much of what the adapter does (nats a token)."""
    if effect_nats <= LEAST_EFFECT_NATS or kl_nats <= LARGE_SHARE * effect_nats:
        return None
    return (
        f"rounding to {dtype} is felt: it moves the model by {kl_nats:.2g} nats a token, the "
        f"adapter by {effect_nats:.2g}; --dtype float32 rounds least"
    )


def _adapter_facts(facts: dict[str, Any]) -> dict[str, Any]:
    kept = ("method", "settings", "layers", "targets", "data", "training", "seed", "is_chat")
    return {name: facts[name] for name in kept if name in facts}

"""identify -> choose layers -> train -> evaluate, for one configuration in one run folder.

The command line, the studies and the web page all call these functions and nothing below them.
Each writes what it found into the run folder and returns the same as a dict of plain values.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swlora.adapters.layers import needs_identification, resolve_layers
from swlora.config import RunSpec
from swlora.data.sources import Dataset, load_dataset
from swlora.data.tree_rows import TokenSequences
from swlora.errors import UserError
from swlora.files import write_json
from swlora.models.load import LoadedModel, load_model
from swlora.progress import Progress
from swlora.runs import Run, read_metrics

Result = dict[str, Any]
ADAPTER_FACTS = "swlora.json"


@dataclass
class Job:
    """One configuration at work in one run folder; model and data are loaded when first used."""

    spec: RunSpec
    run: Run
    progress: Progress

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, in float32 where identification comes first (its weights are measured)."""
        exact = self.run.facts["command"] == "identify" or needs_identification(
            self.spec.adapter.layers
        )
        with self.timed("load_model"), self.progress.task("load the model"):
            loaded = load_model(self.spec.model, dtype="float32" if exact else None)
        self.progress.say(f"model: {loaded.source}")
        self.run.record(model_source=loaded.source, model_revision=loaded.revision)
        return loaded

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, announced by its source."""
        with self.timed("load_data"), self.progress.task("load the data"):
            dataset = load_dataset(self.spec.data)
        self.progress.say(f"data: {dataset.source}")
        if dataset.n_skipped_rows:
            self.progress.say(f"{dataset.n_skipped_rows} bad rows were left out")
        self.run.record(
            data_source=dataset.source,
            data_sha256=dataset.sha256,
            n_skipped_rows=dataset.n_skipped_rows,
        )
        return dataset

    def encoded(self, split: str) -> TokenSequences:
        """Return a split as token ids; rows that had to be cut are counted and said."""
        from swlora.data.encode import encode_examples

        with self.timed("tokenise"), self.progress.task(f"tokenise the {split} rows"):
            sequences, n_cut = encode_examples(
                self.dataset.split(split),
                self.dataset.separator,
                self.loaded.tokenizer,
                context_tokens=self.loaded.context_tokens,
                truncate=self.spec.data.truncate,
            )
        if n_cut:
            self.progress.say(f"{n_cut} rows of the {split} split were cut to the context")
            self.run.record(**{f"n_cut_rows_{split}": n_cut})
        return sequences

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the run's timings."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.run.add_timing(name, time.perf_counter() - start_s)


def identify(job: Job, figure: Path | None = None) -> Result:
    """Find candidates for super weights, ablate each, draw the figure; return the findings.

    `layers` in the result are those of candidates whose ablation proved them.
    """
    from swlora.superweights import ablate
    from swlora.superweights.detect import scan
    from swlora.superweights.figure import draw_scan

    spec, loaded = job.spec.identify, job.loaded
    figure = figure or job.run.folder / "superweights.png"
    with job.timed("identify"):
        found = scan(
            loaded.model, loaded.tokenizer, spec.prompt, max_candidates=spec.max_candidates
        )
        windows = ablate.text_windows(loaded.tokenizer, spec.text, spec.windows, spec.window_tokens)
        candidates: list[Result] = []
        with job.progress.task("ablate candidates", 1 + len(found.candidates)) as task:
            base = ablate.text_loss(loaded.model, windows)
            task.advance()
            addresses = [candidate.address for candidate in found.candidates]
            losses = ablate.ablation_losses(loaded.model, windows, addresses)
            for candidate, loss in zip(found.candidates, losses, strict=True):
                task.advance(1, str(candidate.address))
                ratio = loss.perplexity / base.perplexity
                values = {k: v for k, v in asdict(candidate).items() if k != "address"}
                measured = {"perplexity": loss.perplexity, "ratio": ratio}
                found_out = {**measured, "verdict": ablate.verdict(ratio)}
                candidates.append({**asdict(candidate.address), **values, **found_out})
        draw_scan(found, f"Largest activations of {job.spec.model.name}", figure)
    layers = sorted({c["layer"] for c in candidates if c["verdict"] != "none"})
    result: Result = {
        "model": loaded.source,
        "prompt": found.prompt,
        "tokens": found.tokens,
        "text": str(spec.text) if spec.text else "the English sample shipped with swlora",
        "n_windows": spec.windows,
        "window_tokens": spec.window_tokens,
        "perplexity": base.perplexity,
        "thresholds": {"super": ablate.SUPER_RATIO, "strong": ablate.STRONG_RATIO},
        "layers": layers,
        "candidates": candidates,
        "modules": [asdict(module) for module in found.modules],
        "figure": str(figure),
    }
    job.run.write_result({"identify": result})
    return result


def train(job: Job) -> tuple[Any, Result]:
    """Train the adapter of `job.spec`; return (the PeftModel, what was done).

    Leaves adapter/ (a standard PEFT adapter), metrics.jsonl and loss.png in the run folder.
    """
    from swlora.adapters.methods import attach, train_mode, trainable_parameters
    from swlora.data.tree_rows import plan_steps
    from swlora.engine.loop import train as run_loop
    from swlora.engine.plain import PlainStep
    from swlora.evaluation.report import draw_loss

    spec, loaded = job.spec, job.loaded
    layers = choose_layers(job)
    sequences = job.encoded("train")
    model = attach(loaded.model, spec.adapter, layers, seed=spec.seed)
    train_mode(model)
    parameters = trainable_parameters(model)
    n_trainable = sum(p.numel() for p in parameters.values())
    job.progress.say(
        f"training {n_trainable:,} adapter weights in layers {_ranges(layers)} "
        f"on {len(sequences):,} rows"
    )

    def plan(epoch: int) -> list[list[Any]]:
        return plan_steps(
            sequences,
            sequences_per_step=spec.train.batch_size,
            max_tokens_per_row=1 << 30,
            order="iid",
            seed=spec.seed,
            epoch=epoch,
        )

    step = PlainStep(model, sequences, label_smoothing=spec.train.label_smoothing)
    with job.timed("train"):
        state = run_loop(step, plan, parameters, spec.train, job.run, job.progress)
    facts = {"separator": job.dataset.separator, "base_model": loaded.name, "layers": layers}
    save_adapter(model, job.run.folder / "adapter", facts)
    metrics = read_metrics(job.run.folder)
    draw_loss(metrics, job.run.folder / "loss.png")
    result: Result = {
        "layers": layers,
        "n_trainable": n_trainable,
        "rows": state.totals.rows,
        "steps": state.totals.step,
        "train_s": state.totals.elapsed_s,
        "examples_per_s": state.totals.rows / state.totals.elapsed_s,
        "last_loss": metrics[-1]["loss"],
        "adapter": str(job.run.folder / "adapter"),
        "loss_figure": str(job.run.folder / "loss.png"),
    }
    job.run.write_result({"train": result})
    return model, result


def choose_layers(job: Job) -> list[int]:
    """Turn the layer policy into layer numbers, identifying super weights where it needs them."""
    from swlora.models.anatomy import Anatomy
    from swlora.models.precision import resolve_dtype

    policy, model = job.spec.adapter.layers, job.loaded.model
    super_layers = None
    if needs_identification(policy):
        super_layers = identify(job)["layers"]
        model.to(resolve_dtype(job.spec.model.dtype, model.device.type))
    return resolve_layers(policy, Anatomy(model).n_layers, super_layers)


def evaluate(job: Job, model: Any) -> Result:
    """Generate once for every distinct prompt, score with all references, measure the loss.

    Leaves predictions.csv and result.json in the run folder.
    """
    from swlora.data.encode import encode_prompts
    from swlora.data.sources import group_references
    from swlora.evaluation.decode import generate
    from swlora.evaluation.loss import dataset_loss
    from swlora.evaluation.metrics import score
    from swlora.evaluation.report import write_predictions

    spec, split = job.spec, job.spec.data.eval_split
    examples, references = zip(*group_references(job.dataset.split(split)), strict=True)
    tokenizer = job.loaded.tokenizer
    prompts = encode_prompts(examples, job.dataset.separator, tokenizer)
    with job.timed("loss"):
        loss = dataset_loss(model, job.encoded(split), spec.decode.batch_size, job.progress)
    with job.timed("generate"):
        texts = generate(model, tokenizer, prompts, spec.decode, job.progress, seed=spec.seed)
    predictions = [" ".join(text.split()) for text in texts]
    with job.timed("score"), job.progress.task("score"):
        scores = score(predictions, references).as_dict()
    path = job.run.folder / "predictions.csv"
    write_predictions(path, [e.prompt for e in examples], predictions, references)
    result: Result = {
        **scores,
        "nll": loss.nats_per_token,
        "nll_sum_nats": loss.sum_nats,
        "n_tokens": loss.n_tokens,
        "n_prompts": len(prompts),
        "split": split,
        "decode": spec.decode.model_dump(mode="json"),
        "data": job.dataset.source,
        "predictions": str(path),
    }
    job.run.write_result({"eval": result})
    return result


def evaluate_adapter(job: Job, adapter: Path | None) -> Result:
    """Evaluate the adapter in a folder (a run folder will do), or the base model for None."""
    from swlora.adapters.methods import load_adapter

    model = job.loaded.model
    if adapter is not None:
        model = load_adapter(model, adapter_folder(adapter))
    return evaluate(job, model)


def train_evaluate(job: Job) -> Result:
    """Train, then evaluate what was trained, in one run folder."""
    model, trained = train(job)
    model.eval()
    evaluated = evaluate(job, model)
    result = {"train": trained, "eval": evaluated}
    job.run.write_result(result)
    return result


def generate_text(spec: RunSpec, prompt: str, adapter: Path | None, progress: Progress) -> Result:
    """Continue one prompt with the base model or an adapter.

    An adapter that was trained here gets its prompt as in training, separator included.
    """
    from swlora.adapters.methods import load_adapter
    from swlora.data.encode import encode_prompts
    from swlora.data.rows import Example
    from swlora.evaluation.decode import generate

    loaded = load_model(spec.model)
    progress.say(f"model: {loaded.source}")
    model, separator = loaded.model, ""
    if adapter is not None:
        folder = adapter_folder(adapter)
        model = load_adapter(model, folder)
        separator = read_adapter_facts(folder).get("separator", "")
    prompt_ids = encode_prompts([Example(prompt, "")], separator, loaded.tokenizer)
    text = generate(model, loaded.tokenizer, prompt_ids, spec.decode, progress, seed=spec.seed)[0]
    return {"model": loaded.source, "prompt": prompt, "text": text, "seed": spec.seed}


def adapter_folder(path: Path) -> Path:
    """Return the adapter folder that `path` is, or, for a run folder, holds."""
    inside = path / "adapter"
    if not path.is_dir():
        raise UserError(f"there is no adapter folder {path}")
    return inside if (inside / "adapter_config.json").is_file() else path


def read_adapter_facts(folder: Path) -> Result:
    """Return what training noted beside the adapter; empty for an adapter from elsewhere."""
    path = folder / ADAPTER_FACTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def save_adapter(model: Any, folder: Path, facts: Result) -> None:
    """Save a PEFT adapter as safetensors; the folder appears complete or not at all."""
    scratch = folder.with_name(f".{folder.name}-saving")
    model.save_pretrained(str(scratch), safe_serialization=True)
    (scratch / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    write_json(scratch / ADAPTER_FACTS, facts)
    scratch.replace(folder)


def _ranges(layers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)

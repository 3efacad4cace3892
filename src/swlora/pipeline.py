"""identify -> choose layers -> train -> evaluate, for one configuration in one run folder.

The command line, the studies and the web page all call these functions and nothing below them.
Each writes what it found into the run folder and returns the same as a dict of plain values.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swlora.adapters.layers import needs_identification, resolve_layers
from swlora.config import RunSpec
from swlora.data.rows import Example
from swlora.data.sources import Dataset, load_dataset
from swlora.data.tree_rows import TokenSequences
from swlora.errors import UserError
from swlora.models.load import LoadedModel, load_model
from swlora.progress import Progress
from swlora.runs import Run, read_metrics

Result = dict[str, Any]


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
        self.run.record_source(model_source=loaded.source, model_revision=loaded.revision)
        return loaded

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, announced by its source."""
        with self.timed("load_data"), self.progress.task("load the data"):
            dataset = load_dataset(self.spec.data)
        self.progress.say(f"data: {dataset.source}")
        if dataset.n_skipped_rows:
            self.progress.say(f"{dataset.n_skipped_rows} bad rows were left out")
        self.run.record_source(data_sha256=dataset.sha256)
        self.run.record(data_source=dataset.source, n_skipped_rows=dataset.n_skipped_rows)
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
    from swlora.superweights.figure import check_format, draw_scan

    figure = figure or job.run.folder / "superweights.png"
    check_format(figure)
    spec, loaded = job.spec.identify, job.loaded
    if spec.window_tokens > loaded.context_tokens:
        raise UserError(
            f"--window-tokens {spec.window_tokens} exceeds the model's context of "
            f"{loaded.context_tokens} tokens"
        )
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
    import torch

    from swlora.adapters.methods import attach, train_mode, trainable_parameters
    from swlora.adapters.saved import save_adapter
    from swlora.engine.loop import step_plan
    from swlora.engine.loop import train as run_loop
    from swlora.engine.tree_step import make_step
    from swlora.evaluation.report import draw_loss

    spec, sequences = job.spec, job.encoded("train")  # before identification, which takes long
    loaded, layers = job.loaded, choose_layers(job)
    model = attach(loaded.model, spec.adapter, layers, seed=spec.seed)
    train_mode(model)
    parameters = trainable_parameters(model)
    n_trainable = sum(p.numel() for p in parameters.values())
    job.progress.say(
        f"training {n_trainable:,} adapter weights in layers {_ranges(layers)} "
        f"on {len(sequences):,} rows"
    )

    plan = step_plan(sequences, spec.train, spec.seed)
    step = make_step(model, sequences, spec.train, job.progress.say)
    torch.manual_seed(spec.seed)  # dropout
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
    from swlora.models.precision import cast_parameters, resolve_dtype

    policy, model = job.spec.adapter.layers, job.loaded.model
    super_layers = None
    if needs_identification(policy):
        super_layers = identify(job)["layers"]
        cast_parameters(model, resolve_dtype(job.spec.model.dtype, model.device.type))
    return resolve_layers(policy, Anatomy(model).n_layers, super_layers)


def evaluate(job: Job, model: Any) -> Result:
    """Generate once for every distinct prompt, score with all references, measure the loss.

    Leaves predictions.csv and result.json in the run folder.
    """
    from swlora.evaluation.decode import generate
    from swlora.evaluation.loss import dataset_loss
    from swlora.evaluation.metrics import score
    from swlora.evaluation.report import write_predictions

    spec, split, tokenizer = job.spec, job.spec.data.eval_split, job.loaded.tokenizer
    examples, references, prompts = evaluation_rows(job)
    with job.timed("loss"):
        loss = dataset_loss(model, job.encoded(split), job.progress)
    with job.timed("generate"):
        texts = generate(model, tokenizer, prompts, spec.decode, job.progress, seed=spec.seed)
    predictions = [" ".join(text.split()) for text in texts]
    with job.timed("score"), job.progress.task("score"):
        scores = score(predictions, references).as_dict()
    path = job.run.folder / "predictions.csv"
    write_predictions(path, [_prompt_text(e) for e in examples], predictions, references)
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


def evaluation_rows(job: Job) -> tuple[list[Example], list[list[str]], list[list[int]]]:
    """Return the distinct prompts to generate for, their references and their token ids.

    Raises UserError where there are none, or where the model has no room for an answer.
    """
    from swlora.data.encode import encode_prompts
    from swlora.data.sources import group_references
    from swlora.evaluation.decode import check_room

    groups = group_references(job.dataset.split(job.spec.data.eval_split))
    examples = [example for example, _ in groups]
    prompts = encode_prompts(examples, job.dataset.separator, job.loaded.tokenizer)
    check_room(job.loaded.model, prompts, job.spec.decode)
    return examples, [references for _, references in groups], prompts


def evaluate_adapter(job: Job, adapter: Path | None) -> Result:
    """Evaluate the adapter in a folder (a run folder will do), or the base model for None."""
    from swlora.adapters.saved import adapter_folder, load_adapter

    folder = adapter_folder(adapter) if adapter else None
    job.dataset.split(job.spec.data.eval_split)  # mistyped names shall not cost a model's loading
    model = job.loaded.model
    return evaluate(job, load_adapter(model, folder) if folder else model)


def train_evaluate(job: Job) -> Result:
    """Train, then evaluate what was trained, in one run folder."""
    evaluation_rows(job)  # what cannot be evaluated shall be known before the training
    model, trained = train(job)
    return {"train": trained, "eval": evaluate(job, model.eval())}


def generate_text(spec: RunSpec, prompt: str, adapter: Path | None, progress: Progress) -> Result:
    """Continue one prompt with the base model or an adapter.

    An adapter that was trained here gets its prompt as in training, separator included.
    """
    from swlora.adapters.saved import adapter_folder, load_adapter, read_facts
    from swlora.data.encode import encode_prompts
    from swlora.evaluation.decode import generate

    folder = adapter_folder(adapter) if adapter else None
    loaded = load_model(spec.model)
    progress.say(f"model: {loaded.source}")
    model, separator = loaded.model, ""
    if folder:
        model = load_adapter(model, folder)
        separator = read_facts(folder).get("separator", "")
    prompt_ids = encode_prompts([Example(prompt, "")], separator, loaded.tokenizer)
    text = generate(model, loaded.tokenizer, prompt_ids, spec.decode, progress, seed=spec.seed)[0]
    return {"model": loaded.source, "prompt": prompt, "text": text, "seed": spec.seed}


def _prompt_text(example: Example) -> str:
    """Return the prompt for a person to read: its text, or a chat's turns."""
    turns = (f"{role}: {content}" for role, content in example.messages)
    return example.prompt or "\n".join(turns)


def _ranges(layers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)

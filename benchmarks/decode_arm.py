"""Train a small adapter, or generate with it one way, in this process; JSON out.

    python -m benchmarks.decode_arm adapter --out FOLDER --rows 640 --model M --data D --json F
    python -m benchmarks.decode_arm ours|plain --adapter FOLDER --prompts 96 --num-beams 1 ...

`plain` is what anybody would write first: `model.generate` over batches of eight prompts in file
order, padded on the left, the PEFT adapter switched on. The model ends its sentences only once it
is trained, so an untrained adapter would measure something else.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks import measure, rows
from benchmarks.arms import LORA_ALPHA, LORA_RANK

PLAIN_BATCH = 8
N_WARMUP = 4  # prompts generated for before the clock starts
MAX_NEW_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one way to generate.")
    parser.add_argument("what", choices=("adapter", "ours", "plain"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--adapter", type=Path, help="adapter folder, for ours and plain")
    parser.add_argument("--out", type=Path, help="run folder, for adapter")
    parser.add_argument("--rows", type=int, default=640, help="rows to train on, for adapter")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()

    from swlora.files import write_json

    write_json(args.json, train(args) if args.what == "adapter" else measured(args))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train all layers for one epoch on the first rows; the adapter is left in --out."""
    from swlora import pipeline
    from swlora.config import AdapterSpec, DataSpec, ModelSpec, RunSpec, TrainSpec
    from swlora.progress import Silent
    from swlora.runs import Run

    spec = RunSpec(
        model=ModelSpec(name=args.model),
        data=DataSpec(name=str(args.data), train_rows=args.rows),
        adapter=AdapterSpec(rank=LORA_RANK, alpha=LORA_ALPHA),
        train=TrainSpec(epochs=1, batch_size=32, learning_rate=4e-3),
    )
    with Run.create(args.out, spec, "train") as run:
        trained = pipeline.train(pipeline.Job(spec, run, Silent()))
    return {"epochs": [{"examples_per_s": trained.course.examples_per_s}]}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Generate for the first dev prompts; return texts, rate and peak memory."""
    from swlora.data.dataset import group_references

    dataset = rows.load(args.data)
    examples = [example for example, _ in group_references(dataset.dev)[: args.prompts]]
    way = _ours if args.what == "ours" else _plain
    generate, details = way(args, examples, dataset.separator)
    generate(slice(0, N_WARMUP))
    start_s = time.perf_counter()
    texts = generate(slice(None))
    seconds = time.perf_counter() - start_s
    return {
        "epochs": [{"examples_per_s": len(examples) / seconds}],
        "prompts": len(examples),
        "seconds": seconds,
        "num_beams": args.num_beams,
        "peak_bytes": measure.Memory().load_peak_bytes,
        "texts": texts,
        **details,
    }


def _beams(args: argparse.Namespace) -> dict[str, Any]:
    """Return the decoding of the LoRA paper where there are beams, else greedy."""
    if args.num_beams == 1:
        return {}
    return {"num_beams": args.num_beams, "length_penalty": 0.9, "no_repeat_ngram_size": 4}


def _ours(args: argparse.Namespace, examples: list[Any], separator: str) -> Any:
    from swlora.adapters.saved import adapter_folder, load_adapter
    from swlora.config import DecodeSpec, ModelSpec
    from swlora.data.encode import encode_prompts
    from swlora.evaluation.decode import generate
    from swlora.models.load import load_model
    from swlora.progress import Silent

    loaded = load_model(ModelSpec(name=args.model))
    model = load_adapter(loaded.model, adapter_folder(args.adapter)).eval()
    prompts = encode_prompts(examples, separator, loaded.tokenizer)
    spec = DecodeSpec(max_new_tokens=MAX_NEW_TOKENS, **_beams(args))

    def run(which: slice) -> list[str]:
        ends = loaded.end_token_ids
        return generate(model, loaded.tokenizer, prompts[which], spec, Silent(), end_token_ids=ends)

    return run, {"dtype": str(loaded.model.dtype), "batch": spec.batch_size}


def _plain(args: argparse.Namespace, examples: list[Any], separator: str) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swlora.adapters.saved import adapter_folder
    from swlora.models.precision import resolve_dtype

    dtype = resolve_dtype("auto", "cpu")
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = PeftModel.from_pretrained(base, adapter_folder(args.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    texts = [example.prompt + separator for example in examples]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    @torch.inference_mode()
    def run(which: slice) -> list[str]:
        chosen, done = texts[which], []
        for start in range(0, len(chosen), PLAIN_BATCH):
            batch = tokenizer(
                chosen[start : start + PLAIN_BATCH], padding=True, return_tensors="pt"
            )
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                **ids,
                **_beams(args),
            )
            new = out[:, batch["input_ids"].shape[1] :]
            done += tokenizer.batch_decode(new, skip_special_tokens=True)
        return done

    return run, {"dtype": str(dtype), "batch": PLAIN_BATCH}


if __name__ == "__main__":
    main()

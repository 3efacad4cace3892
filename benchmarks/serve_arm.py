"""Plain `generate` of transformers for some prompts, one after another, in this process; JSON out.

python -m benchmarks.serve_arm --model M --tokens 64 --prompts A B ... --json F
"""

import argparse
import time
from pathlib import Path

from benchmarks import measure


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure plain generation.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swlora.files import write_json
    from swlora.models.precision import resolve_dtype

    dtype = resolve_dtype("auto", "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    @torch.inference_mode()
    def generate(prompt: str) -> int:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=args.tokens, **ends)
        return int(out.shape[1] - ids["input_ids"].shape[1])

    for prompt in args.prompts:
        generate(prompt)
    start_s = time.perf_counter()
    n_tokens = sum(generate(prompt) for prompt in args.prompts)
    seconds = time.perf_counter() - start_s
    result = {
        "tokens": n_tokens,
        "seconds": seconds,
        "tokens_per_s": n_tokens / seconds,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "peak_bytes": measure.Memory().load_peak_bytes,
    }
    write_json(args.json, result)


if __name__ == "__main__":
    main()

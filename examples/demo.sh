#!/usr/bin/env bash
# The whole job on the embedded model: identify -> train -> eval. `make demo` calls it.
set -euo pipefail

bin=${BIN:-.venv/bin}
demo=runs/demo
config=examples/demo.yaml
rm -rf "$demo"

echo "== 1 of 3: find super weights, prove each by setting it to zero"
"$bin/swlora" identify --config "$config" --output "$demo/identify"
layers=$("$bin/python" -c '
import json, sys
found = json.load(open(sys.argv[1], encoding="utf-8"))["identify"]["layers"]
print(",".join(map(str, found)))' "$demo/identify/result.json")

echo
echo "== 2 of 3: train a LoRA adapter in the layers found: $layers"
"$bin/swlora" train --config "$config" --layers "$layers" --output "$demo/train"

echo
echo "== 3 of 3: generate for prompts of the dev set and score against all references"
"$bin/swlora" eval --config "$config" --adapter "$demo/train" --output "$demo/eval"

echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "  figure       $demo/identify/superweights.png"
echo "  adapter      $demo/train/adapter   (loads in plain PEFT)"
echo "  loss curve   $demo/train/loss.png"
echo "  scores       $demo/eval/result.json"
echo "  predictions  $demo/eval/predictions.csv"

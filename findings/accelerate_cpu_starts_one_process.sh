#!/usr/bin/env bash
# `accelerate launch --cpu --num_processes 2` starts a single process, and does not say so.
#
# Seen in accelerate 1.15.0 with torch 2.13.0 and no configuration file: the script runs once, its
# environment has neither RANK nor WORLD_SIZE, and accelerate's own state knows of one process. The
# command succeeds without a word about the number that was asked for. `torchrun
# --nproc-per-node 2` runs the same script twice. A program that is to be run by several processes
# on CPUs has to compare their number with the one that was wanted.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat >"$folder/who.py" <<'PYTHON'
import os

from accelerate import PartialState

state = PartialState(cpu=True)
line = f"process {state.process_index} of {state.num_processes}, WORLD_SIZE {os.environ.get('WORLD_SIZE')}\n"
os.write(1, line.encode())
PYTHON
export HF_HOME="$folder/hf" # no configuration of the user's
bin=$folder/venv/bin
"$bin/pip" list 2>/dev/null | grep -E '^(accelerate|torch) '
echo "accelerate launch --cpu --num_processes 2:"
"$bin/accelerate" launch --cpu --num_processes 2 "$folder/who.py" 2>"$folder/log" | tee "$folder/by_accelerate"
echo "torchrun --nproc-per-node 2:"
"$bin/torchrun" --standalone --nproc-per-node 2 "$folder/who.py" 2>"$folder/log" | sort | tee "$folder/by_torchrun"
[ "$(grep -c '^process 0 of 1,' "$folder/by_accelerate")" = 1 ]
[ "$(wc -l <"$folder/by_accelerate")" = 1 ]
[ "$(grep -c 'of 2,' "$folder/by_torchrun")" = 2 ]

#!/bin/bash
# pyarrow 26.0.1: ParquetFile(buffer_size=...), documented as the way to read pages by a buffered
# stream in place of whole column chunks, bounds nothing by itself. pre_buffer is True by default,
# and reads all columns of a row group before the first batch of iter_batches comes; a file with one
# row group is in memory whole, whatever buffer_size and batch_size. Only with pre_buffer=False does
# buffer_size do what it says: some megabytes then, for the same rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
export FOLDER=$folder
"$folder/venv/bin/python" - <<'PY'
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet

path = os.path.join(os.environ["FOLDER"], "one_group.parquet")
table = pyarrow.table({"text": [f"{i:06}" * 200 for i in range(100_000)]})
pyarrow.parquet.write_table(
    table, path, use_dictionary=False, compression="none", row_group_size=100_000
)
size = os.path.getsize(path) >> 20
print("pyarrow", pyarrow.__version__, "Python", sys.version.split()[0], f"file {size} MiB")
READ = """
import sys, pyarrow, pyarrow.parquet
file = pyarrow.parquet.ParquetFile(sys.argv[1], buffer_size=65536{options})
assert sum(batch.num_rows for batch in file.iter_batches(batch_size=512)) == 100_000
print(pyarrow.default_memory_pool().max_memory() >> 20)
"""
peaks = []
for options in ("", ", pre_buffer=False"):
    command = [sys.executable, "-c", READ.format(options=options), path]
    peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"buffer_size=65536{options}: peak {peaks[-1]} MiB of Arrow's memory")
if peaks[0] < size or peaks[1] > size // 4:
    sys.exit("the behaviour has changed")
PY

#!/usr/bin/env bash
# trackio keeps two projects in one database where only spaces and punctuation set them apart.
#
# Seen in trackio 0.43.0: of a project's name the letters, digits, hyphens and underscores make the
# name of its SQLite file, so that "my model", "my.model" and "mymodel" are one file, and whoever
# asks for the runs of one gets those of all. Nothing warns. Give names of letters, digits and
# hyphens, and something of your own where you had to change one.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet trackio==0.43.0
TRACKIO_DIR="$folder/data" "$folder/venv/bin/python" - "$folder/data" 2>/dev/null <<'PYTHON'
import sys
from pathlib import Path

import trackio

NAMES = ("my model", "my.model", "mymodel")
for number, name in enumerate(NAMES):
    trackio.init(project=name, name=f"run-{number}", embed=False)
    trackio.log({"loss": float(number)}, step=0)
    trackio.finish()
files = sorted(path.name for path in Path(sys.argv[1]).glob("*.db"))
runs = sorted(run.name for run in trackio.Api().runs("my model"))
print(f"trackio {trackio.__version__}: projects {NAMES}")
print("databases:", files)
print("runs of the first project:", runs)
sys.exit(not (files == ["mymodel.db"] and runs == ["run-0", "run-1", "run-2"]))
PYTHON

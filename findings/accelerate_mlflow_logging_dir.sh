#!/usr/bin/env bash
# Accelerate's MLflow tracker leaves no run in the folder that it is given for its logs.
#
# Seen in accelerate 1.15.0 with mlflow 3.17.2: `logging_dir`, said to be where mlflow's logs are
# stored, becomes the place of the experiment's artifacts alone, and a project folder of Accelerator
# does not reach the tracker. Settings and metrics go to MLflow's own default, `mlflow.db` in the
# folder that the program was called from, so that a run that is resumed from another folder is not
# found there. MLFLOW_TRACKING_URI, or mlflow.set_tracking_uri before the tracker begins, moves it.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 mlflow==3.17.2 torch==2.13.0
unset MLFLOW_TRACKING_URI MLFLOW_RUN_ID MLFLOW_EXPERIMENT_NAME
mkdir "$folder/called_from"
cd "$folder/called_from"
"$folder/venv/bin/python" - "$folder/logs" 2>"$folder/log" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from accelerate.tracking import MLflowTracker

logs = Path(sys.argv[1])
tracker = MLflowTracker("example", logging_dir=str(logs))
tracker.start()
tracker.store_init_configuration({"rate": 0.1})
tracker.log({"loss": 1.0}, step=1)
tracker.finish()
here = sorted(path.name for path in Path.cwd().iterdir())
there = sorted(path.name for path in logs.iterdir()) if logs.is_dir() else []
print("accelerate", version("accelerate"), "mlflow", version("mlflow"))
print("in the folder for logs:", there)
print("where the program was called:", here)
sys.exit(not (there == [] and "mlflow.db" in here))
PYTHON

"""Stands for a run's process: leaves the files that a run would, as fast as Python starts.

python fake_child.py PLACE FOLDER CONFIG RESUME ACTS
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

place, folder, config, resume, acts = sys.argv[1:]
act = json.loads(acts).get(place, {})
run = Path(folder)
phase = place.split("/")[0]


def write(name, value):
    (run / name).write_text(json.dumps(value))


def end(status, code, reason=None, error=None):
    timings = {"choose_layers": 2.5, "train": 1.0, "total": 4.0}
    facts = {"status": status, "reason": reason, "command": phase, "timings_s": timings}
    write("run.json", facts | ({"error": error} if error else {}))
    sys.exit(code)


def stopped(_number, _frame):
    end("cancelled", 130, "KeyboardInterrupt")


log = {
    "place": place,
    "resume": resume,
    "cache": os.environ["SWLORA_CACHE"],
    "pid": os.getpid(),
    "session": os.getsid(0),
}
log["cached"] = sorted(path.name for path in Path(os.environ["SWLORA_CACHE"]).iterdir())
with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
    calls.write(json.dumps(log) + "\n")
if resume == "False":
    shutil.copyfile(config, run / "config.yaml")
write("run.json", {"status": "running", "command": phase})
print(f"working in {place}", flush=True)
(Path(os.environ["SWLORA_CACHE"]) / "prefix").mkdir(exist_ok=True)
if act.get("hang") and resume == "False":
    signal.signal(signal.SIGTERM, stopped)
    (run / "checkpoint").mkdir()
    write("checkpoint/state-1.json", {})
    write("hanging", True)
    time.sleep(60)
if act.get("die"):
    os.kill(os.getpid(), signal.SIGKILL)
if act.get("no_run"):
    (run / "run.json").unlink()
    sys.exit("swlora: nothing here")
if "fail" in act:
    end("failed", 1, act["fail"], act.get("error"))
result = {
    "identify": {"choice": {"layers": act.get("layers", [1]), "reason": act.get("reason")}},
    "rates": {"heldout": {"nll": act.get("nll", 1.0)}},
}
write("result.json", result.get(phase, {}))
end("done", 0)

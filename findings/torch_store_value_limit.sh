#!/usr/bin/env bash
# A value of more than 8 MiB in torch's TCPStore ends the connection of whoever set it.
#
# Seen in torch 2.13.0: 7 MiB are set and read back; with 9 MiB `set` raises DistNetworkError that
# speaks of the network ("Connection reset by peer") and not of a size, and that client is of no
# more use. The store and its other clients go on. torchrun keeps such a store, and
# torch.distributed's messages of Python objects and programs that put results into it meet this
# limit where they grow with the number of steps or processes: send long messages in parts.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import sys
from datetime import timedelta

import torch
from torch.distributed import TCPStore

WAIT = timedelta(seconds=20)
store = TCPStore("127.0.0.1", 0, None, True, WAIT, wait_for_workers=False)


def client():
    return TCPStore("127.0.0.1", store.port, None, False, WAIT, wait_for_workers=False)


def outcome(one, mib):
    try:
        one.set("value", "x" * (mib << 20))
        return f"read back: {len(one.get('value')) >> 20} MiB"
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


one = client()
found = {mib: outcome(one, mib) for mib in (7, 9)}
found["the same client, 1 MiB"] = outcome(one, 1)
found["another client, 1 MiB"] = outcome(client(), 1)
print("torch", torch.__version__)
for what, said in found.items():
    print(what if isinstance(what, str) else f"{what} MiB", "->", said)
is_so = [said.startswith("read back") for said in found.values()]
sys.exit(is_so != [True, False, False, True])
PYTHON

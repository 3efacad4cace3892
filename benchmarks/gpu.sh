#!/bin/bash
# Everything that needs a GPU, in one call of nine minutes at most: the tests, then the benchmark.
#
#   bash benchmarks/gpu.sh --prepare    with a network, before: packages and rows into $WHEELS
#   bash benchmarks/gpu.sh              on the machine with the GPU; no network is needed
#   bash benchmarks/gpu.sh --dry-run    the same lines on a CPU with tiny models
#
# WHEELS (default .gpu): the folder that --prepare fills; take it along. OUT (default runs/gpu):
# where gpu.json and the logs go. PYTHON (default python3): it has torch and transformers.
set -uo pipefail
case "${1:-}" in
    "" | --prepare | --dry-run) ;;
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "gpu.sh: no option is called $1; there are --prepare and --dry-run" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-.gpu} OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [ "${1:-}" = --prepare ]; then
    exec "$PYTHON" -m benchmarks.gpu_prepare "$WHEELS"
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$WHEELS/*.whl" > /dev/null && [ "${1:-}" != --dry-run ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
fi
# swlora runs from its sources, which say their version where a package says it.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p "$site/swlora-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: swlora\nVersion: %s\n' "$version" \
    > "$site/swlora-$version.dist-info/METADATA"
export PYTHONPATH=$PYTHONPATH:$site
"$PYTHON" -m benchmarks.gpu --tokens "$WHEELS/e2e.npz" --out "$OUT" "$@"

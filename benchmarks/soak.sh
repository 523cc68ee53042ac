#!/usr/bin/env bash
# What a request pays, what a shutdown loses and how soon a fault ends a server, on this machine: raw samples into
# benchmarks/results/.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
OURS=coldstart-soak/smollm2:bf16
STOCK=coldstart-soak/smollm2:stock-eager
RESULTS=$PWD/benchmarks/results
TODAY=$(date +%F)

trap 'docker rmi "$OURS" "$STOCK" >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT TERM

weights=$(coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" -t "$OURS" --optimize startup --json -- --max-model-len 2048 |
  python -c 'import json, sys; print(json.load(sys.stdin)["weights_image"])')
DOCKER_BUILDKIT=0 docker build -q -t "$STOCK" --build-arg WEIGHTS="$weights" - <benchmarks/stock.Dockerfile
python -m benchmarks.proxy_hop "$OURS" "$STOCK" --starts "${STARTS:-6}" --json "$RESULTS/proxy-hop-$TODAY.json"
python -m benchmarks.soak "$OURS" --count "${COUNT:-50}" --json "$RESULTS/soak-$TODAY.json"
python -m benchmarks.probes "$OURS" --starts "${STARTS:-6}" --json "$RESULTS/probes-$TODAY.json"

# Each line is an end: the tests append.
rm -f "$RESULTS/fault-exits-$TODAY.jsonl"
COLDSTART_TEST_RECORD=$RESULTS/fault-exits-$TODAY.jsonl \
  python -m pytest -q tests/image/test_faults.py tests/image/test_shutdown.py

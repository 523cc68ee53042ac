#!/usr/bin/env bash
# Every figure of the README, on this machine, in one run: raw samples into benchmarks/results/.
# Run it on a quiet machine, by `make bench`.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
RUNS=${RUNS:-6} # fewer give no 95 % interval
AWQ=coldstart-bench/smollm2:awq
BF16=coldstart-bench/smollm2:bf16
STOCK=coldstart-bench/smollm2:stock-eager

trap 'docker rmi "$AWQ" "$BF16" "$STOCK" >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT TERM

coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" --quantize awq -t "$AWQ" -- --max-model-len 2048
weights=$(coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" -t "$BF16" --json -- --max-model-len 2048 |
  python -c 'import json, sys; print(json.load(sys.stdin)["weights_image"])')
DOCKER_BUILDKIT=0 docker build -q -t "$STOCK" --build-arg WEIGHTS="$weights" - <benchmarks/stock.Dockerfile
mkdir -p benchmarks/results
for cache in warm cold; do
  name=benchmarks/results/smollm2-$(date +%F)-$cache
  coldstart bench "$STOCK" "$BF16" "$AWQ" --runs "$RUNS" --page-cache "$cache" --json "$name.json" --svg "$name.svg"
done

#!/usr/bin/env bash
# What holds bench itself to account: the sampler's cost in pairs, stock vLLM with a filled compile cache, stock vLLM
# that downloads its weights, and bake's predictions against measured pulls. On a quiet machine, by
# `make bench-checks`; 25 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
BF16=coldstart-bench/smollm2:bf16
DEFAULT=coldstart-bench/smollm2:stock-default
today=$(date +%F)
results=benchmarks/results

trap 'docker rmi "$BF16" "$DEFAULT" >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT TERM

weights=$(coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" -t "$BF16" --optimize startup --json -- --max-model-len 2048 |
  python -c 'import json, sys; print(json.load(sys.stdin)["weights_image"])')
DOCKER_BUILDKIT=0 docker build -q -t "$DEFAULT" --build-arg WEIGHTS="$weights" - <benchmarks/stock-default.Dockerfile
mkdir -p "$results"
OUT=$results/sampler-$today.json benchmarks/sampler_cost.sh "$BF16" "${RUNS:-10}"
for state in cold warm; do
  coldstart bench "$DEFAULT" --runs 1 --compile-cache "$state" --json "$results/compile-$today-$state.json"
done
RUNS=${DOWNLOAD_RUNS:-3} benchmarks/download.sh
OUT=$results/bake-$today RUNS=${BAKE_RUNS:-3} benchmarks/bake_check.sh

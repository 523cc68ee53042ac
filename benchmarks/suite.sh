#!/usr/bin/env bash
# Every figure of the README, on this machine, in one run: raw samples into benchmarks/results/.
# Run it on a quiet machine, by `make bench`; 65 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
RUNS=${RUNS:-6}           # fewer give no 95 % interval
SLOW_RUNS=${SLOW_RUNS:-3} # of stock vLLM that compiles: a minute and a half each
ABLATION_RUNS=${ABLATION_RUNS:-4}
EAGER=coldstart-bench/smollm2:eager
COMPILED=coldstart-bench/smollm2:compiled
AWQ=coldstart-bench/smollm2:awq
STOCK=coldstart-bench/smollm2:stock-eager
DEFAULT=coldstart-bench/smollm2:stock-default
FLOAT32=coldstart-bench/smollm2:stock-default-float32
today=$(date +%F)
results=benchmarks/results

trap 'docker rmi "$EAGER" "$COMPILED" "$AWQ" "$STOCK" "$FLOAT32" "$DEFAULT" >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT TERM

# build TAG [FLAG...]
build() {
  coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" -t "$@" --json -- --max-model-len 2048
}
# measure NAME RUNS CACHE IMAGE...
measure() {
  local name=$results/$1-$today-$3
  coldstart bench "${@:4}" --runs "$2" --page-cache "$3" --json "$name.json" --svg "$name.svg"
}

build "$AWQ" --quantize awq --optimize startup
build "$COMPILED" --no-prewarm
coldstart prewarm "$COMPILED" --mode compiled-float32 # the compiled one that answers right
weights=$(build "$EAGER" --optimize startup | python -c 'import json, sys; print(json.load(sys.stdin)["weights_image"])')
export DOCKER_BUILDKIT=0
docker build -q -t "$STOCK" --build-arg WEIGHTS="$weights" - <benchmarks/stock.Dockerfile
docker build -q -t "$DEFAULT" --build-arg WEIGHTS="$weights" - <benchmarks/stock-default.Dockerfile
printf 'FROM %s\nCMD ["--dtype", "float32"]\n' "$DEFAULT" | docker build -q -t "$FLOAT32" -
mkdir -p "$results"
for cache in warm cold; do
  measure smollm2 "$RUNS" "$cache" "$STOCK" "$EAGER" "$AWQ" "$COMPILED"
  measure default "$SLOW_RUNS" "$cache" "$DEFAULT" "$FLOAT32" "$EAGER" "$COMPILED"
done
name=$results/ablation-$today
coldstart bench ablate "$COMPILED" --runs "$ABLATION_RUNS" --page-cache warm --json "$name.json" --svg "$name.svg"
name=$results/ablation-eager-$today-cold
coldstart bench ablate "$EAGER" --only deferred-imports --only read-ahead --runs "$ABLATION_RUNS" --page-cache cold --json "$name.json"
python -m benchmarks.floor "$EAGER" "$results/smollm2-$today-warm.json" "$results/smollm2-$today-cold.json" "$results/floor-$today.json"
python -m benchmarks.golden_tolerance "$EAGER" "$results/golden-tolerance-$today.json"
python -m benchmarks.readme

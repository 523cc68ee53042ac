#!/usr/bin/env bash
# vLLM's own server with its weights baked in against the same that downloads them from a hub on this machine
# at every start, against ours: what baking saves when the network is as fast as it can be. Same variables as suite.sh.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
RUNS=${RUNS:-3}
BAKED=coldstart-bench/smollm2:stock-baked
DOWNLOAD=coldstart-bench/smollm2:stock-download
OURS=coldstart-bench/smollm2:bf16
folder=$(mktemp -d)

trap 'kill "${hub:-}" 2>/dev/null || true; rm -rf "$folder"
      docker rmi "$BAKED" "$DOWNLOAD" "$OURS" >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT TERM

# On the bridge's own address, where containers reach it.
gateway=$(docker network inspect bridge -f '{{(index .IPAM.Config 0).Gateway}}')
python - "$COLDSTART_TEST_MODEL" "$gateway" "$folder/url" <<'EOF' &
import signal, sys
from pathlib import Path
from tests.hub import serve

with serve("bench/smollm2", Path(sys.argv[1]), host=sys.argv[2]) as hub:
    Path(sys.argv[3]).write_text(hub.url)
    signal.sigwait({signal.SIGTERM})
EOF
hub=$!
until [ -s "$folder/url" ]; do kill -0 "$hub"; sleep 0.1; done

weights=$(coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" -t "$OURS" --optimize startup --json -- --max-model-len 2048 |
  python -c 'import json, sys; print(json.load(sys.stdin)["weights_image"])')
DOCKER_BUILDKIT=0 docker build -q -t "$BAKED" --build-arg WEIGHTS="$weights" - <benchmarks/stock.Dockerfile
DOCKER_BUILDKIT=0 docker build -q -t "$DOWNLOAD" --build-arg BASE="$COLDSTART_TEST_BASE" --build-arg MODEL=bench/smollm2 \
  --build-arg HF_ENDPOINT="$(<"$folder/url")" - <benchmarks/stock-download.Dockerfile
coldstart bench "$BAKED" "$DOWNLOAD" "$OURS" --runs "$RUNS" --json "benchmarks/results/download-$(date +%F).json"

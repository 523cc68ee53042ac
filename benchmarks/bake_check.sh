#!/usr/bin/env bash
# Whether `coldstart bench bake` predicts well: the same model baked, quantized and baked, downloaded and mounted, pulled
# from a registry on this machine. Calibrated as fast as loopback goes, then held to runs at the rates below, and at the
# registry's rate where baking and downloading should take as long as each other. 15 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
RUNS=${RUNS:-3}
REGISTRY_RATE=${REGISTRY_RATE:-40} # MB/s
HUB_RATE=${HUB_RATE:-15}
OUT=${OUT:-benchmarks/results/bake-$(date +%F)}
NAME=${NAME:-coldstart-bench/bake}
folder=$(mktemp -d)
pids=()
images=() # bake, download, mount, awq

cleanup() {
  ((${#pids[@]})) && kill "${pids[@]}" 2>/dev/null || true
  ((${#images[@]})) && docker rmi "${images[@]}" >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
listening() { until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do sleep 0.1; done; }

# The same tensors in a file of other bytes, so that no image here shares a layer of weights with these.
model=$folder/SmolLM2-135M-Instruct # where stock.Dockerfile expects it
cp -r "$COLDSTART_TEST_MODEL" "$model"
python - "$model/model.safetensors" <<'PY'
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
data = path.read_bytes()
size = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + size])
header.setdefault("__metadata__", {})["bench"] = "bake"
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
path.unlink()
path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
PY
chmod -R a+rX "$folder"

# A registry and a hub; both are reached through a proxy whose rate can change.
gateway=$(docker network inspect bridge -f '{{(index .IPAM.Config 0).Gateway}}')
registry=$(free_port) front=$(free_port) hub_front=$(free_port)
cat >"$folder/registry.yml" <<YML
version: 0.1
storage: {filesystem: {rootdirectory: $folder/registry}}
http: {addr: "127.0.0.1:$registry"}
YML
docker-registry serve "$folder/registry.yml" >/dev/null 2>&1 &
pids+=($!)
python - "$model" "$folder/url" <<'PY' &
import signal, sys
from pathlib import Path
from tests.hub import serve

with serve("bench/smollm2", Path(sys.argv[1])) as hub:
    Path(sys.argv[2]).write_text(hub.url)
    signal.sigwait({signal.SIGTERM})
PY
pids+=($!)
until [ -s "$folder/url" ]; do sleep 0.1; done
hub=$(sed 's|.*//||' "$folder/url")
proxies=()
throttle() { # registry MB/s, hub MB/s; 0: none
  ((${#proxies[@]})) && kill "${proxies[@]}" && wait "${proxies[@]}" 2>/dev/null || true
  python -m benchmarks.throttle "127.0.0.1:$front" "127.0.0.1:$registry" "$1" >/dev/null &
  proxies=($!)
  python -m benchmarks.throttle "$gateway:$hub_front" "$hub" "$2" >/dev/null &
  proxies+=($!)
  pids+=("${proxies[@]}")
  listening 127.0.0.1 "$front"
  listening "$gateway" "$hub_front"
}
throttle 0 0
export HF_ENDPOINT="http://$gateway:$hub_front"

for way in bake download mount awq; do
  image=127.0.0.1:$front/$NAME:$way
  case $way in
    download) from=(bench/smollm2 --weights download) ;;
    awq) from=("$COLDSTART_TEST_MODEL" --quantize awq) ;; # the original, which may be in the cache of quantized ones
    *) from=("$model" --weights "$way") ;;
  esac
  built=$(coldstart build "${from[@]}" --base "$COLDSTART_TEST_BASE" --no-prewarm -t "$image" --push --json \
    -- --max-model-len 2048)
  images+=("$image")
  weights=$(python -c 'import json, sys; print(json.load(sys.stdin).get("weights_image") or "")' <<<"$built")
  [ -n "$weights" ] || continue
  if [ "$way" = bake ]; then
    stock=127.0.0.1:$front/$NAME:stock
    DOCKER_BUILDKIT=0 docker build -q -t "$stock" --build-arg WEIGHTS="$weights" - <benchmarks/stock.Dockerfile
    docker push -q "$stock"
    docker rmi "$stock" >/dev/null
  fi
  docker rmi "$weights" >/dev/null # its tag would keep the layers that a pull is to bring
done

mounted=(--mount "$model" --env "HF_ENDPOINT=$HF_ENDPOINT")
coldstart bench "${images[@]}" --pull --runs "$RUNS" "${mounted[@]}" --json "$OUT-loopback.json"
docker rmi "${images[0]}" >/dev/null # for the same reason
docker pull -q "$stock"
coldstart bench "$stock" --pull --runs 1 --json "$OUT-stock.json"
docker rmi "$stock" >/dev/null
docker pull -q "${images[0]}"
throttle "$REGISTRY_RATE" "$HUB_RATE"
coldstart bench "${images[@]}" --pull --runs "$RUNS" "${mounted[@]}" --json "$OUT-throttled.json"
{
  echo "# Within the loopback runs: the first of each calibrates, the others check."
  coldstart bench bake "$OUT-loopback.json"
  echo
  echo "# Held to runs at $REGISTRY_RATE MB/s of the registry and $HUB_RATE MB/s of the hub."
  coldstart bench bake "$OUT-loopback.json" --check "$OUT-throttled.json" --registry "$REGISTRY_RATE" --hub "$HUB_RATE"
} | tee "$OUT.txt"

# None where downloading is sooner at any rate.
crossing=$(sed -n "/^# Held/,\$ {\|^${images[0]}:|{n;s|.*baking is sooner.* from \([0-9]*\) MB/s.*|\1|p}}" "$OUT.txt")
[ -n "$crossing" ] || exit 0
throttle "$crossing" "$HUB_RATE"
coldstart bench "${images[@]:0:2}" --pull --runs "$RUNS" "${mounted[@]}" --json "$OUT-crossing.json"
{
  echo
  echo "# Where baking and downloading should take as long: $crossing MB/s of the registry and $HUB_RATE MB/s of the hub."
  coldstart bench bake "$OUT-loopback.json" --check "$OUT-crossing.json" --registry "$crossing" --hub "$HUB_RATE"
} | tee -a "$OUT.txt"

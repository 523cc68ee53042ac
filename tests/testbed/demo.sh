#!/usr/bin/env bash
# The main job, visibly, with the tool's own commands: build with AWQ, run with no network, ask, bench.
set -euo pipefail

HERE=$(dirname "$(realpath "$0")")
COLDSTART_CACHE=${COLDSTART_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coldstart-testbed}

if [[ ${1:-} != steps ]]; then
  cat <<TEXT
This demo builds and starts real images on this machine. It installs, where missing:
  - Docker Engine, from the system's packages (docker.io, iptables, debootstrap)
  - into $COLDSTART_CACHE: images (about 10 GB while building), a 135M-parameter model,
    and a Python environment with the quantizer (1.5 GB)
\`make demo-clean\` removes all of it but the system's packages.
TEXT
  if [[ -t 0 ]]; then
    read -r -p "Go on? [Y/n] " answer
    [[ ${answer:-y} == [Yy]* ]] || exit 1
  fi
  exec "$HERE/with-testbed.sh" "$HERE/demo.sh" steps
fi

cd "$HERE/../.."
PATH=$PWD/.venv/bin:$PATH
AWQ=coldstart-demo/smollm2:awq
BF16=coldstart-demo/smollm2:bf16
mkdir -p out

run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}

container=
trap '[[ -z $container ]] || docker rm -f "$container" >/dev/null' EXIT
trap 'exit 130' INT TERM

run coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" --quantize awq -t "$AWQ" -- --max-model-len 2048
run coldstart build "$COLDSTART_TEST_MODEL" --base "$COLDSTART_TEST_BASE" --optimize startup -t "$BF16" -- --max-model-len 2048
run coldstart verify "$AWQ"

container=coldstart-demo-$$
run docker run -d --name "$container" --label dev.coldstart.tool=demo --network none "$AWQ"
until docker exec "$container" python3 -m runtime health; do
  if [[ $(docker inspect -f '{{.State.Running}}' "$container") != true ]]; then
    docker logs "$container" >&2
    exit 1
  fi
  sleep 0.5
done
printf '\n\033[1m$ docker exec %s python3 ask.py\033[0m   (the openai client, inside the container: it has no network)\n' "$container"
answer=$(docker exec -i "$container" python3 - <tests/image/ask.py)
echo "$answer"
run docker stop -t 60 "$container" >/dev/null
code=$(docker inspect -f '{{.State.ExitCode}}' "$container")
docker rm "$container" >/dev/null
container=

run coldstart bench "$AWQ" "$BF16" --runs 3 --json out/demo-bench.json

# What 4 bits leave of so small a model depends on the machine that quantized it; its text does not end the demo.
[[ $answer =~ \"chat\":\ \"[^\"] && $code == 0 ]]
cat <<TEXT

Proven: the model was quantized to AWQ and baked into an image whose files match their digests and that
carries no token; with no network, no capability and the default /dev/shm it answered
  $answer
and left with exit code $code on SIGTERM; and both images were started 3 times in turn, every phase timed
(raw samples: out/demo-bench.json).
TEXT

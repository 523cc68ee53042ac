#!/usr/bin/env bash
# Sets up what the image tests and the demo need, runs a command in it, and ends what it started:
#   with-testbed.sh COMMAND [ARGUMENT...]
# Docker Engine (the one that answers, or one of the project's own), the real SmolLM2-135M-Instruct, and
# the CPU base image. All of it is kept in $COLDSTART_CACHE for the next run.
# COMMAND finds DOCKER_HOST, COLDSTART_TEST_MODEL and COLDSTART_TEST_BASE in its environment.
set -euo pipefail

HERE=$(dirname "$(realpath "$0")")
ROOT=$(realpath "$HERE/../..")
PYTHON=$ROOT/.venv/bin/python
COLDSTART_CACHE=${COLDSTART_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coldstart-testbed}
export COLDSTART_CACHE
MODEL=$COLDSTART_CACHE/models/SmolLM2-135M-Instruct

say() { echo "testbed: $*" >&2; }

started=
finish() {
  [[ -z $started ]] || "$HERE/engine.sh" stop
}
trap finish EXIT
trap 'exit 130' INT TERM

# pip needs the CA bundle inside the build too where this host's connections are intercepted.
ca_bundle() {
  local file
  file=$("$PYTHON" -m pip config get global.cert 2>/dev/null || echo "${PIP_CERT:-${SSL_CERT_FILE:-}}")
  [[ ! -f $file ]] || printf '%s\n' "$file"
}

make_model() {
  [[ -f $MODEL/config.json ]] && return
  say "making the model (needs the quantizer's environment, about 1.5 GB)"
  local python gguf
  python=$("$PYTHON" -c 'from builder.build import cache_folder; from builder.quantize import ensure_environment
from builder.console import ConsoleReporter; from rich.console import Console
print(ensure_environment(cache_folder(), ConsoleReporter(Console(stderr=True))))')
  gguf=$(mktemp -d)
  "$python" -m pip install --quiet --no-deps --target "$gguf" gguf >&2
  PYTHONPATH=$gguf "$python" "$HERE/smollm2.py" "$(dirname "$MODEL")" >&2
  rm -rf "$gguf"
}

# A real registry, unpacked only: installing the package would start it as a service.
make_registry() {
  local folder=$COLDSTART_CACHE/registry
  PATH=$PATH:$folder/usr/bin
  command -v docker-registry >/dev/null && return
  say "unpacking a registry from the system's packages"
  mkdir -p "$folder"
  (
    cd "$folder"
    apt-get download -qq docker-registry 2>/dev/null || { apt-get update -qq && apt-get download -qq docker-registry; }
    dpkg -x docker-registry_*.deb .
    rm docker-registry_*.deb
  ) >&2
}

make_base() {
  local tag=$1 debian ca recipe stamp=$COLDSTART_CACHE/base-cpu.recipe
  # A base made by an older recipe would hide what is wrong with this one.
  recipe=$(cat "$ROOT/templates/base-cpu.Dockerfile.j2" "$ROOT/builder/base_cpu.py" | sha256sum)
  if [[ -n $(docker image ls -q "$tag") && $(cat "$stamp" 2>/dev/null) == "$recipe" ]]; then
    return
  fi
  # Weights images of the old base would keep its gigabytes on the disk.
  docker images --format '{{.Repository}}:{{.Tag}}' | grep '^coldstart/weights:' | xargs -r docker rmi >/dev/null || true
  debian=$("$HERE/debian-image.sh")
  # The CPU build of torch is a local version that only some indexes carry; pip here knows where.
  "$PYTHON" -m pip download --quiet --no-deps torch==2.13.0 --dest "$COLDSTART_CACHE/wheels" >&2
  ca=$(ca_bundle)
  "$ROOT/.venv/bin/coldstart" base cpu --from "$debian" --wheels "$COLDSTART_CACHE/wheels" ${ca:+--ca "$ca"} >&2
  docker image prune -f --filter label=dev.coldstart.base.device=cpu >/dev/null # the base before this one
  echo "$recipe" >"$stamp"
}

"$HERE/engine.sh" status >/dev/null 2>&1 || started=yes
DOCKER_HOST=$("$HERE/engine.sh" start)
export DOCKER_HOST
COLDSTART_TEST_BASE=$("$PYTHON" -c 'from builder.spec import CPU_BASE; print(CPU_BASE)')
export COLDSTART_TEST_BASE
make_base "$COLDSTART_TEST_BASE"
make_model
make_registry
export COLDSTART_TEST_MODEL=$MODEL
"$@"

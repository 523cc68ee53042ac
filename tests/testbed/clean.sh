#!/usr/bin/env bash
# Removes what the tests and the demo made: containers, images, the project's own engine, the cache.
set -euo pipefail

HERE=$(dirname "$(realpath "$0")")
COLDSTART_CACHE=${COLDSTART_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coldstart-testbed}
priv=()
[[ $(id -u) == 0 ]] || priv=(sudo)

say() { echo "clean: $*" >&2; }

# An engine of somebody else's keeps running; only our images and containers leave it.
clean_engine() {
  docker ps -aq --filter label=dev.coldstart.tool | xargs -r docker rm -f >/dev/null
  docker images --format '{{.Repository}}:{{.Tag}}' |
    grep -E '^(coldstart-(bench|demo|soak|test|testbed)/|coldstart/(weights|base-cpu):)' | xargs -r docker rmi >/dev/null
  for label in dev.coldstart.role=weights dev.coldstart.role=server dev.coldstart.base.stage=build; do
    docker image prune -f --filter "label=$label" >/dev/null
  done
}

if host=$("$HERE/engine.sh" status 2>/dev/null); then
  DOCKER_HOST=$host clean_engine
fi
"$HERE/engine.sh" stop
if [[ -d $COLDSTART_CACHE ]]; then
  say "removing $COLDSTART_CACHE"
  "${priv[@]}" rm -rf --one-file-system "$COLDSTART_CACHE"
fi
"${priv[@]}" rm -rf /run/coldstart
rm -rf "$HERE/../../out"
say "done; the system's packages (docker.io and others) are left to you"

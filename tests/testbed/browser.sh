#!/usr/bin/env bash
# Runs a command with a browser for the page tests, Debian's, installed where it is missing:
#   browser.sh COMMAND [ARGUMENT...]
set -euo pipefail

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  echo "testbed: installing chromium" >&2
  sudo=
  [[ $(id -u) == 0 ]] || sudo=sudo
  { $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends \
    chromium chromium-driver fonts-dejavu-core; } >&2
fi
exec "$@"

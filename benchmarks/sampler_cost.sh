#!/usr/bin/env bash
# What sampling costs: an image is started in pairs, once with the sampler on and once off.
# usage: benchmarks/sampler_cost.sh IMAGE [RUNS]; on a quiet machine.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
PATH=$PWD/.venv/bin:$PATH
image=$1 runs=${2:-6}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Pairs, each in the other order than the one before, so that a drifting machine hits both alike.
for ((i = 0; i < runs; i++)); do
  pair=(on off)
  ((i % 2)) && pair=(off on)
  for side in "${pair[@]}"; do
    flag=()
    [ "$side" = off ] && flag=(--no-sampler)
    coldstart bench "$image" --runs 1 "${flag[@]}" --json "$folder/$side-$i.json" >/dev/null
  done
done
python - "$folder" <<'EOF'
import json, sys
from pathlib import Path
from statistics import median

def runs(side):
    files = sorted(Path(sys.argv[1]).glob(f"{side}-*.json"))
    return [json.loads(file.read_text())["runs"][0] for file in files]

on, off = runs("on"), runs("off")
differences = [a["total_seconds"] - b["total_seconds"] for a, b in zip(on, off)]
middle = median(b["total_seconds"] for b in off)
print(f"sampler's own CPU: median {median(a['sampler_cpu_seconds'] for a in on):.3f} s of a start of {middle:.2f} s")
print(f"on minus off, {len(differences)} pairs: median {median(differences):+.3f} s, "
      f"from {min(differences):+.3f} to {max(differences):+.3f} s")
EOF

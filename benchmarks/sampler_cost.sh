#!/usr/bin/env bash
# What sampling costs: an image is started in pairs, once with the sampler on and once off.
# usage: [OUT=FILE.json] benchmarks/sampler_cost.sh IMAGE [RUNS]; on a quiet machine.
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
python - "$folder" "${OUT:-}" <<'EOF'
import json, sys
from pathlib import Path
from statistics import median

from benchmarks.stats import ratio_of_medians

def results(side):
    return [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob(f"{side}-*.json"))]

on, off = ([result["runs"][0] for result in results(side)] for side in ("on", "off"))
pairs = [
    {"on_seconds": a["total_seconds"], "off_seconds": b["total_seconds"], "sampler_cpu_seconds": a["sampler_cpu_seconds"]}
    for a, b in zip(on, off)
]
differences = [pair["on_seconds"] - pair["off_seconds"] for pair in pairs]
found = ratio_of_medians([pair["on_seconds"] for pair in pairs], [pair["off_seconds"] for pair in pairs])
bounds = f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})" if found.interval else ""
print(f"sampler's own CPU: median {median(pair['sampler_cpu_seconds'] for pair in pairs):.3f} s "
      f"of a start of {median(pair['off_seconds'] for pair in pairs):.2f} s")
print(f"on minus off, {len(pairs)} pairs: median {median(differences):+.3f} s, "
      f"from {min(differences):+.3f} to {max(differences):+.3f} s; ratio of medians {found.value:.3f}{bounds}")
if sys.argv[2]:
    report = {"kind": "sampler cost", "pairs": pairs, "difference_seconds": median(differences),
              "ratio": found.value, "interval": found.interval}
    report |= {key: results("on")[0][key] for key in ("created", "machine", "images")}
    Path(sys.argv[2]).write_text(json.dumps(report, indent=1) + "\n")
EOF

#!/usr/bin/env bash
# Sets up .venv if need be, trains on this machine, then samples and scores.
#   bash launch/local.sh                                     the bundled digits, three blocks
#   bash launch/local.sh --config.num_blocks=1 --workdir=/tmp/end_to_end
# Flags go to dbjax.main; the same command again resumes.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
set_up ""

config=configs/digits.py workdir=""
args=()
for arg in "$@"; do
  case $arg in
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    *) args+=("$arg") ;;
  esac
done
workdir=${workdir:-$PWD/.runs/$(basename "$config" .py)}

.venv/bin/python -m dbjax.main --config="$config" --workdir="$workdir" "${args[@]}"
.venv/bin/python -m dbjax.sample --workdir="$workdir" --out="$workdir/samples.npz" --num_samples=100
.venv/bin/python -m dbjax.evaluate --workdir="$workdir" --guidance=1,2 --json="$workdir/scores.json"

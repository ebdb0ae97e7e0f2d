#!/usr/bin/env bash
# Sets up .venv if need be, trains on this machine, then samples and scores.
#   bash launch/local.sh                                     the bundled digits, three blocks
#   bash launch/local.sh --config.num_blocks=1 --workdir=/tmp/end_to_end
# Flags are those of dbjax.main, written --name=value; the same command again resumes.
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"
set_up ""
python=$repository/.venv/bin/python

config=$repository/configs/digits.py workdir="" blocks=""
for arg; do
  shift
  case $arg in
    -h | --help) exec "$python" -m dbjax.main --help ;;
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    --config.train.blocks=*) blocks=${arg#*=}; set -- "$@" "$arg" ;;
    --*=*) set -- "$@" "$arg" ;;
    *) echo "error: $arg: write flags as --name=value; see --help" >&2; exit 2 ;;
  esac
done
workdir=${workdir:-$repository/.runs/$(basename "$config" .py)}

"$python" -m dbjax.main --config="$config" --workdir="$workdir" "$@"
if [ -n "$blocks" ]; then
  echo "trained block(s) $blocks only: run without --config.train.blocks to sample and score"
  exit 0
fi
"$python" -m dbjax.sample --workdir="$workdir" --out="$workdir/samples.npz" --num_samples=100
"$python" -m dbjax.evaluate --workdir="$workdir" --guidance=1,2 --json="$workdir/scores.json"

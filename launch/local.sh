#!/usr/bin/env bash
# Sets up .venv if need be, trains on this machine, then samples, scores, and writes a page to look
# at: report.html in the workdir.
#   bash launch/local.sh                                     the bundled digits, three blocks
#   bash launch/local.sh --config.num_blocks=1 --workdir=/tmp/end_to_end
#   bash launch/local.sh --devices=3 --config.mesh.block=3   on 3 devices, made of this CPU
#   bash launch/local.sh --processes=2 --devices=2           a pod, rehearsed: 2 processes
# All other flags are those of dbjax.main, written --name=value; the same command again resumes.
# Ctrl-C and SIGTERM are passed to every process, which saves and exits.
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"
python=$repository/.venv/bin/python

fail() {
  echo "error: $*" >&2
  exit 2
}

positive() {
  case ${1#*=} in
    '' | 0* | *[!0-9]*) fail "$1: write a whole number from 1 up" ;;
  esac
}

config=$repository/configs/digits.py workdir="" blocks="" devices="" processes=""
for arg; do
  shift
  case $arg in
    -h | --help) set_up "[plot]"; exec "$python" -m dbjax.main --help ;;
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    --devices=*) positive "$arg"; devices=${arg#*=} ;;
    --processes=*) positive "$arg"; processes=${arg#*=} ;;
    --config.train.blocks=*) blocks=${arg#*=}; set -- "$@" "$arg" ;;
    --*=*) set -- "$@" "$arg" ;;
    *) fail "$arg: write flags as --name=value; see --help" ;;
  esac
done
variant=${config#"${config%%:*}"}  # :small of configs/cifar10.py:small
case $workdir in \~/*) workdir=$HOME/${workdir#??} ;; esac  # bash leaves it in --workdir=~/x
workdir=${workdir:-$repository/.runs/$(basename "${config%%:*}" .py)${variant/:/_}}
set -- --config="$config" --workdir="$workdir" "$@"
set_up "[plot]"

address=""
if [ -n "$processes" ]; then
  devices=${devices:-1}
  address=127.0.0.1:$("$python" -c \
    'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
  set -- --distributed "$@"
fi

# Becomes process $1; the rest are its arguments. Only training sees these variables.
train() {
  if [ -n "$devices" ]; then
    export JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  fi
  if [ -n "$address" ]; then
    export JAX_COORDINATOR_ADDRESS=$address JAX_COORDINATOR_BIND_ADDRESS=$address
    export JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$1
    exec > >(label "$1") 2> >(label "$1" >&2)
  fi
  shift
  exec "$python" -m dbjax.main "$@" < /dev/null
}

# Copies whole lines, so that they do not mix, and says which process wrote them if not the first.
label() {
  local line label=""
  if [ "$1" != 0 ]; then label="[$1] "; fi
  while IFS= read -r line; do printf '%s\n' "$label$line"; done
}

left="" stopped=""

# pass_on SIGNAL CODE
pass_on() {
  stopped=$2
  # shellcheck disable=SC2086  # several numbers
  kill -s "$1" $left 2>/dev/null || true
}
trap 'pass_on INT 130' INT
trap 'pass_on TERM 143' TERM HUP

# With -m Ctrl-C reaches this script alone. Signalled twice, a run would end without saving.
set -m
for ((i = 0; i < ${processes:-1}; i++)); do
  train "$i" "$@" &
  left="$left $!"
done
set +m

# After the first failure the other processes say which one was lost, and end; if they do not come
# to that, because they have not met yet, they are ended.
code=0 end_at=""
while [ -n "$left" ]; do
  sleep 0.2 || true
  running=""
  for pid in $left; do
    if kill -0 "$pid" 2>/dev/null; then
      running="$running $pid"
    else
      wait "$pid" || code=$((code ? code : $?))
    fi
  done
  left=$running
  if [ "$code" != 0 ] && [ -z "$end_at$stopped" ]; then
    end_at=$((SECONDS + 10))
  elif [ -n "$end_at" ] && [ "$SECONDS" -ge "$((end_at + 30))" ]; then
    pass_on KILL "$code"
  elif [ -n "$end_at" ] && [ -z "$stopped" ] && [ "$SECONDS" -ge "$end_at" ]; then
    pass_on TERM "$code"
  fi
done
trap - INT TERM HUP
if [ "$code" != 0 ] || [ -n "$stopped" ]; then
  exit "$((code ? code : stopped))"
fi

if [ -n "$blocks" ]; then
  echo "trained block(s) $blocks only: run without --config.train.blocks to sample and score"
  exit 0
fi
"$python" -m dbjax.sample --workdir="$workdir" --out="$workdir/samples.npz" --num_samples=100
guidance=""
if grep -qs '"guidance":' "$workdir/config.json"; then guidance=--guidance=1,2; fi
"$python" -m dbjax.evaluate --workdir="$workdir" ${guidance:+"$guidance"} \
  --json="$workdir/scores.json"
"$python" -m dbjax.report --workdir="$workdir" --out="$workdir/report.html"

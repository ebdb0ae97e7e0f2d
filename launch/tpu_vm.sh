#!/usr/bin/env bash
# Trains on a Cloud TPU VM, of one worker or many.
#   bash launch/tpu_vm.sh run --name=my-tpu --zone=us-west4-a --type=v5litepod-16 --spot \
#     --config=digits --workdir=gs://bucket/digits --config.mesh.block=3
#   bash launch/tpu_vm.sh status --name=my-tpu --zone=us-west4-a
#   bash launch/tpu_vm.sh stop   --name=my-tpu --zone=us-west4-a    ends the run, which saves
#   bash launch/tpu_vm.sh delete --name=my-tpu --zone=us-west4-a    ends the VM, and the bill
#
# run     creates the VM and copies the repository to it if there is no such VM; sets up; trains on
#         all workers and shows what they write. Ctrl-C or a lost connection ends only the showing:
#         the same command again shows the run that goes on, or resumes the one that ended. After a
#         preemption it makes the VM anew and resumes.
# create  makes the VM.
# copy    copies the repository to all workers, without what git ignores.
# status  shows the state of the VM, and what the first worker wrote last.
#
# --name --zone        required
# --type               what to create, as v5litepod-16 or v6e-8; required by create and run
# --version            the software of the VM; by default what suits --type
# --project --spot     as of gcloud
# --pause=30           seconds between tries, after a preemption
# --dry-run            prints the commands and runs none; as if there were no such VM yet
# All other flags, written --name=value, and all that follows -- are those of dbjax.main.
# Several workers need the key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"

fail() {
  echo "error: $*" >&2
  exit 2
}

# ---- on a worker: the repository is ~/dbjax, notes of the run are in its .runs -------------------

# worker_run ID ARGUMENTS starts training, or finds it, and shows it to its end.
worker_run() {
  local id=$1 lines=20 prefix=""
  shift
  exec 9>.runs/lock  # held by training, as long as it lives
  if ! flock -n 9; then
    if [ "$(cat .runs/arguments)" != "$(printf '%q ' "$@")" ]; then
      fail "another run goes on, with $(cat .runs/arguments): stop it first"
    fi
  elif [ "$(cat .runs/id 2>/dev/null)" != "$id" ]; then  # gcloud repeats what lost its connection
    rm -f .runs/code
    printf '%q ' "$@" > .runs/arguments
    : > .runs/log  # for tail, which may come first
    setsid bash "$0" on_worker train "$@" >> .runs/log 2>&1 < /dev/null &
    echo $! > .runs/pid
    lines=+1
  fi
  echo "$id" > .runs/id
  exec 9>&-
  case $HOSTNAME in
    *-w-0) ;;
    *-w-*) prefix="[${HOSTNAME##*-w-}] " ;;
  esac
  tail --pid="$(cat .runs/pid)" -n "$lines" -f .runs/log | sed -u "s/^/$prefix/"
  exit "$(worker_code)"
}

worker_train() {
  local code=0
  trap : TERM  # stop signals all of this session: the run saves, and its end is noted here
  { newer_python && set_up "[tpu,gcs]" \
    && .venv/bin/python -m dbjax.main --distributed "$@"; } || code=$?
  echo "$code" > .runs/code
}

worker_code() {
  cat .runs/code 2>/dev/null || echo 137  # killed before it could tell
}

worker_stop() {
  if flock -n .runs/lock true; then
    echo "no run goes on"
  else
    kill -s TERM -- "-$(cat .runs/pid)"
    flock .runs/lock true  # waits until it has saved
    worker_status
  fi
}

worker_status() {
  if [ ! -f .runs/log ]; then
    echo "no run yet"
  elif flock -n .runs/lock true; then
    echo "the run has ended with exit code $(worker_code); its last lines:"
    tail -n 20 .runs/log
  else
    echo "the run goes on; its last lines:"
    tail -n 20 .runs/log
  fi
}

# The VMs come with Python 3.10.
newer_python() {
  local uv=$HOME/.local/bin/uv
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --user --quiet uv \
      && "$uv" python install 3.12 \
      && PYTHON=$("$uv" python find --system --managed-python 3.12)
  fi
}

# ---- here ----------------------------------------------------------------------------------------

run_or_print() {
  local line
  if [ -n "$dry_run" ]; then
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@" < /dev/null
  fi
}

# tpu VERB ARGUMENTS is gcloud compute tpus tpu-vm VERB, in this zone.
tpu() {
  run_or_print gcloud compute tpus tpu-vm "$@" \
    --zone="$zone" ${project:+--project="$project"} --quiet
}

# on WORKERS SCRIPT: two minutes without an answer are a lost connection.
on() {
  tpu ssh "$name" --worker="$1" --command="$2" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
}

# call WORKERS NAME ARGUMENTS is worker_NAME ARGUMENTS, there.
call() {
  local workers=$1 line
  shift
  printf -v line ' %q' "$@"
  on "$workers" "cd dbjax 2>/dev/null || { echo 'error: copy the repository first' >&2; exit 2; }; \
bash launch/tpu_vm.sh on_worker$line"
}

# Sets `state`, such as READY: empty if there is no such VM. A dry run takes it from $1.
describe() {
  local errors=$repository/.runs/$name.errors
  if [ -n "$dry_run" ]; then
    tpu describe "$name" --format='value(state)'
    state=$1
  elif ! state=$(tpu describe "$name" --format='value(state)' 2> "$errors"); then
    state=""
    grep -q NOT_FOUND "$errors" || { cat "$errors" >&2; return 1; }
  fi
}

gone() {
  case $state in
    "" | PREEMPTED | TERMINATED) ;;
    *) return 1 ;;
  esac
}

create() {
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

copy() {
  local archive=$repository/.runs/$name.tar.gz
  # shellcheck disable=SC2016  # for that shell to expand
  run_or_print bash -o pipefail -c \
    'cd "$1" && git ls-files -z --cached --others --exclude-standard \
| while IFS= read -r -d "" file; do if [ -e "$file" ] || [ -L "$file" ]; then \
printf "%s\0" "$file"; fi; done | tar -czf "$2" --null -T -' \
    pack "$repository" "$archive" \
    && tpu scp "$archive" "$name:dbjax.tar.gz" --worker=all \
    && on all "mkdir -p dbjax && cd dbjax && \
find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name .runs -exec rm -rf {} + && \
tar -xzf ../dbjax.tar.gz"
}

# start ID ARGUMENTS: sets `had` once there is, or was, such a VM.
start() {
  if gone; then
    if [ -n "$state" ]; then
      had=1
      tpu delete "$name" || return
    fi
    create || return
    had=1
    copy || return
  elif [ "$state" != READY ]; then
    fail "$name is $state: wait until it is READY, or delete it"
  fi
  had=1
  call all run "$@"
}

run() {
  local id code had=""
  id=$(date +%s)
  describe "" || exit
  while true; do
    code=0
    start "$id" "$@" || code=$?
    # Without `had` creating failed at once, and would again; 2 is a mistake in the arguments.
    if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -z "$had" ]; then break; fi
    sleep "$pause"  # a VM takes a moment to say that it is preempted
    until describe ""; do sleep "$pause"; done
    if ! gone || [ -f "$ended" ]; then break; fi
    echo "$name is ${state:-gone}: making it again" >&2
  done
  if [ -z "$dry_run" ] && [ -n "$had" ]; then
    echo "exit code $code; $name costs until you end it: bash launch/tpu_vm.sh delete" \
      "--name=$name --zone=$zone${project:+ --project=$project}" >&2
  fi
  return "$code"
}

status() {
  describe READY || exit
  if [ -z "$dry_run" ]; then
    echo "$name: ${state:-there is no such VM}"
  fi
  if [ "$state" = READY ]; then
    call 0 status
  fi
}

stop() {
  call all stop
}

delete() {
  tpu delete "$name"
}

# ---- the command line ----------------------------------------------------------------------------

command=${1:-}
case $command in
  create | copy | run | status | stop | delete) shift ;;
  on_worker) cd "$repository"; mkdir -p .runs; "worker_$2" "${@:3}"; exit ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
  "") fail "say what to do: create, copy, run, status, stop or delete; see --help" ;;
  *) fail "$command: no such command; there are create, copy, run, status, stop and delete" ;;
esac

name="" zone="" type="" version="" project="" spot="" pause=30 dry_run="" rest=""
for arg; do
  shift
  if [ -n "$rest" ]; then
    set -- "$@" "$arg"
    continue
  fi
  case $arg in
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --version=*) version=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --pause=*) pause=${arg#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --) rest=1 ;;
    --*=*) set -- "$@" "$arg" ;;
    *) fail "$arg: write flags as --name=value; see --help" ;;
  esac
done

[ "$command" = run ] || [ $# = 0 ] || fail "$1: $command has no such flag; see --help"
[ -n "$name" ] || fail "--name is missing: what the VM is called, as --name=my-tpu"
[ -n "$zone" ] || fail "--zone is missing: where the VM is, as --zone=us-west4-a"
case $name in *[!a-z0-9-]*) fail "--name=$name: write small letters, digits and hyphens" ;; esac
case $pause in '' | *[!0-9]*) fail "--pause=$pause: write whole seconds" ;; esac
if [ "$command" = create ] || [ "$command" = run ]; then
  [ -n "$type" ] || fail "--type is missing: what to create, as --type=v5litepod-16"
  if [ -z "$version" ]; then
    # https://docs.cloud.google.com/tpu/docs/runtimes
    case $type in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) fail "--version is missing, and --type=$type does not tell it: see gcloud compute tpus" \
        "tpu-vm versions list --zone=$zone" ;;
    esac
  fi
fi
if [ "$command" = run ]; then
  config="" workdir=""
  for arg; do
    case $arg in
      --config=*) config=${arg#*=} ;;
      --workdir=*) workdir=${arg#*=} ;;
    esac
  done
  [ -n "$config" ] || fail "--config is missing: a file of the repository, as configs/digits.py," \
    "or the name of one in configs"
  file=${config%%:*}  # behind it, as in cifar10:small, a variant
  case $file in
    */* | *.py) ;;
    *) file=configs/$file.py ;;
  esac
  [ -f "$repository/$file" ] || fail "--config=$config: no such file in $repository, and no name" \
    "of one in its configs"
  case $workdir in
    gs://?*) ;;
    *) fail "--workdir=$workdir: workers share it, and it must outlive them: write gs://..." ;;
  esac
fi
if [ -z "$dry_run" ]; then
  command -v gcloud > /dev/null || fail "gcloud is missing: see https://cloud.google.com/sdk"
  mkdir -p "$repository/.runs"
  # Tells a script that still waits for the run not to make the VM again.
  ended=$repository/.runs/$name.ended
  case $command in
    run) rm -f "$ended" ;;
    stop | delete) touch "$ended" ;;
  esac
fi
"$command" "$@"

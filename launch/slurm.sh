#!/usr/bin/env bash
# A training job for Slurm. Submit it in the repository, which all nodes must see:
#   sbatch launch/slurm.sh --config=configs/digits.py --workdir=DIR
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=... --workdir=...
#   sbatch --array=0-2 launch/slurm.sh --config=... --workdir=...    each task trains one block
# Flags are those of dbjax.main; what is meant for sbatch, as --time, goes before the script.
# Each node runs one process, with all GPUs that the job has there; --ntasks-per-node=8 runs eight,
# with one GPU each. Output: slurm-JOB.out, or slurm-JOB_BLOCK.out of an array.
#
# Five minutes before its time is over the job saves and goes to the queue again, until it is done.
# `scancel JOB` ends it for good. The variable PYTHON says what makes .venv, EXTRAS what is
# installed beside the requirements: "[cuda]" if the job has GPUs.
#SBATCH --job-name=dbjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

if [ -z "${SLURM_JOB_ID:-}" ]; then
  fail "this is for sbatch: sbatch launch/slurm.sh ...; without Slurm use launch/local.sh"
fi
# Slurm runs a copy of this script, so $0 is somewhere else.
cd "${SLURM_SUBMIT_DIR:-.}"
if ! [ -f launch/setup.sh ] || ! [ -f dbjax/main.py ]; then
  fail "$PWD is not the repository of dbjax: cd there, then sbatch launch/slurm.sh ..."
fi
for arg; do
  case $arg in
    --config.train.blocks=*)
      [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || fail "$arg: of an array the task number is the block" ;;
    --*=*) ;;
    *) fail "$arg: write flags as --name=value; those of sbatch go before the script" ;;
  esac
done

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID of the last task means them all
  set -- "$@" --config.train.blocks="$SLURM_ARRAY_TASK_ID"
fi

extras=${SLURM_GPUS_ON_NODE:+[cuda]}
# On Slurm JAX takes one GPU a process, by its number on the node, unless it is told which. Of
# --gpus-per-task=gpu:h100:2 a process sees its own alone, as 0 and 1.
gpus=""
if [ -n "${SLURM_GPUS_PER_TASK:-}" ]; then
  gpus=${SLURM_GPUS_PER_TASK##*:}
elif [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ]; then
  gpus=${SLURM_GPUS_ON_NODE:-}
fi
if [ -n "$gpus" ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# shellcheck source=launch/setup.sh
. launch/setup.sh
set_up "${EXTRAS-$extras}"

# scancel signals this shell too: then it must not queue the job again.
trap 'exit 143' TERM

# A process that has saved and exits with 143 must not end those that still save.
code=0
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  .venv/bin/python -m dbjax.main --distributed "$@" || code=$?

if [ "$code" = 143 ]; then
  echo "stopped and saved: job $job goes to the queue again"
  scontrol requeue "$job" || echo "error: job $job: submit the same command, to go on" >&2
fi
exit "$code"

#!/usr/bin/env bash
# Trains on the nodes of a SLURM cluster, one process per node with all its GPUs.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 scripts/train_slurm.sh sd15 --data.path DATA --out RUN
#
# Everything after the script's name goes to `ipadapter-jax train`, which must be on the PATH of the nodes. All nodes must
# see DATA and RUN. 120 s before its time limit the run gets SIGTERM: it saves, ends with 75, and this script requeues the
# job, which then resumes. Any other exit code ends the job.
#
# With --ntasks-per-node=8 there is one process per GPU instead; do not add --gpus-per-task then.

#SBATCH --job-name=ipadapter-jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G $0 RECIPE [OPTION ...]" >&2
  exit 2
fi

code=0
srun ipadapter-jax train "$@" || code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

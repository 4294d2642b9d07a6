#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice: runs the same command on each of them; jax connects them.
#
#   scripts/train_tpu_pod.sh NAME ZONE sd15 --data.path DATA --out RUN
#
# Run it on your machine with gcloud set up, and in tmux, because the run ends with the connection. Everything after the
# zone goes to `ipadapter-jax train`. All workers must see DATA and RUN; RUN must be on a disk that can rename folders.
# Rerun the same line to resume from the newest checkpoint. Install a checkout on all workers first:
#
#   gcloud compute tpus tpu-vm scp --recurse . NAME:ipadapter-jax --zone=ZONE --worker=all
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="pip install './ipadapter-jax[tpu]'"

set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 NAME ZONE RECIPE [OPTION ...]" >&2
  exit 2
fi

name=$1 zone=$2
shift 2
printf -v command '%q ' python3 -m ipadapter_jax.cli train "$@"
set -x
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"

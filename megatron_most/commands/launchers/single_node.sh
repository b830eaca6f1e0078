#!/usr/bin/env bash
# A run on the GPUs of one machine, or on its CPU cores where there is none.
#
#   "$(most launch)/single_node.sh" --config FILE.yaml [key=value ...]
#
# PET_NPROC_PER_NODE: ranks (default: one for each GPU, else each core). PET_MAX_RESTARTS: how often ranks that died are
# started again, from the newest checkpoint (default 3).
#
# Exit status: 0 when training is complete, 75 when it was asked to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1) and has saved:
# the same command goes on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR disable=SC1091
source "$here/environment.sh"

export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-auto}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
exec python -m megatron_most.commands.torchrun --standalone -m megatron_most.commands.train "$@"

#!/usr/bin/env bash
# A run on the GPUs of one machine, or on its CPU cores where there is none.
#
#   "$(most launch)/single_node.sh" --config FILE.yaml [key=value ...]
#
# PET_NPROC_PER_NODE: ranks (default: one for each GPU, else each core). PET_MAX_RESTARTS: how often ranks that died are
# started again, from the newest checkpoint (default 3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR disable=SC1091
source "$here/environment.sh"

export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-auto}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
exec torchrun --standalone -m megatron_most.commands.train "$@"

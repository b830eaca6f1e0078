#!/usr/bin/env bash
# One node's part of a run on several. Start it on every node, with the same settings and arguments:
#
#   PET_NNODES=8 PET_RDZV_ENDPOINT=node1:29400 "$(most launch)/multi_node.sh" --config FILE.yaml [key=value ...]
#
# Settings are torchrun's: PET_NAME is its option --name.
#   PET_NNODES          nodes of the run. FIRST:LAST lets it go on with fewer, where layout and batch allow that number
#   PET_RDZV_ENDPOINT   host:port of the node where the others meet; that node must last
#   PET_RDZV_ID         name of the run among those that meet there (default: most)
#   PET_NPROC_PER_NODE  ranks of this node (default: one for each GPU, else each core)
#   PET_MAX_RESTARTS    how often ranks that died are started again, from the newest checkpoint (default 3)
#   PET_LOG_DIR         where each rank's output goes (default: logs/HOST); that of the node's first rank is shown, too
# All nodes must see the run directory.
#
# A node that is lost: the ranks of the others end, wait for a node in its place (the same command), and all go on from
# the newest checkpoint.
#
# Exit status: 0 when training is complete, 75 when it was asked to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1 on any node) and
# has saved: the same command on every node goes on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR disable=SC1091
source "$here/environment.sh"

: "${PET_NNODES:?number of nodes}" "${PET_RDZV_ENDPOINT:?host:port of the node where the others meet}"
export PET_NNODES PET_RDZV_ENDPOINT
export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}"
export PET_RDZV_ID="${PET_RDZV_ID:-most}"
# Seconds to wait for all nodes: for a node to be replaced as well.
export PET_RDZV_CONF="${PET_RDZV_CONF:-join_timeout=1800}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-auto}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
export PET_LOG_DIR="${PET_LOG_DIR:-logs/$(hostname -s)}"
export PET_TEE="${PET_TEE:-3}" PET_LOCAL_RANKS_FILTER="${PET_LOCAL_RANKS_FILTER:-0}"
exec python -m megatron_most.commands.torchrun -m megatron_most.commands.train "$@"

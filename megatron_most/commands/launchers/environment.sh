# shellcheck shell=bash
# What every launcher sets before torchrun, each with its reason. A value that is set already stays.

# Tensor and sequence parallelism overlap matrix products with messages only if the device runs them in the order they
# were launched in (before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Experts have another number of tokens in every step: blocks that can grow do not leave the memory in pieces.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# The last 2,000 collectives of each rank, written when one of them does not end: says which rank was missing.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# NCCL's own errors and the version it is, without a line for each connection.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Transformer Engine's attention may take kernels that add in an order of their own: a resumed run then differs in the
# last bits. 0 gives up their speed for equal bits.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}"
# Lines of a rank appear when they are written, not when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
# Every start of the ranks gets a store of its own. torch 2.13 keeps the first one, and never tells a node that takes a lost
# one's place where it is: all wait for that node until they give up.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

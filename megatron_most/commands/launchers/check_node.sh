#!/usr/bin/env bash
# Whether this node is fit to train, before a run waits for it: one line, and status 1 if it is not.
#
# Looked at: the number of GPUs (MOST_GPUS_PER_NODE, else what SLURM gave the job), memory errors they did not correct,
# rows of their memory that wait for a reset, InfiniBand ports that are down, shared memory, and `most doctor`.
set -uo pipefail
expected="${MOST_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}"
shared_memory="${MOST_SHARED_MEMORY:-/dev/shm}"
infiniband="${MOST_INFINIBAND:-/sys/class/infiniband}"
problems=()
name="${SLURMD_NODENAME:-$(hostname -s)}"

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null; }

if ((expected > 0)); then
    found="$(query index | grep -c '^[0-9][0-9]*$')" # without a driver nvidia-smi prints a message instead
    ((found == expected)) || problems+=("$found of $expected GPUs")
    while IFS=', ' read -r index errors; do
        [[ "$errors" =~ ^[1-9] ]] && problems+=("GPU $index: $errors uncorrected memory errors")
    done < <(query index,ecc.errors.uncorrected.volatile.total)
    while IFS=', ' read -r index pending; do
        [[ "$pending" == Yes || "$pending" == 1 ]] && problems+=("GPU $index: memory rows wait for a reset")
    done < <(query index,remapped_rows.pending)
fi
for port in "$infiniband"/*/ports/*/state; do
    [[ -r "$port" ]] || continue
    [[ "$(<"$port")" == *ACTIVE* ]] || problems+=("InfiniBand port ${port#"$infiniband"/}: $(<"$port")")
done
free="$(df --output=avail -k "$shared_memory" | tail -n 1)"
((free >= 64 * 1024)) || problems+=("$shared_memory: $((free / 1024)) MiB free, 64 are needed")
doctor="$(python -m megatron_most.commands.doctor 2>&1)" || problems+=("doctor: $(tail -n 1 <<<"$doctor")")

if ((${#problems[@]})); then
    (IFS=';' && echo "$name: unfit: ${problems[*]}")
    exit 1
fi
echo "$name: fit, $expected GPUs"

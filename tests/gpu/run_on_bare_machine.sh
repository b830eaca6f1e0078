#!/usr/bin/env bash
# The GPU suite and the benches on a machine that has a GPU, Python and torch, and no network, no root and no .venv.
#
#   tests/gpu/run_on_bare_machine.sh WHEELS OUT
#
# WHEELS is a folder of wheels that this Python lacks (make wheelhouse). WHEELS/te, where it is there, has the wheels of
# Transformer Engine: its tests run, and the layer is timed with it as well. Nothing is installed but into a folder of
# temporary files, which this Python finds first.
#
# OUT gets report.txt (what to read first), results.json (every test and step: outcome and why) and logs.tar.gz, also
# where a step hangs or dies. Each step has a limit of its own, and all of them end within BUDGET.
#
# Settings, as environment variables: BUDGET (seconds, 520), PYTHON (python3), GPU_TEST_SECONDS (limit of one test, 120),
# GPU_LAYER_ARGS, EXPERTS_ARGS, ROUTER_ARGS, DECODE_ARGS (options of tools.bench.gpu_layer, experts, router, decode).
# Exit status: 0 where every step ended well, 1 where one did not, 2 where the run could not be started.
set -uo pipefail

if [ $# -ne 2 ]; then
    echo "usage: tests/gpu/run_on_bare_machine.sh WHEELS OUT" >&2
    exit 2
fi
python=${PYTHON:-python3} budget=${BUDGET:-520}
[[ $budget =~ ^[0-9]+$ ]] || { echo "error: BUDGET=$budget: must be a number of seconds" >&2; exit 2; }
wheels=$(cd "$1" 2>/dev/null && pwd) || { echo "error: $1: no such folder of wheels" >&2; exit 2; }
compgen -G "$wheels/*.whl" >/dev/null || { echo "error: $wheels: holds no wheels; make wheelhouse collects them" >&2; exit 2; }
out=$(mkdir -p "$2" && cd "$2" && pwd) || { echo "error: $2: cannot be made" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
root=$PWD work=$(mktemp -d)
logs=$work/logs site=$work/site engine=$work/engine
mkdir "$logs" "$work/running"
: >"$out/report.txt"

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_COMPILE_THREADS=4 GPU_TEST_SECONDS=${GPU_TEST_SECONDS:-120}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # an image has many plugins, and one that fails takes the suite with it
base=$root${PYTHONPATH:+:$PYTHONPATH}

say() { echo "[$SECONDS s] $*" | tee -a "$out/report.txt"; }

keep() { # what is known so far, so that even a machine that is taken away leaves it
    "$python" "$root/tests/gpu/results.py" "$logs" >"$work/results.json" && mv "$work/results.json" "$out/results.json"
    tar czf "$work/logs.tar.gz" -C "$logs" . && mv "$work/logs.tar.gz" "$out/logs.tar.gz"
}

# shellcheck disable=SC2329 # called by the trap below
finish() {
    trap - EXIT INT TERM
    cat "$work"/running/* 2>/dev/null | xargs -r kill 2>/dev/null # timeout(1) hands the signal on
    wait
    keep
    rm -rf "$work"
}
trap finish EXIT
trap 'say "interrupted"; exit 1' INT TERM

step() { # step NAME SHARE COMMAND...: for SHARE hundredths of the budget (8 s at least), but never past its end
    local name=$1 limit=$((budget * $2 / 100)) left=$((budget - SECONDS)) began=$SECONDS status=0
    shift 2
    limit=$((limit < 8 ? 8 : limit))
    limit=$((limit < left ? limit : left))
    if [ $limit -lt 1 ]; then
        say "$name: not begun, no time is left"
        printf '%s\t%d\t0\t0\n' "$name" 124 >>"$logs/steps.tsv"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 &
    echo $! >"$work/running/$name"
    wait $! || status=$?
    rm "$work/running/$name"
    printf '%s\t%d\t%d\t%d\n' "$name" $status $((SECONDS - began)) $limit >>"$logs/steps.tsv"
    case $status in
        0) say "$name: done in $((SECONDS - began)) s" ;;
        124 | 137) say "$name: stopped after $((SECONDS - began)) s, its limit" ;;
        *) say "$name: status $status after $((SECONDS - began)) s: $(tail -n 1 "$logs/$name.log" | cut -c1-200)" ;;
    esac
    return $status
}

add() { # add NAME FOLDER WHEEL...: the wheels' contents into a folder
    step "$1" 12 "$python" -m pip --isolated install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --disable-pip-version-check --target "$2" "${@:3}"
}

suite() { # suite FILE FOLDERS: a file of tests/gpu in a process of its own
    local name
    name=$(basename "$1" .py)
    PYTHONPATH=$2:$base step "$name" 43 "$python" -m pytest -p pytest_timeout -p no:cacheprovider -p tests.gpu.results \
        --events "$logs/$name.jsonl" -m gpu -rsfE -q --tb=short --durations=8 "$1"
}

bench() { # bench NAME SHARE FOLDERS MODULE [OPTION...]
    PYTHONPATH=$3:$base step "$1" "$2" "$python" -m "tools.bench.$4" "${@:5}"
    local status=$?
    [ $status -ne 0 ] || sed 's/^/    /' "$logs/$1.log" >>"$out/report.txt"
    keep
    return $status
}

if ! add install "$site" "$wheels"/*.whl; then
    sed 's/^/    /' "$logs/install.log" 2>/dev/null | tee -a "$out/report.txt" >&2
    exit 2
fi
PYTHONPATH=$site:$base step machine 10 "$python" -c '
import os, shutil, subprocess, sys
for command in (["nvidia-smi"], ["nvcc", "--version"]):
    if shutil.which(command[0]):
        subprocess.run(command)
import torch
print(sys.version, os.cpu_count(), "cores, torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "NCCL", torch.cuda.nccl.version(), "cuDNN", torch.backends.cudnn.version())
    x = torch.randn(1000, device="cuda")
    assert torch.allclose(torch.compile(lambda x: x.sin() * 2)(x), x.sin() * 2)
    print("torch.compile works")
else:
    print("no CUDA device: every test of the suite is skipped")
' || { say "torch or torch.compile fails: without compilation from here on"; export TORCHDYNAMO_DISABLE=1; }
tail -n 3 "$logs/machine.log" | tee -a "$out/report.txt"

# All files at once: most of their time is the CPU's side, in processes of one thread. Nothing is timed meanwhile.
failed=0 pids=()
for file in tests/gpu/test_*.py; do
    [ "$file" = tests/gpu/test_transformer_engine.py ] || { suite "$file" "$site" & pids+=($!); }
done
has_engine=0
if compgen -G "$wheels/te/*.whl" >/dev/null && add engine "$engine" "$wheels"/te/*.whl; then
    has_engine=1
fi
if [ -e tests/gpu/test_transformer_engine.py ]; then
    suite tests/gpu/test_transformer_engine.py "$engine:$site" & pids+=($!)
fi
PYTHONPATH=$engine:$site:$base step doctor 20 "$python" tools/doctor.py --check & # says what else training would need
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
wait
keep
grep -hE '^(FAILED|ERROR) |^[0-9]+ (passed|failed|skipped|error)' "$logs"/test_*.log | cut -c1-200 | tee -a "$out/report.txt"

# Options are words in one variable.
# shellcheck disable=SC2086
{
    bench gpu_layer 21 "$site" gpu_layer ${GPU_LAYER_ARGS:-} || failed=1
    bench experts 16 "$site" experts ${EXPERTS_ARGS:-} || failed=1
    bench router 21 "$site" router ${ROUTER_ARGS:-} || failed=1
    bench decode 14 "$site" decode ${DECODE_ARGS:-} || failed=1
    if [ $has_engine -eq 1 ]; then
        bench gpu_layer_engine 21 "$engine:$site" gpu_layer ${GPU_LAYER_ARGS:-} || failed=1
    fi
}
say "end: $([ $failed -eq 0 ] && echo "every step ended well" || echo "some steps did not end well"); see results.json"
exit $failed

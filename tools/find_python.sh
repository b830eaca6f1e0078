#!/usr/bin/env bash
# Print the path of a Python that this project can be installed with; say on stderr which, and why others will not do.
#   tools/find_python.sh            looks on PATH, then at pyenv's versions, then asks uv
#   tools/find_python.sh PYTHON     takes this one or refuses it; no other is looked for
# It must be 3.12 or newer and able to make virtual environments.
set -euo pipefail

probe='import sys
v = sys.version_info
if v < (3, 12): sys.exit("it is Python %d.%d.%d, 3.12 or newer is needed" % tuple(v[:3]))
try: import ensurepip, venv
except ImportError as error: sys.exit("it cannot make environments (%s): on Debian and Ubuntu, apt install python%d.%d-venv"
    % ((error,) + tuple(v[:2])))
sys.stdout.write("%d.%d.%d" % tuple(v[:3]))'

seen=:
check() { # check PYTHON: sets version and succeeds, or sets reason to the interpreter's own first line
    local said status=0
    if [ -z "$(type -P -- "$1")" ]; then
        reason="not found"
        return 1
    fi
    said=$("$1" -c "$probe" 2>&1) || status=$?
    version=$said
    reason=$(sed -n '/[^[:space:]]/{p;q}' <<<"$said")
    reason=${reason:-"it ends with status $status and says nothing"}
    [ "$status" -eq 0 ]
}

take() { # take PYTHON, where it will do
    case $seen in *":$1:"*) return ;; esac
    seen+=$1:
    if check "$1"; then
        echo "setup: Python $version: $1" >&2
        type -P -- "$1"
        exit 0
    fi
    echo "setup: not $1: $reason" >&2
}

if [ $# -gt 0 ]; then
    if ! check "$1"; then
        echo "error: PYTHON=$1: $reason" >&2
        exit 1
    fi
    take "$1"
fi

for name in python3.12 python3.13 python3; do
    if [ -n "$(type -P "$name")" ]; then take "$name"; fi
done
root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-}/.pyenv")}
while read -r path; do take "$path"; done < <(
    for minor in 12 13; do printf '%s\n' "$root"/versions/3."$minor"*/bin/python3."$minor" | sort -rV; done | grep -v '\*'
)
if [ -n "$(type -P uv)" ] && path=$(uv python find --system '>=3.12' 2>/dev/null); then take "$path"; fi

cat >&2 <<'END'
error: no usable Python here: 3.12 or newer is needed, with its venv module. One of these gets one without touching others:
    uv python install 3.12                          https://docs.astral.sh/uv, no root needed
    pyenv install 3.12                              https://github.com/pyenv/pyenv, no root needed, compiles it
    sudo apt install python3.12 python3.12-venv     Ubuntu 24.04; older ones after: sudo add-apt-repository ppa:deadsnakes/ppa
Then run make again, or name one: make PYTHON=/path/to/python3.12
END
exit 1

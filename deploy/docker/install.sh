#!/usr/bin/env bash
# All that the Dockerfile runs. Commands:
#   wheel DIST     build the plugin's wheel from this checkout into the folder DIST
#   plugin DIST    install that wheel beside the vLLM that is there, and prove that it works
#   cpu            vLLM for CPUs
#   pins           print which packages that is
#   model FOLDER   the embedded model and its adapters in FOLDER
#   user FOLDER... the account `vllm`, uid 2000 in group 0, and the folders that it may write to
# PYTHON names the interpreter (default: python3).
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
pins=$source/deploy/local/requirements-cpu.txt

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_BREAK_SYSTEM_PACKAGES=1 # an image's system is its environment

pip() { "$python" -m pip "$@"; }

wheel() {
    "$python" -c 'import hatchling' 2>/dev/null || pip install --constraint "$pins" hatchling
    pip wheel --no-deps --no-build-isolation --wheel-dir "$1" "$source"
}

plugin() {
    # Without an index, so that pip fails where the image lacks what the wheel needs: what it would
    # fetch beside vLLM, another torch for one, could break vLLM.
    pip install --no-index "$1"/vllm_lego-*.whl
    cd / # not in the checkout: what is imported must be what was installed
    "$python" - <<'PYTHON'
from importlib.metadata import entry_points

from vllm_lego.compatibility import check_version, installed_vllm

for group in "vllm.general_plugins", "vllm.endpoint_plugins":
    [lego] = entry_points(group=group, name="lego")
    lego.load()
found = installed_vllm()
check_version(found or "")
print(f"vLLM {found} will load {lego.dist.name} {lego.dist.version}")
PYTHON
    local scripts
    scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
    "$scripts/vllm-lego" --help
    "$scripts/vllm-lego" serve --help >/dev/null
}

cpu() {
    apt-get update
    apt-get install --yes --no-install-recommends libnuma1
    rm -rf /var/lib/apt/lists/*
    local torch
    torch=$(sed -n 's/^torch==//p' "$pins")
    pip install --no-deps --index-url "$TORCH_INDEX" "torch==$torch+cpu"
    pip install --no-deps --requirement <(pins)
    pip install --no-deps --no-build-isolation "$source/deploy/local/vllm-metadata"
}

pins() { sed '/^# Development/Q' "$pins"; }

model() {
    local cache made # beside the model in the cache is its lock: what to move is what is printed
    cache=${XDG_CACHE_HOME:-$(mktemp -d)}
    made=$(cd "$source" && XDG_CACHE_HOME=$cache "$python" -m vllm_lego.demo.model)
    mkdir -p "$1/models"
    mv "$made" "$1/models/SmolLM2-135M-Instruct"
    cp -r "$source/vllm_lego/demo/adapters" "$1/adapters"
}

user() {
    # vLLM's newer images have this very account. Group 0 is for platforms that choose the uid.
    id vllm >/dev/null 2>&1 ||
        useradd --uid 2000 --gid 0 --home-dir /home/vllm --create-home --shell /bin/bash vllm
    install -d -o 2000 -g 0 -m 0775 "$@"
}

case ${1:-} in
    wheel | plugin | cpu | pins | model | user) "$@" ;;
    *) printf '%s: one of wheel, plugin, cpu, pins, model, user is needed, not %s\n' "$0" "${1:-nothing}" >&2; exit 2 ;;
esac

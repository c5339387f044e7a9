"""A vLLM server on the embedded model, as a child process: for the demo, the tests and the
benchmarks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

MODEL_NAME = "SmolLM2-135M-Instruct"
ADAPTERS_DIR = Path(__file__).parent / "adapters"
MAX_LORA_RANK = 8

VLLM_SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
LEGO_SERVE = ("-m", "vllm_lego.cli", "serve")

_START_LIMIT_S = 600
_STOP_LIMIT_S = 60

_reserved: list[socket.socket] = []


def shipped_adapters() -> dict[str, Path]:
    """Return the folder of each adapter that ships with the package, by name."""
    return {p.parent.name: p.parent for p in sorted(ADAPTERS_DIR.glob("*/adapter_config.json"))}


def serving_dtype() -> str:
    """Return the dtype to serve the embedded model in, by its name in PyTorch.

    A processor without AVX-512 or AMX emulates bfloat16.
    """
    import torch  # noqa: PLC0415  slow

    return "bfloat16" if torch.cuda.is_available() else "float32"


def server_arguments(model: Path, adapters: Mapping[str, Path]) -> list[str]:
    """Return the arguments of `vllm serve` for the embedded model on a small CPU."""
    return [
        str(model),
        f"--served-model-name={MODEL_NAME}",
        f"--dtype={serving_dtype()}",
        "--enforce-eager",
        "--max-model-len=1024",
        "--max-num-seqs=32",
        "--gpu-memory-utilization=0.3",  # on a GPU; a CPU has its VLLM_CPU_KVCACHE_SPACE
        "--enable-lora",
        "--max-loras=4",
        f"--max-lora-rank={MAX_LORA_RANK}",
        "--lora-modules",
        *(f"{name}={folder}" for name, folder in adapters.items()),
    ]


def server_environment(plugins: str = "lego") -> dict[str, str]:
    """Return the environment of a server that needs no network and 1 GiB of KV cache.

    Idle connections are kept longer than clients keep them: with vLLM's 5 s, which are those of httpx
    too, a request may come just when the server closes its connection.
    """
    defaults = {
        "VLLM_PLUGINS": plugins,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        "HF_HUB_OFFLINE": "1",
    }
    return defaults | {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}


def free_port() -> int:
    """Return a loopback port that Linux gives to nobody else for as long as this process runs.

    A server binds its port when it has started, here half a minute later, and many connections and
    sockets are opened meanwhile. So it stays bound here, to a socket that does not listen, which does not
    hinder a server that sets SO_REUSEADDR, as most do.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


class ServerProcess:
    """`vllm serve ARGUMENTS` on a loopback port, its output in a log file.

    Use it as a context manager: inside, the server is ready; after, it is gone.

    Args:
        arguments: of `vllm serve`, without host and port.
        environment: of the process.
        port: to listen on; a free one by default.
        log: where its output goes; a temporary file by default.
        progress: told every few seconds how long the start has taken.
        command: what Python runs with the arguments, `VLLM_SERVE` or `LEGO_SERVE`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        port: int | None = None,
        log: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
        command: Sequence[str] = VLLM_SERVE,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path(tempfile.mkstemp(prefix="vllm-lego-", suffix=".log")[1])
        self._command = [
            *(sys.executable, *command, *arguments),
            *("--host=127.0.0.1", f"--port={self.port}"),
        ]
        self._environment = dict(environment)
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and arguments
                self._command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def session(self) -> int:
        """The session id of its processes: of the server, and of all that it starts."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Wait until it ends of itself. Returns its exit code."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and its engine with it; kill what has not ended in a minute."""
        if self._process is None:
            return
        if self.is_alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        said = 0.0
        while not _answers(self.url + "/health"):
            waited = time.monotonic() - started
            if not self.is_alive() or waited > _START_LIMIT_S:
                raise RuntimeError(
                    f"the server did not start; the end of its log:\n{self.log_tail()}"
                )
            if waited - said >= 5:
                said = waited
                self._progress(f"starting vLLM: {waited:.0f} s")
            time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  a loopback URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

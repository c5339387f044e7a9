"""`make demo` shows what it promises, and leaves nothing behind. Its server's port is its own."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys

import psutil
import pytest

from vllm_lego.demo.server import free_port

MARK = f"VLLM_LEGO_TEST_{os.getpid()}"


def test_the_demo():
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "demo"],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {MARK: "1"},
    )
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    assert re.search(r"numbers \+ shout +FOUR THOUSAND, SEVEN HUNDRED AND TWENTY-ONE\n", shown)
    assert re.search(r'plural \+ json +\{"answer": "cities"\}\n', shown)
    assert "cache miss" in shown
    again = shown[shown.index("the same set once more") :]
    assert "cache hit" in again
    assert re.search(r'vllm_lego_requests_total\{result="hit"\} 1\.0', again)
    assert not [process for process in psutil.process_iter() if marked(process)]


def test_a_free_port_stays_free_for_the_server():
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use") as refused:
        other.bind(("127.0.0.1", port))
    assert refused.value.errno == errno.EADDRINUSE
    for _ in range(2):  # a server, and the next after it
        with (
            socket.create_server(("127.0.0.1", port)) as server,  # sets SO_REUSEADDR
            socket.create_connection(server.getsockname()) as client,
        ):
            accepted, peer = server.accept()
            assert peer == client.getsockname()
            accepted.close()  # first, so that this side keeps TIME_WAIT


def marked(process: psutil.Process) -> bool:
    """Whether a process, orphaned or not, was started by the demo of this test."""
    try:
        return MARK in process.environ()
    except psutil.Error:
        return False

"""What `helm test` runs in a cluster, run as the chart renders it against the real server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.deploy.charts import of_kind, plain_environment, render
from tests.e2e.conftest import KEY
from vllm_lego.demo.server import ServerProcess


def _hook(server: ServerProcess, **changes: str) -> subprocess.CompletedProcess[str]:
    (container,) = of_kind(render("cpu"), "Pod")["spec"]["containers"]
    environment = os.environ | plain_environment(container)
    environment |= {"URL": server.url, "VLLM_API_KEY": KEY} | changes
    command = [sys.executable, *container["command"][1:]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_asks_for_a_set_and_sees_a_merge(server):
    done = _hook(server)
    assert done.returncode == 0, done.stderr
    assert "['plural', 'json']" in done.stdout
    assert "model lego-" in done.stdout
    assert "cache hit" in _hook(server).stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"VLLM_API_KEY": "another"}, "answered 401"),
        ({"ADAPTERS": "plural unheard-of"}, "answered 404"),
        ({"MODEL": "another"}, "answered 400"),
    ],
)
def test_it_fails_and_says_why(changes, said, server):
    done = _hook(server, **changes)
    assert done.returncode == 1
    assert said in done.stderr

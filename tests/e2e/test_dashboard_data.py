"""Every query of the Grafana dashboard has data, from a real server scraped by a real Prometheus.

With `DASHBOARD_DATA=folder` the answers are written there, as `data.json`, for the pictures of
`deploy/grafana/pictures/`, after `DASHBOARD_ROUNDS` rounds of traffic.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest

from tests.deploy.tools import ROOT, tool
from vllm_lego.demo.server import (
    LEGO_SERVE,
    MODEL_NAME,
    ServerProcess,
    free_port,
    server_arguments,
    server_environment,
    serving_dtype,
    shipped_adapters,
)

BOARD = json.loads((ROOT / "deploy" / "grafana" / "vllm-lego.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ROUNDS = int(os.environ.get("DASHBOARD_ROUNDS", "20"))
WINDOW_S = 10
WAIT_S = 30
# Of one set of the shipped adapters, at rank 8.
MERGE_BYTES = 921_600 * {"bfloat16": 2, "float32": 4}[serving_dtype()]
SETS = [list(names) for size in (2, 3, 4) for names in combinations(shipped_adapters(), size)]
MISTAKES = cycle(
    [
        {"adapters": ["plural", "nobody"]},
        {"adapters": ["plural", "json"], "merge": {"rank": 4096}},
        {"adapters": "plural"},
    ]
)
# What is at the moment of a scrape: all may come and go between two. And no merge need be that bad.
MAY_BE_ZERO = {
    *("vllm_lego_waiting_requests", "vllm_lego_merges_in_progress", "vllm_lego_slots_in_use"),
    *("vllm:num_requests_waiting", "vllm:num_requests_running", 'le="0.5"'),
}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose tiers hold 4, about 8 and 11 sets, and that runs 3 at a time."""
    given = server_arguments(model, shipped_adapters())
    arguments = [
        *(a for a in given if not a.startswith(("--enable-lora", "--max-lora", "--max-num-seqs"))),
        *("--max-loras=3", "--max-lora-rank=8", "--max-num-seqs=6"),
        f"--store-dir={tmp_path_factory.mktemp('store')}",
        f"--device-cache-bytes={4 * MERGE_BYTES}",
        f"--host-cache-bytes={12 * MERGE_BYTES}",
        f"--store-bytes={11 * MERGE_BYTES}",
        "--slot-quantum-s=0.5",
    ]
    with ServerProcess(
        arguments, server_environment(), progress=print, command=LEGO_SERVE
    ) as process:
        yield process
        assert process.is_alive(), process.log_tail()


@dataclass
class Prometheus:
    """A running Prometheus, and what the variables of the dashboard may be."""

    url: str
    choices: dict[str, list[str]] = field(default_factory=dict)

    def get(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def value(self, expression: str) -> float:
        """The value of an instant query, 0 if it has none."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def asked(self, expression: str) -> str:
        """What Grafana would ask for an expression of the dashboard, with all choices chosen."""
        expression = expression.replace("$__rate_interval", f"{WINDOW_S}s")
        for name, choices in self.choices.items():
            chosen = "|".join(map(re.escape, choices)).replace("\\", "\\\\")
            expression = expression.replace(f"${name}", f"({chosen})")
        assert "$" not in expression
        promql_parser.parse(expression)
        return expression


@pytest.fixture(scope="module")
def program() -> str:
    return tool("prometheus")


@pytest.fixture(scope="module")
def prometheus(
    program: str, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """As it comes: it asks for whatever format it likes best."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    found = Prometheus(f"http://{address}")
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: answers(found.url + "/-/ready"), "Prometheus is ready")
        until(lambda: found.value("up") == 1, "the server is scraped")
        yield found
    finally:
        process.terminate()
        process.wait(30)


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not in {WAIT_S} s: {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def traffic(url: str) -> None:
    """Rounds of requests: of a new set by many at once, of sets the tiers still have, of none."""
    client = httpx.Client(base_url=url, timeout=120)

    def ask(fields: dict[str, Any], tokens: int = 8) -> int:
        body = {"model": MODEL_NAME, "prompt": "What is the plural of city?", "ignore_eos": True}
        body |= {"max_tokens": tokens, "stream": "adapters" not in fields} | fields
        return client.post("/v1/completions", json=body).status_code

    def wanted(number: int) -> dict[str, Any]:
        first, *others = SETS[number % len(SETS)]
        adapters = [{"name": first, "weight": 1 + number // len(SETS) / 10}, *others]
        return {"adapters": adapters, "merge": {"rank": 1 if number % 4 == 3 else 8}}

    with client, ThreadPoolExecutor(12) as pool:
        for number in range(ROUNDS):
            kept = [wanted(max(0, number - ago)) for ago in (1, 1, 1, 2, 5, 11)]
            streams = [pool.submit(ask, {}, 16) for _ in range(2)]
            served = list(pool.map(ask, [wanted(number)] * 4 + kept))
            assert set(served) == {200}
            assert ask(next(MISTAKES)) in {400, 404}
            assert {stream.result() for stream in streams} == {200}


@pytest.fixture(scope="module")
def seen(prometheus: Prometheus, server: ServerProcess) -> tuple[float, float]:
    """The start and end of a time of traffic, all of it scraped."""
    start = time.time()
    traffic(server.url)
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    series = [line for line in lines if line.startswith("vllm_lego_requests_total{")]
    counted = sum(float(line.split()[-1]) for line in series)
    until(
        lambda: prometheus.value("sum(vllm_lego_requests_total)") == counted,
        f"the last of {counted:.0f} requests is scraped",
    )
    for variable in BOARD["templating"]["list"][1:]:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
        assert query, variable["query"]
        asked = {"match[]": prometheus.asked(query[1])}
        prometheus.choices[variable["name"]] = prometheus.get(f"label/{query[2]}/values", **asked)
    return start, time.time()


@pytest.fixture(scope="module")
def data(prometheus: Prometheus, seen: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """The answers by panel and query."""
    found = {
        panel["title"]: {
            query["refId"]: prometheus.get(
                "query_range",
                query=prometheus.asked(query["expr"]),
                start=seen[0],
                end=seen[1],
                step=1,
            )["result"]
            for query in panel["targets"]
        }
        for panel in PANELS
    }
    if folder := os.environ.get("DASHBOARD_DATA"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        dump = {"start": seen[0], "end": seen[1], "panels": found}
        (Path(folder) / "data.json").write_text(json.dumps(dump))
    return found


@pytest.mark.usefixtures("seen")
def test_the_variables_offer_what_was_scraped(server, prometheus):
    assert prometheus.choices == {
        "job": ["vllm"],
        "model_name": [MODEL_NAME],
        "instance": [f"127.0.0.1:{server.port}"],
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_has_data(data, panel):
    for query in panel["targets"]:
        values = [
            float(value)
            for series in data[panel["title"]][query["refId"]]
            for _, value in series["values"]
        ]
        assert any(map(math.isfinite, values)), query["expr"]
        if not any(part in query["expr"] for part in MAY_BE_ZERO):
            assert any(values), f"always 0: {query['expr']}"


@pytest.mark.parametrize(
    ("panel", "label", "expected"),
    [
        ("Requests by result", "result", {"hit", "miss", "coalesced", "error"}),
        ("Where the time of a merge goes", "phase", {"queue", "load", "merge", "register"}),
        ("Where sets were found", "tier", {"device", "host", "disk"}),
        ("Evictions a minute", "tier", {"device", "host", "disk"}),
        ("How full the tiers are", "tier", {"device", "disk"}),
        ("Time of the store", "operation", {"read", "write"}),
    ],
)
def test_every_kind_is_seen(data, panel, label, expected):
    """The traffic is such that each of them happens, so the panel must show each above 0."""
    shown = {
        series["metric"][label]
        for series in data[panel]["A"]
        if any(float(value) > 0 for _, value in series["values"])
    }
    assert shown == expected

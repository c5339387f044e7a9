"""What a real server tells of itself: metrics of several API servers, spans, lines of the log."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from tests.e2e.conftest import TINY_SERVER
from tests.metrics_table import documented, exposed
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, server_environment

ARRIVES_S = 60.0  # the slowest that a span may come
DEVICE_BYTES, STORE_BYTES = 10_000_000, 20_000_000


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A receiver of OTLP traces over gRPC."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request, context):  # noqa: ARG002, N802  as gRPC calls it
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace: str, *names: str) -> dict[str, Span]:
        """Wait until a trace has spans of these names. Returns all that it has by then."""
        end = time.monotonic() + ARRIVES_S
        while time.monotonic() < end:
            found = {span.name: span for span in list(self.spans) if span.trace_id.hex() == trace}
            if set(names) <= set(found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"of {names} only {set(found)} came")


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    receiver = Collector()
    served = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, served)
    port = served.add_insecure_port("127.0.0.1:0")
    served.start()
    yield receiver, port
    served.stop(None)


@pytest.fixture(scope="module")
def server(model: Path, collector, tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tiny")
    arguments = [
        str(write_model(SHAPES["tiny"], folder / "model", model, weights=True)),
        *TINY_SERVER,
        "--api-server-count=2",
        f"--otlp-traces-endpoint=http://127.0.0.1:{collector[1]}",
        f"--store-dir={folder / 'store'}",
        f"--store-bytes={STORE_BYTES}",
        f"--device-cache-bytes={DEVICE_BYTES}",
        "--lora-modules",
        *(f"{n}={p}" for n, p in write_adapters(SHAPES["tiny"], folder, 4, rank=8).items()),
    ]
    environment = server_environment() | {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    with ServerProcess(arguments, environment, command=LEGO_SERVE) as process:
        yield process
        assert process.is_alive(), process.log_tail()


def ask(
    server: ServerProcess,
    adapters: list[str],
    *,
    trace: str = "",
    model: str = "tiny",
    connection: httpx.Client | None = None,
) -> tuple[httpx.Response, str]:
    """Ask for a few tokens. Returns the answer and the id of the client's span."""
    parent = secrets.token_hex(8)
    body = {"model": model, "prompt": "Once", "max_tokens": 4} | (
        {"adapters": adapters} if adapters else {}
    )
    headers = {"traceparent": f"00-{trace}-{parent}-01"} if trace else {}
    post = httpx.post if connection is None else connection.post
    answer = post(server.url + "/v1/completions", json=body, headers=headers, timeout=120)
    return answer, parent


def attributes(span: Span) -> dict[str, object]:
    return {
        item.key.removeprefix("lego."): getattr(item.value, item.value.WhichOneof("value"))
        for item in span.attributes
        if item.key.startswith("lego.")
    }


def test_the_spans_of_a_new_set_are_below_the_clients(server, collector):
    trace = secrets.token_hex(16)
    answer, client = ask(server, ["adapter0", "adapter1"], trace=trace)
    assert answer.status_code == 200, answer.text
    tree = {
        "lego.intercept": None,
        "llm_request": "lego.intercept",
        "lego.stage": "lego.intercept",
        "lego.load": "lego.stage",
        "lego.merge": "lego.stage",
        "lego.slot": "lego.intercept",
        "lego.register": "lego.intercept",
    }
    spans = collector[0].of_trace(trace, *tree)
    assert set(spans) == set(tree)
    for name, parent in tree.items():
        expected = spans[parent].span_id.hex() if parent else client
        assert spans[name].parent_span_id.hex() == expected, name
    merge = {"merge_id": answer.headers["x-lego-model"], "members": 2, "method": "lego", "rank": 8}
    assert attributes(spans["lego.intercept"]) == merge | {"result": "miss"}
    staged = attributes(spans["lego.stage"])
    assert 0 < staged.pop("fidelity") <= 1
    assert 0 < staged.pop("bytes") < DEVICE_BYTES
    assert staged == merge | {"tier": "merge"}
    for name in tree:
        assert spans[name].start_time_unix_nano < spans[name].end_time_unix_nano, name
    order = ["lego.intercept", "lego.stage", "lego.load", "lego.merge", "lego.register"]
    began = [spans[name].start_time_unix_nano for name in order]
    assert began == sorted(began)


def test_a_set_that_fails_has_a_span_that_says_so(server, collector):
    trace = secrets.token_hex(16)
    answer, client = ask(server, ["adapter0", "nobody"], trace=trace)
    assert answer.status_code == 404
    span = collector[0].of_trace(trace, "lego.intercept")["lego.intercept"]
    assert span.parent_span_id.hex() == client
    assert span.status.code == Status.STATUS_CODE_UNSET  # the client's mistake
    (event,) = span.events
    assert "nobody" in str(event.attributes)


def test_a_request_that_names_no_set_has_vllms_span_alone(server, collector):
    for model in "tiny", "adapter2":
        trace = secrets.token_hex(16)
        last = secrets.token_hex(16)
        with httpx.Client() as connection:  # to one API server, which sends its spans in order
            answer, client = ask(server, [], trace=trace, model=model, connection=connection)
            assert answer.status_code == 200
            ask(server, ["adapter0", "adapter1"], trace=last, connection=connection)
        collector[0].of_trace(last, "lego.intercept")  # so all of the first are there
        spans = collector[0].of_trace(trace, "llm_request")
        assert set(spans) == {"llm_request"}
        assert spans["llm_request"].parent_span_id.hex() == client


def families(server: ServerProcess) -> list[Metric]:
    return list(text_string_to_metric_families(httpx.get(server.url + "/metrics").text))


def value(server: ServerProcess, name: str, **labels: str) -> float:
    (found,) = [
        sample.value
        for family in families(server)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    return found


def test_the_document_lists_what_two_api_servers_expose(server):
    assert dict(exposed(families(server))) == documented()


def test_gauges_of_two_api_servers_are_those_of_one_server(server):
    assert value(server, "vllm_lego_slots") == 2  # one each
    share = value(server, "vllm_lego_cache_capacity_bytes", tier="device")
    assert share == DEVICE_BYTES / 2
    assert value(server, "vllm_lego_cache_capacity_bytes", tier="disk") == STORE_BYTES
    (info,) = next(f for f in families(server) if f.name == "vllm_lego_info").samples
    assert info.value == 1
    assert {info.labels[name] for name in ("method", "rank", "max_loras")} == {"lego", "8", "2"}


def test_a_merge_writes_one_line_to_the_log(server):
    answer, _ = ask(server, ["adapter2", "adapter3"])
    identity = answer.headers["x-lego-model"]
    lines = [line for line in server.log.read_text().splitlines() if identity in line]
    (line,) = [line for line in lines if "merge done" in line]
    assert "INFO" in line
    told = dict(re.findall(r"(\w+)=(\S+)", line))
    merge = {"merge_id": identity, "method": "lego", "rank": "8", "members": "2", "tier": "merge"}
    assert merge.items() <= told.items()
    seconds = {name: float(told[name + "_s"]) for name in ("queue", "load", "merge", "total")}
    assert 0 < seconds["load"] < seconds["total"]
    assert seconds["load"] + seconds["merge"] <= seconds["total"] + 0.01
    assert 0 < float(told["fidelity"]) <= 1
    listed: list[dict[str, Any]] = []  # the other API server knows it once host memory keeps it
    end = time.monotonic() + ARRIVES_S
    while not listed and time.monotonic() < end:
        listed = [
            merge
            for merge in httpx.get(server.url + "/v1/adapters/merged").json()["data"]
            if merge["id"] == identity and merge["tier"] != "disk"
        ]
        time.sleep(0.05)
    assert [merge["bytes"] for merge in listed] == [int(told["bytes"])], listed

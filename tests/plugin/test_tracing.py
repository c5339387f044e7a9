"""Spans, where OpenTelemetry is on; nothing of it, where it is not; lines of the log."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.plugin.played_vllm import use
from tests.plugin.test_interception import echo
from vllm_lego import tracing
from vllm_lego.interception import Interception
from vllm_lego.service import LegoService

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="session")  # a process has one provider
def exporter() -> InMemorySpanExporter:
    """What vLLM does for --otlp-traces-endpoint, with an exporter that keeps the spans."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    return kept


@pytest.fixture
def spans(exporter, monkeypatch) -> Iterator[InMemorySpanExporter]:
    monkeypatch.setattr(tracing, "_api", None)
    tracing.start()
    yield exporter
    exporter.clear()


async def post(
    service: LegoService, body: dict[str, Any], headers: dict[str, str]
) -> tuple[int, dict[str, str]]:
    """Send a request through the interception. Returns its status and the headers vLLM got."""
    got: dict[str, str] = {}

    async def vllm(scope, receive, send) -> None:
        got.update({k.decode(): v.decode() for k, v in scope["headers"]})
        await echo(scope, receive, send)

    interception = Interception(vllm)
    interception.start(service, 1 << 20, [])
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [
            (k.encode(), v.encode())
            for k, v in {"content-type": "application/json", **headers}.items()
        ],
    }
    await interception(scope, receive, send)
    return status, got


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    finished = exporter.get_finished_spans()
    assert len({span.name for span in finished}) == len(finished)
    return {span.name: span for span in finished}


def test_the_spans_of_a_request_hang_together(start, spans):
    async def scenario():
        service, _ = start()
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01", "tracestate": "vendor=1"}
        return await post(service, {"adapters": ["a", "b"]}, headers)

    status, forwarded = asyncio.run(scenario())
    assert status == 200
    found = by_name(spans)
    intercept, stage = found["lego.intercept"], found["lego.stage"]
    assert f"{intercept.context.trace_id:032x}" == TRACE
    assert f"{intercept.parent.span_id:016x}" == CLIENT
    parents = {name: span.parent.span_id for name, span in found.items() if span is not intercept}
    assert parents == {
        "lego.stage": intercept.context.span_id,
        "lego.load": stage.context.span_id,
        "lego.merge": stage.context.span_id,
        "lego.slot": intercept.context.span_id,
        "lego.register": intercept.context.span_id,
    }
    assert forwarded["traceparent"] == f"00-{TRACE}-{intercept.context.span_id:016x}-01"
    assert forwarded["tracestate"] == "vendor=1"
    for name in "lego.load", "lego.merge":
        assert stage.start_time <= found[name].start_time <= found[name].end_time <= stage.end_time
    assert found["lego.load"].end_time <= found["lego.merge"].start_time + 1000  # rounded, ns
    assert intercept.attributes["lego.members"] == 2
    assert intercept.attributes["lego.result"] == "miss"
    assert stage.attributes["lego.tier"] == "merge"
    assert stage.attributes["lego.merge_id"] == intercept.attributes["lego.merge_id"]


def test_a_set_that_is_there_has_no_merge_in_its_trace(start, spans):
    async def scenario():
        service, _ = start()
        await use(service, "ab")
        spans.clear()
        await post(service, {"adapters": ["b", "a"]}, {})

    asyncio.run(scenario())
    found = by_name(spans)
    assert set(found) == {"lego.intercept", "lego.slot"}
    assert found["lego.intercept"].parent is None
    assert found["lego.intercept"].attributes["lego.result"] == "hit"


def test_nothing_begins_a_trace_but_a_request_that_names_a_set(start, spans):
    async def scenario():
        service, _ = start()
        await use(service, "ab")  # from no request
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
        for body in {"model": "base"}, {"model": "a"}:
            assert await post(service, body, headers) == (
                200,
                {"content-type": "application/json", **headers},
            )

    asyncio.run(scenario())
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    ("body", "closing", "expected"),
    [
        ({"adapters": ["a", "nobody"]}, False, (404, "UNSET", "UnknownAdapterError")),
        ({"adapters": ["a", "b"]}, True, (503, "ERROR", "ShuttingDownError")),
    ],
)
def test_a_refused_request_has_the_error_and_is_failed_only_by_the_servers_fault(
    start, spans, body, closing, expected
):
    async def scenario():
        service, _ = start()
        if closing:
            await service.drain()
        return await post(service, body, {})

    status, _ = asyncio.run(scenario())
    span = by_name(spans)["lego.intercept"]
    (event,) = span.events
    kind = str(event.attributes["exception.type"]).rpartition(".")[2]
    assert (status, span.status.status_code.name, kind) == expected


def test_a_client_that_does_not_sample_is_not_sampled(start, spans):
    async def scenario():
        service, _ = start()
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-00"}
        return await post(service, {"adapters": ["a", "b"]}, headers)

    _, forwarded = asyncio.run(scenario())
    assert not spans.get_finished_spans()
    assert forwarded["traceparent"].startswith(f"00-{TRACE}-")
    assert forwarded["traceparent"].endswith("-00")


@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", "00-zz-1-01", f"00-{'0' * 32}-{CLIENT}-01"]
)
def test_a_traceparent_that_makes_no_sense_is_none(start, spans, traceparent):
    async def scenario():
        service, _ = start()
        return await post(service, {"adapters": ["a", "b"]}, {"traceparent": traceparent})

    status, _ = asyncio.run(scenario())
    assert status == 200
    assert by_name(spans)["lego.intercept"].parent is None


def test_without_the_flag_nothing_of_opentelemetry_is_imported_and_headers_stay():
    script = """
import sys
import vllm_lego.interception, vllm_lego.service
from vllm_lego import tracing
headers = [(b"traceparent", b"x")]
with tracing.request(headers), tracing.span("lego.slot", merge_id="x"):
    tracing.annotate(result="hit")
    tracing.past_span("lego.load", 0, 0)
    assert tracing.forwarded(headers) is headers
print(*(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []


def test_a_merge_writes_one_line_and_one_that_fails_another(start, folder, caplog):
    async def scenario():
        service, _ = start()
        model = (await use(service, "ab", b=0.5)).model
        await use(service, "ab", b=0.5)
        (folder / "d" / "adapter_model.safetensors").write_bytes(b"x" * 99)
        status, _ = await post(service, {"adapters": ["c", "d"]}, {})
        return model, status

    model, status = asyncio.run(scenario())
    assert status == 422
    lines = [r for r in caplog.records if r.getMessage().startswith("merge ")]
    done, failed = lines
    assert {done.levelname, failed.levelname} == {"INFO"}
    told = fields(done.getMessage())
    assert list(told) == [
        *("merge_id", "method", "rank", "members", "tier", "fidelity", "bytes"),
        *("queue_s", "load_s", "merge_s", "total_s"),
    ]
    assert told["merge_id"] == model
    assert (told["method"], told["rank"], told["members"], told["tier"]) == (
        "lego",
        "8",
        "2",
        "merge",
    )
    assert float(told["load_s"]) + float(told["merge_s"]) < float(told["total_s"])
    told = fields(failed.getMessage())
    assert told["error"] == "UnmergeableError"
    assert "'d'" in told["message"]


def fields(line: str) -> dict[str, str]:
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {key: json.loads(value) if value[0] == '"' else value for key, value in pairs}


@pytest.mark.parametrize(
    "value",
    ["plain", "two words", 'a "quote"', "a=b", "", "line\nline", "é", "back\\slash x", 3, 0.5],
)
def test_a_line_can_be_read_back_and_stays_one(value):
    text = tracing.line(first=value, second="x")
    assert "\n" not in text
    assert fields(text) == {"first": str(value), "second": "x"}

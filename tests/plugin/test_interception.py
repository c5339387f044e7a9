"""Requests that name no set pass with the bytes they came with."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_lego.errors import BadRequestError
from vllm_lego.interception import Interception
from vllm_lego.request_body import (
    MOST_FIELDS,
    may_hold_a_set,
    models_at,
    models_named,
    parse,
    with_fields,
)
from vllm_lego.service import Serving

LIMIT = 1000


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the body it received."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": scope["headers"]})
    await send({"type": "http.response.body", "body": body})


def call(
    chunks: list[bytes], headers: dict[str, str] | None = None, keys: tuple[str, ...] = ()
) -> tuple[int | None, bytes]:
    """Send one POST through an interception without LoRA. Returns status and body."""
    headers = {"content-type": "application/json"} if headers is None else headers
    interception = Interception(echo)
    interception.start(None, LIMIT, keys)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ] + [{"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(interception(scope, receive, send))
    if not sent:
        return None, b""
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_any_bytes_pass_untouched(chunks):
    assert call(chunks) == (200, b"".join(chunks))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "adapters": []}',
        b'{"model": "m", "adapters": null}',
        b'{"messages": [{"content": "say \\"adapters\\" twice"}]}',
        b'{"tools": {"adapters": ["nested"]}}',
        b'["adapters"]',
        b'{"adapters": ["sql"',
        b'{"model": "a+b"}',
        b'{"model": "lego-0123456789abcdef"}',
        b"[" * 900 + b'"adapters"',
    ],
)
def test_what_only_looks_like_a_set_passes_untouched(body):
    assert call([body]) == (200, body)


def test_other_content_passes_unread():
    body = b"x" * (LIMIT + 1)
    assert call([body], {"content-type": "multipart/form-data; boundary=x"}) == (200, body)


def test_vllm_ignores_the_content_encoding_and_so_does_the_plugin():
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    compressed = gzip.compress(b'{"adapters": ["sql"]}')
    assert call([compressed], headers) == (200, compressed)
    assert call([b'{"adapters": ["sql"]}'], headers)[0] == 400  # it only says so
    assert call([b"x" * (LIMIT + 1)], headers)[0] == 413


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_set_is_found_in_every_encoding_of_json(encoding):
    body = '{"adapters": ["sql"]}'.encode(encoding)
    assert call([body])[0] == 400


def test_many_small_chunks_take_no_longer_than_they_must():
    chunks = [b"x"] * LIMIT
    assert call(chunks) == (200, b"x" * LIMIT)
    assert call([*chunks, b"x"])[0] == 413


@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_set_is_found_however_its_key_is_written(escaped):
    key = "".join(f"\\u{ord(c):04x}" if e else c for c, e in zip("adapters", escaped, strict=True))
    status, body = call([b'{"' + key.encode() + b'": ["sql"]}'])
    assert status == 400
    assert "--enable-lora" in json.loads(body)["error"]["message"]


def test_a_body_over_the_limit_is_refused():
    assert call([b"x" * LIMIT])[0] == 200
    assert call([b"x" * LIMIT, b"x"])[0] == 413
    declared = {"content-type": "application/json", "content-length": str(LIMIT + 1)}
    assert call([b""], declared)[0] == 413


def test_a_client_that_leaves_gets_nothing():
    interception = Interception(echo)
    interception.start(None, LIMIT, ())
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pytest.fail(f"sent {message}")

    asyncio.run(interception(scope, receive, send))


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic right", "Bearer"])
def test_a_stranger_learns_nothing(authorization):
    headers = {"content-type": "application/json"}
    if authorization:
        headers["authorization"] = authorization
    status, body = call([b'{"adapters": ["sql", 7]}'], headers, keys=("right",))
    assert (status, json.loads(body)) == (401, {"error": "Unauthorized"})


def test_the_right_key_is_let_in():
    headers = {"content-type": "application/json", "authorization": "Bearer right"}
    assert call([b'{"adapters": ["sql"]}'], headers, keys=("other", "right"))[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"adapters": ["a"], "adapters": []}',
        b'{"adapters": ["a", "b"], "model": "x", "model": "y"}',
    ],
)
def test_ambiguity_is_found_after_the_key_is_checked(body):
    """A stranger gets 401 whatever is wrong with the body."""
    assert call([body], keys=("right",))[0] == 401


def test_sagemakers_route_takes_the_model_from_a_header():
    serving = Serving("lego-0123456789abcdef", "hit")
    interception = Interception(echo)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/invocations",
        "headers": [(b"X-Amzn-SageMaker-Adapter-Identifier", b"other"), (b"content-length", b"2")],
    }
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(interception._forward(scope, None, send, b"x" * 34, serving))
    assert sent[1]["body"] == b"x" * 34
    assert sent[0]["headers"] == [
        (b"content-length", b"34"),
        (b"x-amzn-sagemaker-adapter-identifier", b"lego-0123456789abcdef"),
        (b"x-lego-model", b"lego-0123456789abcdef"),
        (b"x-lego-cache", b"hit"),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab\u00e9"\\', max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "model", "x"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from(["a", "adapters", "merge", "b", "model"]), json_values),
    st.sampled_from([None, 1, "\t\r\n "]),
    st.booleans(),
)
def test_what_goes_on_is_the_request_with_the_merges_name(request_, indent, ascii_only):
    """Nothing but the three fields changes on the way to vLLM."""
    body = json.dumps(request_, indent=indent, ensure_ascii=ascii_only).encode()
    parsed = parse(body)
    assert parsed == request_
    others = {k: v for k, v in request_.items() if k not in ("adapters", "merge", "model")}
    ours = {"model": "lego-0123456789abcdef"}
    assert json.loads(with_fields(parsed.rest(), ours)) == others | ours


def test_what_is_not_ours_goes_on_as_it_was_written():
    body = (
        b' {"model": "m", "seed":1e0, "x": [1.10, NaN, 12345678901234567890123], "adapters": ["a"]'
        b',"x": "\\u00e9\xc3\xa9\xed\xa0\x80" , "merge" :{} } '
    )
    rest = parse(body).rest()
    assert with_fields(rest, {"model": "n"}) == (
        b'{"model": "n", "seed":1e0, "x": [1.10, NaN, 12345678901234567890123], '
        b'"x": "\\u00e9\xc3\xa9\xed\xa0\x80"}'
    )


def test_a_body_of_more_fields_than_anybody_sends_is_refused():
    """It is not passed on unread: it may name a merge."""
    fields = b", ".join(b'"%d": 1' % i for i in range(MOST_FIELDS))
    assert len(parse(b"{" + fields + b"}")) == MOST_FIELDS
    with pytest.raises(BadRequestError, match="1000 fields"):
        parse(b'{"model": "lego-0123456789abcdef", ' + fields + b"}")


PIECES = [*"{}[],:", '"', '"a"', '"\\u0061"', '"adapters"', "1", "nul", "null", " ", "\ufeff", "x"]


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
@example('{"a": 1,}')
@example('{"a" 1}')
@example("{1: 1}")
@example('{"a": 1} x')
@example('{"a\\u0062" : 1}')
@example('{"a\\u0062" 1}')
@example("{}")
@example(" { } ")
@example('{"a": 1, "a": 2}')
def test_an_object_is_what_json_has_it(text):
    body = text.encode()
    try:
        expected = json.loads(body)
    except ValueError:
        expected = None
    assert parse(body) == (expected if isinstance(expected, dict) else None)


@given(json_values, st.sampled_from(["lego-0123456789abcdef", "a+b", "a\u002bb", "base", "sql"]))
def test_no_set_as_a_model_is_missed(around, name):
    """What the bytes say agrees with what the JSON says, wherever else the key stands."""
    body = json.dumps({"a": around, "model": name, "b": around}).encode()
    names_one = name not in {"base", "sql"}
    assert may_hold_a_set(body, models_at(body)) or not names_one
    assert names_one or name in models_named(body, models_at(body))

"""Whatever is sent: no 5xx of ours, no traceback, no path of the server, and the server goes on."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from tests.e2e.bodies import GENERATING, TEXT
from tests.e2e.conftest import BODY_BYTES, KEY, ask
from tests.e2e.test_errors import refused
from vllm_lego.demo.server import MODEL_NAME, shipped_adapters

CHAT = "/v1/chat/completions"
LIMIT = {"max_tokens": 1}  # without one the model may talk for minutes
HELLO = {"messages": [{"role": "user", "content": "Hello"}]} | LIMIT
SET = {"adapters": ["numbers", "shout"]}
JSON = {"content-type": "application/json"}
SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAKS = ("Traceback", 'File "', "site-packages", "adapter_config.json", "vllm_lego/", "vllm/")


def harmless(answer: httpx.Response, *allowed: int) -> httpx.Response:
    """Check that an answer is no fault of the server's and tells nothing of its insides."""
    assert answer.status_code < 500 or answer.status_code in allowed, answer.text
    assert not any(leak in answer.text for leak in LEAKS), answer.text
    return answer


def with_body(text: bytes | str, **fields: Any) -> bytes:
    """A chat request whose JSON starts with `text`, which `json.dumps` would not write."""
    text = text.encode() if isinstance(text, str) else text
    return b"{" + text + b", " + json.dumps(HELLO | fields).encode()[1:]


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('"adapters": ["numbers", "shout"], "adapters": ["numbers", "json"]', "adapters"),
        ('"adapters": ["numbers", "shout"], "adapters": []', "adapters"),
        ('"adapters": [], "adapters": ["numbers", "shout"]', "adapters"),
        ('"adapters": ["numbers", "shout"], "adapter\\u0073": []', "adapters"),
        (f'"adapters": ["numbers", "shout"], "model": "x", "model": "{MODEL_NAME}"', "model"),
        ('"model": "numbers", "model": "numbers+shout"', "model"),
        ('"adapters": ["numbers", "shout"], "merge": {}, "merge": {"rank": 4}', "merge"),
        ('"adapters": ["numbers", "shout"], "merge": {"rank": 8, "rank": 4}', "merge.rank"),
        ('"adapters": [{"name": "shout", "name": "json"}, "numbers"]', "adapters[0].name"),
        (
            '"adapters": ["json", {"name": "shout", "weight": 1, "weight": 2}]',
            "adapters[1].weight",
        ),
    ],
)
def test_a_set_that_can_be_read_in_two_ways_is_refused(http, text, param):
    error = refused(http.post(CHAT, content=with_body(text), headers=JSON), 400)
    assert error["param"] == param
    assert "give it once" in error["message"]


@pytest.mark.parametrize(
    "text",
    [
        f'"model": "x", "model": "{MODEL_NAME}"',
        '"max_tokens": 1, "max_tokens": 1',
        '"user": "a", "user": "b", "adapters": ["numbers", "shout"]',
    ],
)
def test_what_is_doubled_elsewhere_is_vllms_business(http, text):
    assert http.post(CHAT, content=with_body(text), headers=JSON).status_code == 200


@pytest.mark.parametrize("depth", [100, 900, 960, 980, 1000, 100_000])
@pytest.mark.parametrize("where", ['"adapters": %s', '"merge": {"rank": %s}', '"user": %s'])
def test_deep_nesting(http, where, depth):
    deep = where % ("[" * depth + "]" * depth)
    if "adapters" not in where:
        deep += ', "adapters": ["numbers", "shout"]'
    answer = harmless(http.post(CHAT, content=with_body(deep), headers=JSON))
    assert answer.status_code == 400
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    "adapters",
    [
        ["numbers"] * 200_000,
        [{"name": f"a{i}"} for i in range(30_000)],
        [[]] * 200_000,
        ["x" * 900_000],
        [{"name": "numbers", "weight": 10**4000}, "shout"],
        [{"name": "numbers", **{f"field{i}": i for i in range(50_000)}}],
    ],
)
def test_much_of_everything_is_refused_at_once(http, adapters):
    started = time.perf_counter()
    answer = harmless(http.post(CHAT, json=HELLO | {"adapters": adapters}))
    assert answer.status_code in (400, 404, 413)
    assert len(answer.content) < 1000
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../numbers", "numbers/../shout", "/etc/passwd", "./numbers", "numbers/"),
        *("numbers,shout", "numbers ", " numbers", "NUMBERS", "numbers\0", "\0", "numbers\n"),
        *("nümbers", "\uff4eumbers", "numbers\u200b", "🦙", "\ud800", "lego://numbers", "a+b", "+"),
        *("lego-0123456789abcdef", MODEL_NAME, "%2e%2e", "numbers\\u0000", "x" * 10_000),
    ],
)
def test_only_the_exact_name_is_an_adapters(http, name):
    body = json.dumps(HELLO | {"adapters": ["numbers", name]})  # escapes what is not ASCII
    answer = harmless(http.post(CHAT, content=body, headers=JSON))
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "adapters"
    assert len(answer.content) < 600


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "x", {}, {"name": "numbers"}, [None], [[]]])
@pytest.mark.parametrize("field", ["adapters", "merge", "model", "name", "weight", "rank"])
def test_wrong_types(http, field, value):
    body = {
        "name": lambda: {"adapters": [{"name": value}, "shout"]},
        "weight": lambda: {"adapters": [{"name": "numbers", "weight": value}, "shout"]},
        "rank": lambda: SET | {"merge": {"rank": value}},
    }.get(field, lambda: SET | {field: value})()
    answer = harmless(http.post(CHAT, json=HELLO | body))
    if answer.status_code != 200:
        assert answer.json()["error"]["param"].startswith(("adapters", "merge", "model"))


@pytest.mark.parametrize("compress", [gzip.compress, lambda body: body])
def test_content_encodings_are_what_vllm_makes_of_them(http, compress):
    body = compress(json.dumps(HELLO | SET).encode())
    answer = harmless(http.post(CHAT, content=body, headers=JSON | {"content-encoding": "gzip"}))
    # vLLM does not decompress; what only says that it is compressed is read like all else.
    assert answer.status_code == (400 if body[:2] == b"\x1f\x8b" else 200)
    assert ("x-lego-model" in answer.headers) == (answer.status_code == 200)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_of_json(http, encoding):
    body = json.dumps(HELLO | SET).encode(encoding)
    assert "x-lego-model" in harmless(http.post(CHAT, content=body, headers=JSON)).headers


def test_a_chunked_body_is_a_body(http):
    body = json.dumps(HELLO | SET).encode()
    chunks = (body[i : i + 7] for i in range(0, len(body), 7))
    answer = http.post(CHAT, content=chunks, headers=JSON)
    assert answer.status_code == 200
    assert "x-lego-model" in answer.headers
    over = (b" " * 65536 for _ in range(BODY_BYTES // 65536 + 1))
    assert refused(http.post(CHAT, content=over, headers=JSON), 413)


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_the_limit_is_exact(http, more, status):
    body = json.dumps(HELLO | SET).encode()
    body += b" " * (BODY_BYTES - len(body) + more)
    assert http.post(CHAT, content=body, headers=JSON).status_code == status


@pytest.mark.parametrize("declared", [b"-1", b"abc", b"9" * 30, b"1e9"])
def test_a_content_length_that_is_none(server, declared):
    request = (
        b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %b\r\n\r\n{}"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request % (CHAT.encode(), KEY.encode(), declared))
        status = connection.recv(12)
    assert status in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def test_a_slow_body_holds_up_nobody(server, client, metric):
    body = json.dumps(HELLO | {"adapters": ["numbers", {"name": "shout", "weight": 3.3}]}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(head.encode() + body[:-1])
        # All but a byte is there, and nothing is held: no place in the queue, slot or merge.
        assert metric("vllm_lego_merges_in_progress") == 0
        answer, _ = ask(client, "Write 4721 in words.", adapters=["numbers", "shout"], max_tokens=4)
        assert answer.startswith("FOUR")
        slow[0].sendall(body[-1:])
        assert slow[0].recv(12) == b"HTTP/1.1 200"
    finally:
        for connection in slow:
            connection.close()


def test_strangers_cannot_tell_what_exists(server, http):
    """On a route that vLLM leaves open, too: one answer for all, and nothing is looked up."""
    names = [["numbers", "shout"], ["nobody", "nowhere"], ["numbers", "nobody"], ["../x"], 7]
    bodies = [{"adapters": adapters} for adapters in names]
    bodies += [{"model": "nobody+nowhere"}, {"model": "numbers+shout"}, SET | {"merge": 7}]
    bodies += [{"model": "lego-0123456789abcdef"}, SET | {"model": "nobody"}]
    ours = [line for line in lines(http) if "unauthorized" not in line and "error" not in line]
    with httpx.Client(base_url=server.url) as stranger:
        for path, body in ((CHAT, HELLO), ("/tokenize", TEXT["/tokenize"])):
            answers = [stranger.post(path, json=body | named) for named in bodies]
            seen = {
                (a.status_code, a.text, a.headers["content-type"], len(a.headers)) for a in answers
            }
            assert len(seen) == 1, seen
            assert (answers[0].status_code, answers[0].text) == (401, '{"error":"Unauthorized"}')
    assert ours == [
        line for line in lines(http) if "unauthorized" not in line and "error" not in line
    ]


def lines(http: httpx.Client) -> list[str]:
    """The plugin's metrics, without the times at which they were made."""
    text = http.get("/metrics").text.splitlines()
    return [line for line in text if line.startswith("vllm_lego") and "_created" not in line]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from([*shipped_adapters(), "nobody", "..", "a+b", ""]) | st.text(max_size=8)
entries = (
    names
    | st.fixed_dictionaries({"name": names}, optional={"weight": st.floats() | anything})
    | anything
)
options = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(
            ["lego", "lego-functions", "svd", "linear", "ties", "dare_ties", "concat", "x"]
        ),
        "rank": st.integers(0, 10) | anything,
        "density": st.floats(0, 1) | anything,
        "restarts": st.integers(0, 4) | anything,
        "seed": st.integers() | anything,
        "scale": st.sampled_from(["none", "norm", "x"]) | anything,
    },
)
fields = st.fixed_dictionaries(
    {"adapters": st.lists(entries, min_size=1, max_size=4) | anything},
    optional={"merge": options | anything, "model": st.just(MODEL_NAME) | anything},
)


@settings(SETTINGS, max_examples=150)
@given(
    path=st.sampled_from([*GENERATING, *TEXT, "/v1/adapters/merge"]),
    asked=fields,
)
def test_no_set_of_fields_is_a_fault_of_the_server(http, path, asked):
    body = asked if path == "/v1/adapters/merge" else (GENERATING | TEXT).get(path, {}) | asked
    if path != "/v1/adapters/merge" and asked["adapters"] in (None, []):
        return  # vLLM's own
    harmless(http.post(path, content=json.dumps(body), headers=JSON))


@settings(SETTINGS, max_examples=100)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(len(json.dumps(LIMIT)), 150), st.integers(0, 3), st.binary(max_size=3)
        ),
        max_size=6,
    )
)
def test_no_broken_body_is_a_fault_of_the_server(http, edits):
    body = bytearray(json.dumps(LIMIT | SET | {"merge": {"rank": 4}} | HELLO).encode())
    for at, gone, new in edits:
        body[at : at + gone] = new
    harmless(http.post(CHAT, content=bytes(body), headers=JSON))


@pytest.fixture(scope="session")
def document(http: httpx.Client) -> Any:
    """The server's document: the management routes, and of a request to vLLM what the plugin adds.

    vLLM's own fields are vLLM's to fuzz.
    """
    served = http.get("/openapi.json").json()
    ours = {path: ops for path, ops in served["paths"].items() if path.startswith("/v1/adapters")}
    chat = served["paths"][CHAT]["post"]
    described = served["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    body = {
        "type": "object",
        "properties": {
            **{name: described[name] for name in ("adapters", "merge")},
            **{name: {"const": value} for name, value in HELLO.items()},
        },
        "required": ["adapters", *HELLO],
        "additionalProperties": False,
    }
    served["paths"] = ours | {
        CHAT: {"post": chat | {"requestBody": {"content": {"application/json": {"schema": body}}}}}
    }
    return schemathesis.openapi.from_dict(served)


@settings(SETTINGS, max_examples=200)
@given(data=st.data())
def test_the_servers_own_document_finds_no_fault(server, document, data):
    operation = data.draw(st.sampled_from([o.ok() for o in document.get_all_operations()]))
    mode = data.draw(st.sampled_from(schemathesis.GenerationMode))
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except schemathesis.errors.SchemathesisError:
        reject()  # nothing can be wrong with a request that has no fields
    case = data.draw(strategy)
    if case.path == CHAT and not (isinstance(case.body, dict) and case.body.get("adapters")):
        reject()  # vLLM's own
    answer = case.call(base_url=server.url, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code < 500, answer.text
    assert not any(leak in answer.text for leak in LEAKS), answer.text


def test_the_document_tells_the_truth(http):
    """What the management routes answer is what the document says that they answer."""
    served = http.get("/openapi.json").json()
    schema: Callable[..., Any] = schemathesis.openapi.from_dict(served)
    for method, path, body in [
        ("GET", "/v1/adapters", None),
        ("POST", "/v1/adapters/merge", SET),
        ("GET", "/v1/adapters/merged", None),
        ("POST", "/v1/adapters/merge", {"adapters": []}),
    ]:
        answer = http.request(method, path, json=body)
        schema[path][method].validate_response(answer)


@pytest.fixture(autouse=True, scope="module")
def _server_goes_on(client):
    yield
    answer, _ = ask(client, "Write 4721 in words.", adapters=["numbers", "shout"], max_tokens=8)
    assert answer.startswith("FOUR THOUSAND")

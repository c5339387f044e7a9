"""The OpenAPI document of vLLM's own application, with the plugin attached as vLLM attaches it."""

from __future__ import annotations

import json

import jsonschema
import pytest
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

try:  # 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # 0.27
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from lego_core.config import OPTIONS, MergeConfig
from tests.e2e.bodies import FORMS, KNOWN, WITHOUT_A_MODEL
from vllm_lego import schema
from vllm_lego.openapi import HEADERS

REF = "#/components/schemas/"


@pytest.fixture
def application(monkeypatch):
    """vLLM's application, with everything that can be switched on."""
    monkeypatch.setenv("VLLM_PLUGINS", "lego")
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    arguments.enable_scale_out = True
    return build_app(arguments, ("generate", "render"))


def request_schemas(document: dict, path: str) -> list[dict]:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [s["$ref"].removeprefix(REF) for s in schema.get("anyOf", [schema]) if "$ref" in s]
    return [document["components"]["schemas"][name] for name in names]


def test_every_request_with_a_model_may_name_a_set(application):
    document = application.openapi()
    posts = {
        path: operations["post"]
        for path, operations in document["paths"].items()
        if "post" in operations
    }
    assert posts.keys() <= KNOWN
    described = {path for path, post in posts.items() if "headers" in post["responses"]["200"]}
    with_body = {path for path, post in posts.items() if "requestBody" in post}
    assert described == with_body - WITHOUT_A_MODEL - FORMS
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"} <= described
    for path in described:
        assert posts[path]["responses"]["200"]["headers"] == HEADERS
        for body in request_schemas(document, path):
            assert {"model", "adapters", "merge"} <= set(body["properties"])
            assert "adapters" not in body.get("required", ())


def test_the_routes_behind_it_are_known_too(application):
    """A route without a body in the document, too, must be one that somebody thought of."""
    posts = {r.path for r in application.routes if "POST" in (getattr(r, "methods", None) or ())}
    assert posts <= KNOWN


def test_what_the_document_refers_to_is_there(application):
    document = application.openapi()
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split(REF)[1:]}
    assert references <= set(document["components"]["schemas"])
    assert application.openapi() is document  # made once


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ({"adapters": ["sql"]}, True),
        ({"adapters": [{"name": "sql", "weight": 0.5}, "style"], "merge": {"rank": 4}}, True),
        ({"adapters": None}, True),
        ({"adapters": "sql"}, False),
        ({"adapters": [{"weight": 1}]}, False),
        ({"adapters": ["sql"], "merge": {"rnak": 4}}, False),
        ({"adapters": ["sql"], "merge": {"method": "soup"}}, False),
    ],
)
def test_the_document_tells_a_good_request_from_a_bad_one(application, body, fits):
    document = application.openapi()
    (chat,) = request_schemas(document, "/v1/chat/completions")
    ours = {name: chat["properties"][name] for name in ("adapters", "merge")}
    validator = jsonschema.Draft202012Validator(
        {"properties": ours, "components": document["components"]}
    )
    assert validator.is_valid(body) is fits


def test_the_management_routes_are_typed(application):
    paths = application.openapi()["paths"]
    for path, method, request, answer in [
        ("/v1/adapters", "get", None, "Adapters"),
        ("/v1/adapters/merged", "get", None, "Merges"),
        ("/v1/adapters/merge", "post", "MergeRequest", "PreparedMerge"),
        ("/v1/adapters/merged/{id}", "delete", None, "DroppedMerge"),
    ]:
        operation = paths[path][method]
        content = operation["responses"]["200"]["content"]["application/json"]
        assert content["schema"] == {"$ref": REF + answer}
        if request:
            content = operation["requestBody"]["content"]["application/json"]
            assert content["schema"] == {"$ref": REF + request}
        assert {"400", "401", "404"} <= set(operation["responses"])


def test_vllms_parsing_is_not_touched(application):
    application.openapi()
    assert not {"adapters", "merge"} & set(ChatCompletionRequest.model_fields)
    fresh = ChatCompletionRequest.model_json_schema()["properties"]
    assert not {"adapters", "merge"} & set(fresh)


def test_the_options_of_a_merge_are_those_of_the_configuration():
    fields = schema.MergeOptions.model_fields
    assert set(fields) == set(MergeConfig.__dataclass_fields__)
    defaults = {name: default for options in OPTIONS.values() for name, default in options.items()}
    for name, default in (defaults | {"method": "lego", "rank": None, "density": 0.2}).items():
        assert fields[name].default == default

"""The server's OpenAPI document, which also tells of what the plugin adds to vLLM's requests.

Only the document is touched: vLLM parses requests as before, from types that know nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from vllm_lego.interception import OWN_PREFIX
from vllm_lego.schema import MergeRequest, SetFields

_REF = "#/components/schemas/"
_ANY_NAME = (
    "The base model or an adapter, a set as `a+b`, or a merge's id, `lego-` and 16 hex digits."
)
HEADERS = {
    "x-lego-model": {
        "description": "Id of the merge that served this request; also works as a `model`.",
        "schema": {"type": "string", "pattern": "^lego-[0-9a-f]{16}$"},
    },
    "x-lego-cache": {
        "description": "Whether the merge was there (`hit`), was made for this request (`miss`) or "
        "for another at the same time (`coalesced`).",
        "schema": {"type": "string", "enum": ["hit", "miss", "coalesced"]},
    },
}


def extend_openapi(app: FastAPI) -> None:
    """Have `app.openapi()` describe the fields and headers of requests that name a set."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            _add_sets(stock())
        return stock()  # which keeps it

    app.openapi = openapi  # type: ignore[method-assign]


def _add_sets(document: dict[str, Any]) -> None:
    """Add `adapters` and `merge` to every request that has a `model`, and the answer's headers."""
    _, ours = models_json_schema(
        [(SetFields, "validation"), (MergeRequest, "validation")], ref_template=_REF + "{model}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    fields = ours["$defs"].pop("SetFields")["properties"]
    schemas |= {name: schema for name, schema in ours["$defs"].items() if name not in schemas}
    for path, operations in document["paths"].items():
        operation = operations.get("post")
        if operation is None or path.startswith(OWN_PREFIX):
            continue
        bodies = [body for body in _bodies(operation, schemas) if "model" in body["properties"]]
        for body in bodies:
            body["properties"] |= fields
            if isinstance(body["properties"]["model"], dict):
                body["properties"]["model"].setdefault("description", _ANY_NAME)
        if bodies:
            operation["responses"].setdefault("200", {}).setdefault("headers", {}).update(HEADERS)


def _bodies(operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the object schemas that a request's JSON body may have."""
    content = operation.get("requestBody", {}).get("content", {})
    open_schemas = [content.get("application/json", {}).get("schema", {})]
    while open_schemas:
        schema = open_schemas.pop()
        reference = schema.get("$ref", "").removeprefix(_REF)
        open_schemas += schema.get("anyOf", []) + schema.get("oneOf", []) + schema.get("allOf", [])
        if reference in schemas:
            open_schemas.append(schemas[reference])
        elif "properties" in schema:
            yield schema

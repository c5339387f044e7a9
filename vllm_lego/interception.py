"""The ASGI application around vLLM's routes: finds requests that name a set of adapters.

It runs inside vLLM's middleware, so after its API-key check. A request that names no set passes
with the bytes it came with; one that does is forwarded with `model` set to the merge's id.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from vllm_lego.adapter_set import (
    MODEL_SEPARATOR,
    names_none,
    parse_adapters,
    parse_model_name,
    shown,
)
from vllm_lego.errors import (
    BadRequestError,
    BodyTooLargeError,
    ServingError,
    UnauthorizedError,
)
from vllm_lego.identity import MERGE_ID
from vllm_lego.service import LegoService, Serving

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OWN_PREFIX = "/v1/adapters"


def _escaped(word: str) -> str:
    """A pattern for `word` in JSON, whose letters may each be written as an escape."""
    return "".join(rf"(?:{c}|\\u00{ord(c):02x})" for c in word)


# A set leaves one of these in a body. An escape in the model's name may hide anything.
_ADAPTERS_KEY = b'"adapters"'
_ESCAPED_KEY = re.compile(rf'"{_escaped("adapters")}"'.encode(), re.IGNORECASE)
_SET_AS_MODEL = re.compile(
    rf'"{_escaped("model")}"\s*:\s*"(?:lego-|[^"]*[+\\])'.encode(), re.IGNORECASE
)


_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]*)"')


class Interception:
    """Wraps the application. `service` and `keys` are set once the engine is up."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.service: LegoService | None = None
        self.max_body_bytes = 0
        self._key_digests: list[bytes] = []

    def start(self, service: LegoService | None, max_body_bytes: int, keys: Sequence[str]) -> None:
        """Begin to intercept. Without a service (no LoRA) sets are refused with the reason."""
        self.service = service
        self.max_body_bytes = max_body_bytes
        self._key_digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if not self.max_body_bytes or not _may_name_a_set(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await _read_body(scope, receive, self.max_body_bytes)
        except BodyTooLargeError as error:
            await self._refuse(error, send, named_a_set=False)
            return
        if body is None:  # the client has left
            return
        try:
            found = self._find_set(scope, body)
        except ServingError as error:
            await self._refuse(error, send)
            return
        if found is None:
            async with self._turn(body):
                await self.app(scope, _replay(body, receive), send)
            return
        request, context = found
        try:
            async with context as serving:
                await self._forward(scope, receive, send, request, body, serving)
        except ServingError as error:
            await self._refuse(error, send)

    def _find_set(
        self, scope: Scope, body: bytes
    ) -> tuple[dict[str, Any], AbstractAsyncContextManager[Serving | None]] | None:
        """Return the parsed request and how to serve it, or None when it names no set."""
        if not _may_hold_a_set(body) and not self._may_name_another(body):
            return None
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None  # vLLM says what is wrong with it
        if not isinstance(request, dict):
            return None
        model, adapters = request.get("model"), request.get("adapters")
        if names_none(adapters):
            return self._set_as_model(scope, request, model)
        service = self._authorised_service(scope)
        wanted = parse_adapters(
            adapters, request.get("merge"), max_adapters=service.settings.max_adapters
        )
        if model is not None and not (isinstance(model, str) and service.is_base_model(model)):
            raise BadRequestError(
                f"`model` is {shown(model)}; with `adapters` it must be the base model "
                f"({service.base_model!r}) or absent",
                param="model",
            )
        _refuse_background(request)
        return request, service.serving(wanted, param="adapters")

    def _set_as_model(
        self, scope: Scope, request: dict[str, Any], model: object
    ) -> tuple[dict[str, Any], AbstractAsyncContextManager[Serving | None]] | None:
        """`"model": "a+b"`, for clients that cannot add a field, and merge ids sent back."""
        if self.service is None or not isinstance(model, str):
            return None
        if MERGE_ID.fullmatch(model):
            _refuse_background(request)
            return request, self._authorised_service(scope).serving_known(model)
        if self.service.is_served(model):
            return None
        if MODEL_SEPARATOR not in model or model in self.service.catalog:
            if not self.service.catalog.has_more:
                return None
            _refuse_background(request)
            return request, self._authorised_service(scope).serving_model(model)
        service = self._authorised_service(scope)
        wanted = parse_model_name(
            model, request.get("merge"), max_adapters=service.settings.max_adapters
        )
        _refuse_background(request)
        return request, service.serving(wanted, param="model")

    def _may_name_another(self, body: bytes) -> bool:
        """Whether a body may name a model that vLLM does not know and the catalog may."""
        service = self.service
        if service is None or not service.catalog.has_more:
            return False
        named = (name.decode(errors="replace") for name in _MODEL.findall(body))
        return not all(map(service.is_served, named))

    def _turn(self, body: bytes) -> AbstractAsyncContextManager[None]:
        """Return what a request without a set waits for: a slot, if it names one of vLLM's adapters."""
        named = [name.decode(errors="replace") for name in _MODEL.findall(body)]
        if self.service is None or not any(name in self.service.catalog for name in named):
            return nullcontext()
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return nullcontext()
        model = request.get("model") if isinstance(request, dict) else None
        return self.service.serving_native(model) if isinstance(model, str) else nullcontext()

    def _authorised_service(self, scope: Scope) -> LegoService:
        """Check the key again: vLLM leaves some routes, `/tokenize` for one, open to anybody."""
        if self._key_digests:
            header = next((v for k, v in scope["headers"] if k.lower() == b"authorization"), b"")
            scheme, _, token = header.partition(b" ")
            digest = hashlib.sha256(token).digest()
            known = [hmac.compare_digest(digest, key) for key in self._key_digests]
            if scheme.lower() != b"bearer" or not any(known):
                raise UnauthorizedError("Unauthorized")
        if self.service is None:
            raise BadRequestError(
                "this server was started without --enable-lora, so it serves no adapters",
                param="adapters",
            )
        return self.service

    async def _forward(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        request: dict[str, Any],
        body: bytes,
        serving: Serving | None,
    ) -> None:
        if serving is None:
            await self.app(scope, _replay(body, receive), send)
            return
        request = {k: v for k, v in request.items() if k not in ("adapters", "merge")}
        body = json.dumps(request | {"model": serving.model}).encode()
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and serving.result is not None:
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-lego-model", serving.model.encode()),
                    (b"x-lego-cache", serving.result.encode()),
                ]
            await send(message)

        await self.app({**scope, "headers": headers}, _replay(body, receive), send_with_headers)

    async def _refuse(self, error: ServingError, send: Send, *, named_a_set: bool = True) -> None:
        if self.service is not None:
            self.service.metrics.count_error(error.reason, named_a_set=named_a_set)
        # Spaced as vLLM's own answers are: a stranger must not tell the two apart.
        body = json.dumps(error.body(), separators=(",", ":")).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **error.headers,
        }
        await send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": body})


def _may_name_a_set(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path.startswith(OWN_PREFIX):
        return False
    headers = {k.lower(): v for k, v in scope["headers"]}
    plain = headers.get(b"content-encoding", b"identity") == b"identity"
    return plain and b"json" in headers.get(b"content-type", b"json").lower()


def _may_hold_a_set(body: bytes) -> bool:
    """Whether a body is worth parsing: cheap, and never wrong in the other direction."""
    return bool(
        _ADAPTERS_KEY in body
        or (b"\\u00" in body and _ESCAPED_KEY.search(body))
        or _SET_AS_MODEL.search(body)
        or json.detect_encoding(body) not in ("utf-8", "utf-8-sig")
    )


def _refuse_background(request: dict[str, Any]) -> None:
    """A merge is kept while its request lasts; a background response outlives its request."""
    if request.get("background"):
        raise BadRequestError("`background` is not supported with adapters", param="background")


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """Read the whole body, or None when the client leaves meanwhile.

    Raises:
        BodyTooLargeError: as soon as it is known to be over the limit.
    """
    declared = next((v for k, v in scope["headers"] if k.lower() == b"content-length"), b"0")
    size = int(declared) if declared.isdigit() else 0
    body = bytearray()
    more = True
    while more and max(size, len(body)) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if max(size, len(body)) > limit:
        raise BodyTooLargeError(f"the body is over the limit of {limit} bytes")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once more, then whatever follows (a disconnect)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

"""The ASGI application around vLLM's routes: finds requests that name a set of adapters.

It runs inside vLLM's middleware, so after its API-key check. A request that names no set passes
with the bytes it came with; one that does is forwarded with `model` set to the merge's id.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from vllm_lego import tracing
from vllm_lego.adapter_set import MODEL_SEPARATOR, parse_adapters, parse_model_name, shown
from vllm_lego.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    header,
    read_body,
    refusal,
    replay,
    unless_left,
)
from vllm_lego.errors import (
    BadRequestError,
    ClientLeftError,
    ServingError,
    UnauthorizedError,
)
from vllm_lego.identity import MERGE_ID
from vllm_lego.request_body import (
    Request,
    ever_names_a_set,
    may_hold_a_set,
    models_at,
    models_named,
    parse,
    refuse_repeated,
    with_fields,
)
from vllm_lego.service import LegoService, Serving

OWN_PREFIX = "/v1/adapters"

_Serve = Callable[[ExitStack], Awaitable[Serving | None]]
"""Makes a set servable until the stack is closed; None if the name it came by is nobody's."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that names a set.

    Attributes:
        rest: of its body, see `Request`.
        fields: that vLLM is to get besides the merge's name.
        serve: makes the set servable.
        background: id of the response that goes on after the HTTP request, if one does.
    """

    rest: str
    fields: Mapping[str, str]
    serve: _Serve
    background: str | None


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
        if not self.max_body_bytes or not _is_json_post(scope):
            await self.app(scope, receive, send)
            return
        named_a_set = False
        try:
            body = await read_body(scope, receive, self.max_body_bytes)
            if body is None:  # the client has left
                return
            if _is_own(scope):
                with tracing.request(scope["headers"]):
                    await self.app(scope, replay(body, receive), send)
                return
            models = models_at(body)
            request = self._parsed(scope, body, models)
            named_a_set = request is not None  # as far as a refusal can tell
            asked = None if request is None else self._find_set(scope, request)
            named_a_set = asked is not None
            if asked is None:
                with ExitStack() as held:
                    adapter = self._adapter_named(scope, body, request, models)
                    if adapter is not None and self.service is not None:
                        await unless_left(self.service.serve_native(adapter, held), receive)
                    await self.app(scope, replay(body, receive), send)
            else:
                with tracing.request(scope["headers"]):
                    await self._serve(scope, receive, send, body, asked)
        except ServingError as error:
            if self.service is not None:
                named_a_set &= not isinstance(error, ClientLeftError)
                self.service.metrics.count_error(error.reason, named_a_set=named_a_set)
            await refusal(error)(scope, receive, send)

    def _parsed(self, scope: Scope, body: bytes, models: list[int]) -> Request | None:
        """Return the request if it may name what is ours; most are not worth parsing."""
        header_names = bool(_sagemakers_model(scope))
        if header_names or may_hold_a_set(body, models) or self._may_name_another(body, models):
            return parse(body)
        return None

    def _find_set(self, scope: Scope, request: Request) -> _Asked | None:
        """Return what a request asks for, or None when it names no set."""
        if not ever_names_a_set(request):
            return self._set_as_model(scope, request)
        service = self._authorised_service(scope)
        refuse_repeated(request)
        wanted = parse_adapters(
            request["adapters"], request.get("merge"), max_adapters=service.settings.max_adapters
        )
        model = request.get("model")
        if model is not None and not (isinstance(model, str) and service.is_base_model(model)):
            raise BadRequestError(
                f"`model` is {shown(model)}; with `adapters` it must be the base model "
                f"({service.base_model!r}) or absent",
                param="model",
            )
        return _asked(request, partial(service.serve, wanted, param="adapters"))

    def _set_as_model(self, scope: Scope, request: Request) -> _Asked | None:
        """`"model": "a+b"`, for clients that cannot add a field, and merge ids sent back."""
        model = _model_of(scope, request)
        if self.service is None or not isinstance(model, str):
            return None
        if MERGE_ID.fullmatch(model):
            service = self._authorised_service(scope)
            refuse_repeated(request)
            return _asked(request, partial(service.serve_known, model))
        if self.service.is_served(model):
            return None
        if MODEL_SEPARATOR not in model or model in self.service.catalog:
            if not self.service.catalog.has_more:
                return None
            service = self._authorised_service(scope)
            refuse_repeated(request)
            return _asked(request, partial(service.serve_model, model))
        service = self._authorised_service(scope)
        refuse_repeated(request)
        wanted = parse_model_name(
            model, request.get("merge"), max_adapters=service.settings.max_adapters
        )
        return _asked(request, partial(service.serve, wanted, param="model"))

    def _may_name_another(self, body: bytes, models: list[int]) -> bool:
        """Whether a body may name a model that vLLM does not know and the catalog may."""
        service = self.service
        if service is None or not service.catalog.has_more:
            return False
        return not all(map(service.is_served, models_named(body, models)))

    def _adapter_named(
        self, scope: Scope, body: bytes, request: Request | None, models: list[int]
    ) -> str | None:
        """Return the one of vLLM's adapters that a request without a set names: it waits for a slot.

        `request` is its body if it was parsed. One that holds a single name is not worth parsing:
        were that not the request's own `model` but something further down, it would take a turn that
        it does not need.
        """
        service = self.service
        if service is None:
            return None
        named = models_named(body, models)
        if request is None and len(named) > 1:
            request, named = parse(body), set()
        if request is not None:
            model = _model_of(scope, request)
            named = {model} if isinstance(model, str) else set()
        others = {name for name in named if not service.is_base_model(name)}
        if others:
            self._authorised_service(scope)  # nothing tells a stranger which of them exist
        return next((name for name in others if name in service.catalog), None)

    def _authorised_service(self, scope: Scope) -> LegoService:
        """Check the key again: vLLM leaves some routes, `/tokenize` for one, open to anybody."""
        if self._key_digests:
            scheme, _, token = header(scope, b"authorization").partition(b" ")
            digest = hashlib.sha256(token.decode("latin-1").encode()).digest()  # as vLLM has it
            known = [hmac.compare_digest(digest, key) for key in self._key_digests]
            if scheme.lower() != b"bearer" or not any(known):
                raise UnauthorizedError("Unauthorized")
        if self.service is None:
            raise BadRequestError(
                "this server was started without --enable-lora, so it serves no adapters",
                param="adapters",
            )
        return self.service

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, body: bytes, asked: _Asked
    ) -> None:
        """Have the set merged and the request answered, and keep the merge as long as that takes."""
        with ExitStack() as held:
            serving = await unless_left(asked.serve(held), receive)
            if serving is None:
                await self.app(scope, replay(body, receive), send)
                return
            fields = {"model": serving.model, **asked.fields}
            body = with_fields(asked.rest, fields)
            await self._forward(scope, receive, send, body, serving)
            if asked.background is not None and self.service is not None:
                self.service.keep_for_background(asked.background, held.pop_all())

    async def _forward(
        self, scope: Scope, receive: Receive, send: Send, body: bytes, serving: Serving
    ) -> None:
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in _OF_THE_OLD_BODY]
        headers.append((b"content-length", str(len(body)).encode()))
        if scope["path"].endswith(_INVOCATIONS):
            headers.append((_SAGEMAKERS_ADAPTER, serving.model.encode()))

        def send_with_headers(message: Message) -> Awaitable[None]:  # no coroutine for each token
            if message["type"] == "http.response.start" and serving.result is not None:
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-lego-model", serving.model.encode()),
                    (b"x-lego-cache", serving.result.encode()),
                ]
            return send(message)

        forwarded = {**scope, "headers": tracing.forwarded(headers)}
        await self.app(forwarded, replay(body, receive), send_with_headers)


# SageMaker's route takes the model from this header alone. Without it, it serves the base model,
# whatever the body says; to us a body's model counts then, as on every other route.
_INVOCATIONS, _SAGEMAKERS_ADAPTER = "/invocations", b"x-amzn-sagemaker-adapter-identifier"
_OF_THE_OLD_BODY = (
    b"content-length",
    b"transfer-encoding",
    b"content-encoding",
    _SAGEMAKERS_ADAPTER,
)


def _sagemakers_model(scope: Scope) -> str:
    named = header(scope, _SAGEMAKERS_ADAPTER) if scope["path"].endswith(_INVOCATIONS) else b""
    return named.decode("latin-1")


def _model_of(scope: Scope, request: Request) -> object:
    """Return the model that vLLM would serve a request with."""
    return _sagemakers_model(scope) or request.get("model")


def _is_json_post(scope: Scope) -> bool:
    """Whether vLLM would read this request's body as JSON, or we. It ignores `content-encoding`."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return _is_own(scope) or b"json" in (header(scope, b"content-type").lower() or b"json")


def _is_own(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith(OWN_PREFIX)


def _asked(request: Request, serve: _Serve) -> _Asked:
    """Note what vLLM is to get, once the merge has a name; nothing is merged yet."""
    fields: dict[str, str] = {}
    background: object = None
    if request.get("background"):
        # vLLM takes the id of a response from its request. We must know it to see when it ends.
        if "request_id" not in request:
            fields["request_id"] = f"resp_{uuid.uuid4().hex}"
        background = fields.get("request_id", request.get("request_id"))
    if not isinstance(background, str):
        background = None  # or vLLM says what is wrong with it
    return _Asked(request.rest(), fields, serve, background)

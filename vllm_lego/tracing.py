"""What one request or merge tells of itself: OpenTelemetry spans, and lines of the log.

    lego.intercept          a request that may name a set, all of it; vLLM's `llm_request` is its child
    ├── lego.stage          the set's merge, for the request that was the first to ask for it
    │   ├── lego.load       its members, or the merge itself, come to the device
    │   └── lego.merge      the members are merged
    ├── lego.slot           waiting for a slot
    └── lego.register       vLLM copies the merge into it

Spans are made where vLLM was started with `--otlp-traces-endpoint`. It has set OpenTelemetry's tracer
provider then; without it nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vllm_lego.recipe import Recipe

Headers = list[tuple[bytes, bytes]]

_PLAIN = re.compile(r'[^\s"=]+')
_api: Any = None  # the package opentelemetry, once spans are made


def start() -> None:
    """Make spans from now on."""
    global _api  # noqa: PLW0603  as OpenTelemetry's own provider, one per process
    import opentelemetry.propagate  # noqa: PLC0415  only where it is asked for
    import opentelemetry.trace  # noqa: PLC0415

    _api = opentelemetry


@contextmanager
def request(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[None]:
    """Make the span of a request, child of the client's where its headers name one."""
    if _api is None:
        yield
        return
    client = _api.propagate.extract({k.decode("latin-1"): v.decode("latin-1") for k, v in headers})
    kind = _api.trace.SpanKind.SERVER
    how = {"record_exception": False, "set_status_on_exception": False}
    with _started("lego.intercept", context=client, kind=kind, **how):
        try:
            yield
        except Exception as error:
            failed(error)
            raise


def failed(error: Exception) -> None:
    """Give the current span the error that its request gets.

    As OpenTelemetry's convention for HTTP servers has it, a client's mistake is no failure.
    """
    if _api is None:
        return
    span = _api.trace.get_current_span()
    span.record_exception(error)
    if getattr(error, "status", 500) >= 500:
        span.set_status(_api.trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")


def forwarded(headers: Headers) -> Headers:
    """Return a request's headers for vLLM, whose spans are to be children of the current one."""
    if _api is None:
        return headers
    carrier: dict[str, str] = {}
    _api.propagate.inject(carrier)
    ours = {name.encode("latin-1"): value.encode("latin-1") for name, value in carrier.items()}
    return [(name, value) for name, value in headers if name.lower() not in ours] + [*ours.items()]


def span(name: str, **attributes: Any) -> AbstractContextManager[Any]:
    """Return a span below the current one, if there is one; its attributes are as `annotate` has them."""
    if not _has_parent():
        return nullcontext()
    return _started(name, attributes=_named(attributes))


def past_span(name: str, began: float, seconds: float) -> None:
    """As `span`, of what began then (`time.perf_counter`) and is over."""
    if not _has_parent():
        return
    start_ns = time.time_ns() - int((time.perf_counter() - began) * 1e9)
    over = _api.trace.get_tracer("vllm_lego").start_span(name, start_time=start_ns)
    over.end(start_ns + int(seconds * 1e9))


def annotate(**attributes: Any) -> None:
    """Give the current span attributes; their names get the prefix `lego.`."""
    if _api is not None:
        _api.trace.get_current_span().set_attributes(_named(attributes))


def describe(recipe: Recipe) -> None:
    """Give the current span the attributes of a request's merge."""
    if _api is not None:
        annotate(**described(recipe))


def described(recipe: Recipe) -> dict[str, Any]:
    """Return what tells one merge from another, for spans and the log."""
    return {
        "merge_id": recipe.merge_id,
        "method": recipe.config.method,
        "rank": recipe.config.rank,
        "members": len(recipe.members),
    }


def line(**fields: Any) -> str:
    """Return `key=value …`, as logfmt has it: what is not plain is quoted as in JSON."""
    texts = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in fields.items()}
    return " ".join(
        f"{key}={text if _PLAIN.fullmatch(text) else json.dumps(text)}"
        for key, text in texts.items()
    )


def _has_parent() -> bool:
    return _api is not None and _api.trace.get_current_span().get_span_context().is_valid


def _started(name: str, **how: Any) -> AbstractContextManager[Any]:
    tracer = _api.trace.get_tracer("vllm_lego")
    span: AbstractContextManager[Any] = tracer.start_as_current_span(name, **how)
    return span


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"lego.{name}": value for name, value in attributes.items()}

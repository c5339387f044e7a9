"""Request bodies and answers as ASGI has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from starlette.responses import Response

from vllm_lego.errors import BodyTooLargeError, ClientLeftError, ServingError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_Result = TypeVar("_Result")

_WATCHED_AFTER_S = 0.02


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """Read the whole body, or None when the client leaves meanwhile.

    Raises:
        BodyTooLargeError: as soon as it is known to be over `limit`, in bytes.
    """
    declared = header(scope, b"content-length")
    size = int(declared) if declared.isdigit() and len(declared) < 20 else 0
    chunks: list[bytes] = []
    received, more = 0, True
    while more and max(size, received) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        received += len(chunks[-1])
        more = message.get("more_body", False)
    if max(size, received) > limit:
        raise BodyTooLargeError(f"the body is over the limit of {limit} bytes")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once more, then whatever follows (a disconnect)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def unless_left(coming: Awaitable[_Result], receive: Receive) -> _Result:
    """Await what may be long in coming, for a request whose body has been read.

    An ASGI server cancels nothing when a client leaves; it says so to whoever asks. Nobody asks before
    it has taken a while: most that is awaited is there at once.

    Raises:
        ClientLeftError: it left meanwhile; the waiting was cancelled.
    """
    waiting = asyncio.current_task()
    assert waiting is not None  # noqa: S101  a coroutine runs in one

    async def watch() -> bool:
        left: bool = (await receive())["type"] == "http.disconnect"
        if left:
            waiting.cancel()
        return left

    watching: asyncio.Task[bool] | None = None

    def begin() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    later = asyncio.get_running_loop().call_later(_WATCHED_AFTER_S, begin)
    try:
        return await coming
    except asyncio.CancelledError:
        left = watching is not None and watching.done() and watching.result()
        if left and not waiting.uncancel():  # else the server ends as well
            raise ClientLeftError from None
        raise
    finally:
        later.cancel()
        if watching is not None:
            watching.cancel()


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header of this lower-case name, empty when there is none."""
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def refusal(error: ServingError) -> Response:
    """Return the answer of an error: OpenAI's error object."""
    # Spaced as vLLM's own answers are: a stranger must not tell the two apart.
    body = json.dumps(error.body(), separators=(",", ":"))
    return Response(body, error.status, error.headers, "application/json")

"""Every error that a client can see, each with its HTTP status and the reason label of the metrics.

ServingError
├── BadRequestError       400  the request's fields make no sense
├── UnauthorizedError     401  no or wrong API key
├── ForbiddenError        403  adapters that the policy keeps apart
├── UnknownAdapterError   404  an adapter that is not served here
├── InUseError            409  a merge cannot be dropped while requests use it
├── BodyTooLargeError     413  the body is over the limit
├── UnmergeableError      422  adapters that cannot be merged or served together
├── ClientLeftError       499  the client left before it was its turn; nobody reads this
├── MergeFailedError      500  the server's own fault; its log says more
│   └── WorkersDisagreeError   the workers made different merges of one recipe
├── BusyError             503  try again later: the queue is full
│   ├── MemberChangedError     a member's files changed since the request came
│   ├── NoMemoryError          the workers have too little memory for the merge now
│   ├── ShuttingDownError      the engine drains and takes no more merges
│   └── HubFailedError         an adapter did not come from the hub
└── MergeTimeoutError     504  the merge took longer than the limit
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class ServingError(Exception):
    """Base class. `param` names the field of the request at fault, where there is one."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    kind: ClassVar[str] = "InternalServerError"
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the error object of OpenAI's API."""
        error = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }
        return {"error": error}


class BadRequestError(ServingError):
    """The request's `adapters`, `merge` or `model` make no sense."""

    status, reason, kind = 400, "bad_request", "BadRequestError"


class UnauthorizedError(ServingError):
    """No or a wrong API key."""

    status, reason, kind = 401, "unauthorized", "AuthenticationError"

    def body(self) -> dict[str, Any]:
        """Return what vLLM itself answers, so that nothing tells the two apart."""
        return {"error": "Unauthorized"}


class ForbiddenError(ServingError):
    """Adapters that may each be named, but not be combined, by the server's policy."""

    status, reason, kind = 403, "forbidden", "PermissionDeniedError"


class UnknownAdapterError(ServingError):
    """An adapter that is not served here."""

    status, reason, kind = 404, "unknown_adapter", "NotFoundError"


class InUseError(ServingError):
    """A merge that requests in flight use cannot be dropped."""

    status, reason, kind = 409, "in_use", "ConflictError"


class BodyTooLargeError(ServingError):
    """The request's body is over the limit."""

    status, reason, kind = 413, "body_too_large", "BadRequestError"


class UnmergeableError(ServingError):
    """Sound names of adapters that cannot be merged with each other or served on this base."""

    status, reason, kind = 422, "unmergeable", "UnprocessableEntityError"


class ClientLeftError(ServingError):
    """The client left while its request waited for a merge or a slot."""

    status, reason, kind = 499, "cancelled", "ClientLeftError"

    def __init__(self) -> None:
        super().__init__("the client left")


class MergeFailedError(ServingError):
    """The merge failed for a reason that is not the client's."""

    status, reason, kind = 500, "internal", "InternalServerError"


class WorkersDisagreeError(MergeFailedError):
    """The workers of a server hold different merges, none of which can be trusted."""

    reason = "workers_disagree"


class BusyError(ServingError):
    """The server has no room for this set now."""

    status, reason, kind = 503, "busy", "ServiceUnavailableError"
    headers: ClassVar[dict[str, str]] = {"retry-after": "1"}


class MemberChangedError(BusyError):
    """A member's files are not those that its digest was taken of; the next look finds the new."""

    reason = "member_changed"


class NoMemoryError(BusyError):
    """A worker has too little memory to make the merge."""

    reason = "out_of_memory"


class ShuttingDownError(BusyError):
    """The server serves what it has taken and takes nothing new."""

    reason = "shutting_down"

    def __init__(self) -> None:
        super().__init__(
            "the server is shutting down and takes no new sets; try again, on another replica if "
            "there is one"
        )


class HubFailedError(BusyError):
    """The hub did not deliver an adapter, or not what it said it would."""

    reason = "hub"


class MergeTimeoutError(ServingError):
    """The merge took longer than the limit."""

    status, reason, kind = 504, "timeout", "GatewayTimeoutError"


def _reasons(kind: type[ServingError]) -> Iterator[str]:
    yield kind.reason
    for special in kind.__subclasses__():
        yield from _reasons(special)


REASONS = tuple(dict.fromkeys(_reasons(ServingError)))
"""Every reason of the tree, once."""

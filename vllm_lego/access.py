"""Who asks, and what the policy lets them see.

The caller is a context variable, set around each request. Whatever looks an adapter up on the
request's behalf, ours or vLLM's, on any route, asks here: what the caller may not name is not there.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from vllm_lego.policy import Policy
from vllm_lego.recipe import Recipe

_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        key: hex SHA-256 of the API key that came with it; None if none did.
        is_stranger: whether the server asks for keys and this is none of them. vLLM answers
            strangers on routes that it leaves open.
    """

    key: str | None
    is_stranger: bool = False


_caller: ContextVar[Caller | None] = ContextVar("lego_caller", default=None)
"""None outside of requests: the server itself may do anything."""


class Access:
    """The policy as it holds for whoever is served now. Without a policy everything is allowed.

    Args:
        policy: the rules.
        keys: the API keys that the server accepts; none means that it asks for none.
    """

    def __init__(self, policy: Policy | None = None, keys: Sequence[str] = ()) -> None:
        self._policy = policy
        self._known = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
        self._granted: LRUCache[tuple[str | None, str], None] = LRUCache(_REMEMBERED)

    @property
    def is_restricted(self) -> bool:
        """Whether there is a policy."""
        return self._policy is not None

    @contextmanager
    def of(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[None]:
        """Serve whoever sent these headers."""
        token = _caller.set(self._caller(headers))
        try:
            yield
        finally:
            _caller.reset(token)

    def may_name(self, name: str) -> bool:
        """Whether the caller may name an adapter; if not, it does not exist."""
        caller = _caller.get()
        if self._policy is None or caller is None:
            return True
        return not caller.is_stranger and self._policy.may_name(name, caller.key)

    def check(self, names: Iterable[str], *, param: str) -> None:
        """Refuse a combination that the caller may not have; each name is known to be allowed.

        Raises:
            ForbiddenError: no rule covers all of them.
        """
        caller = _caller.get()
        if self._policy is not None and caller is not None:
            self._policy.check(names, caller.key, param=param)

    def grant(self, merge_id: str) -> None:
        """Let the caller name a merge, of a set that it was allowed.

        Adapters with one content have one digest, so the merge may have been made of members with
        other names, which the caller may not know.
        """
        caller = _caller.get()
        if self._policy is not None and caller is not None:
            self._granted[caller.key, merge_id] = None

    def may_see(self, named: str | Recipe) -> bool:
        """Whether the caller may be told of an adapter, by its name, or of a merge.

        Of a merge that it was granted, or could ask for by its members' names.
        """
        if isinstance(named, str):
            return self.may_name(named)
        caller = _caller.get()
        if self._policy is None or caller is None:
            return True
        if caller.is_stranger:
            return False
        return (caller.key, named.merge_id) in self._granted or self._policy.may_combine(
            _names(named), caller.key
        )

    def may_use(self, recipe: Recipe) -> bool:
        """Whether the caller may send a merge's id back; if not, it does not exist.

        Raises:
            ForbiddenError: it may name each member, but not have them combined.
        """
        if self.may_see(recipe):
            return True
        if all(map(self.may_name, _names(recipe))):
            self.check(_names(recipe), param="model")
        return False

    def _caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        header = next((v for k, v in headers if k.lower() == b"authorization"), b"")
        scheme, _, token = header.partition(b" ")
        token = token.decode("latin-1").encode()  # as vLLM has it
        key = hashlib.sha256(token).hexdigest() if scheme.lower() == b"bearer" else None
        if not self._known:
            return Caller(key)
        known = [hmac.compare_digest(key or "", each) for each in self._known]
        return Caller(key, is_stranger=not any(known))


def _names(recipe: Recipe) -> list[str]:
    return [member.name for member in recipe.members]


class Visible(dict[str, Any]):
    """A dictionary in which whoever looks finds those values alone that `is_visible` tells.

    It stands for vLLM's table of adapters, so that what a caller may not name is not there on any
    route of vLLM's. Writing is not looking.
    """

    def __init__(self, requests: Mapping[str, Any], is_visible: Callable[[Any], bool]) -> None:
        super().__init__(requests)
        self._is_visible = is_visible

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and self._is_visible(super().__getitem__(str(name)))

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # noqa: D102  a dictionary's own
        try:
            return self[name]
        except KeyError:
            return default

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(super().__iter__()) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> Any:  # noqa: D102
        return KeysView(self)

    def values(self) -> Any:  # noqa: D102
        return ValuesView(self)

    def items(self) -> Any:  # noqa: D102
        return ItemsView(self)


class Callers:
    """An ASGI application around another, that knows who is served. `access` is set at the start."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.access: Access | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI connection."""
        if self.access is None or "headers" not in scope:
            await self.app(scope, receive, send)
            return
        with self.access.of(scope["headers"]):
            await self.app(scope, receive, send)

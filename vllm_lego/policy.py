"""Which adapters may be combined, and which API key may name which: the rules of a TOML file.

    [[allow]]
    adapters = ["team-a-*", "shared-*"]
    keys = ["sha256:<hex>"]  # SHA-256 of an API key; without this line the rule is for every key

A set may be served if one rule that applies to the caller covers all of its names. Patterns are
shell patterns, `*`, `?` and `[…]`, of whole names; letters match their own case only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Any, Self

from vllm_lego.errors import ForbiddenError
from vllm_lego.settings import Settings, SettingsError, variable_name

_FIELDS = {"adapters", "keys"}
_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})")


class PolicyError(ValueError):
    """The rules make no sense; the message names the table and the value."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[allow]]` table.

    Attributes:
        adapters: patterns of names that may be combined with each other.
        keys: hex SHA-256 of the API keys that it applies to; None for every key, and for none.
    """

    adapters: tuple[re.Pattern[str], ...]
    keys: frozenset[str] | None = None

    def covers(self, name: str) -> bool:
        """Whether it allows a name."""
        return any(pattern.match(name) for pattern in self.adapters)


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules; whatever none of them allows is forbidden."""

    rules: tuple[Rule, ...]

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read the rules.

        Raises:
            PolicyError: it is no TOML, or not what is expected.
        """
        try:
            content = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise PolicyError(f"it is no TOML ({error})") from error
        tables = content.pop("allow", None)
        if content:
            raise PolicyError(f"it has {next(iter(content))!r}; it may have [[allow]] tables alone")
        if not isinstance(tables, list) or not tables:
            raise PolicyError("it has no [[allow]] table, so nobody could name any adapter")
        return cls(tuple(_rule(table, i + 1) for i, table in enumerate(tables)))

    def may_name(self, name: str, key: str | None) -> bool:
        """Whether a caller may name an adapter.

        Args:
            name: of the adapter.
            key: hex SHA-256 of the caller's API key; None for a caller without one.
        """
        return any(rule.covers(name) for rule in self._applying(key))

    def may_combine(self, names: Iterable[str], key: str | None) -> bool:
        """Whether a caller may have these adapters served as one."""
        names = list(names)
        return any(all(map(rule.covers, names)) for rule in self._applying(key))

    def check(self, names: Iterable[str], key: str | None, *, param: str) -> None:
        """Refuse a combination of adapters, each of which the caller may name.

        Raises:
            ForbiddenError: no rule covers them all.
        """
        names = sorted(names)
        if not self.may_combine(names, key):
            raise ForbiddenError(
                f"adapters {', '.join(map(repr, names))} may not be combined on this server",
                param=param,
            )

    def _applying(self, key: str | None) -> Iterable[Rule]:
        return (rule for rule in self.rules if rule.keys is None or key in rule.keys)


def read_policy(settings: Settings) -> Policy | None:
    """Read the file that the settings name, if they name one.

    Raises:
        SettingsError: it cannot be read, or makes no sense.
    """
    if settings.policy_file is None:
        return None
    where = f"{variable_name('policy_file')}, {settings.policy_file}"
    try:
        return Policy.from_toml(Path(settings.policy_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingsError(f"{where}: it cannot be read ({reason})") from error
    except PolicyError as error:
        raise SettingsError(f"{where}: {error}") from error


def _rule(table: Any, number: int) -> Rule:
    where = f"[[allow]] table {number}"
    if not isinstance(table, dict):
        raise PolicyError(f"{where} is {table!r}, which is no table")
    unknown = sorted(table.keys() - _FIELDS)
    if unknown:
        raise PolicyError(f"{where} has {unknown[0]!r}; a rule has adapters and keys")
    patterns = _strings(table.get("adapters"), f"{where}: adapters", "names or patterns of names")
    if "keys" not in table:
        return Rule(tuple(re.compile(translate(pattern)) for pattern in patterns))
    keys: list[str] = []
    for key in _strings(table["keys"], f"{where}: keys", "SHA-256 digests of API keys"):
        match = _KEY.fullmatch(key)
        if match is None:
            # Not shown: it may be the key itself, and this goes to the log.
            raise PolicyError(
                f"{where}: keys[{len(keys)}], of {len(key)} characters, is not 'sha256:' and 64 hex "
                "digits"
            )
        keys.append(match[1].lower())
    return Rule(tuple(re.compile(translate(pattern)) for pattern in patterns), frozenset(keys))


def _strings(value: Any, where: str, what: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise PolicyError(f"{where} is {value!r}; expected a list of one or more {what}")
    return value

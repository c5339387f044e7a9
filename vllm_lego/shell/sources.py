"""From what is typed to adapters: folders, and hub repositories at a revision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lego_core import ConfigError, LoraAdapter, load_adapter


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter of the command line.

    Attributes:
        name: what output and messages call it; no two are the same.
        place: a folder, or a hub repository.
        revision: of the repository, if one was asked for.
    """

    name: str
    place: str
    revision: str | None = None

    def load(self) -> LoraAdapter:
        """Read it.

        Raises:
            LegoError: as `load_adapter`.
        """
        return load_adapter(self.place, self.revision, name=self.name)


def parse_sources(arguments: Sequence[str], revision: str | None) -> list[Source]:
    """Tell folders from repositories, and give each source a name.

    `org/name@revision` is a repository at a revision, unless there is a folder of that name.

    Args:
        arguments: the sources as they were typed.
        revision: of the repositories that are typed without one.

    Raises:
        ConfigError: a source is empty, or there is no repository to have the revision.
    """
    found: list[tuple[str, str, str | None]] = []
    for typed in arguments:
        place, _, own = typed.partition("@")
        if os.path.lexists(typed) or not _looks_like_repository(place):
            place, own = typed, ""
        if not place.strip():
            raise ConfigError("a source is empty; give a folder or a hub repository")
        if _looks_like_repository(place) and not os.path.lexists(place):
            found.append((place, place, own or revision))
        else:
            found.append((Path(os.path.abspath(place)).name or place, place, own or None))  # noqa: PTH100  keeps links' names
    if revision is not None and all(at is None for _, _, at in found):
        raise ConfigError("--revision is for hub repositories, but all sources are folders")
    return [Source(*source) for source in _with_names_apart(found)]


def _looks_like_repository(place: str) -> bool:
    """Whether it has the form `org/name`; `lego_core` looks closer."""
    organisation, _, name = place.partition("/")
    return bool(organisation.strip(".~") and name.strip(".")) and "/" not in name


def _with_names_apart(
    sources: Sequence[tuple[str, str, str | None]],
) -> list[tuple[str, str, str | None]]:
    """Call sources of one name by their places, and number those of one place."""
    names = [name for name, _, _ in sources]
    apart = [
        (place if names.count(name) > 1 else name, place, revision)
        for name, place, revision in sources
    ]
    taken: dict[str, int] = {}
    numbered: list[tuple[str, str, str | None]] = []
    for name, place, revision in apart:
        taken[name] = taken.get(name, 0) + 1
        numbered.append((name if taken[name] == 1 else f"{name}#{taken[name]}", place, revision))
    return numbered

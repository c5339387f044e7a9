"""Where an adapter is: a folder, or a hub repository brought into a folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import (
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    PICKLE_FILE,
    PICKLE_HINT,
    WEIGHTS_FILE,
    parse_index,
    read_small,
)
from lego_core.errors import AdapterFormatError, AdapterNotFoundError, HubError, LegoError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SHARDS = 256


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """An adapter's folder, and what it was made from.

    Attributes:
        name: what messages call the adapter.
        folder: where its files are.
        source: the hub repository, or the folder as it was given.
        revision: the repository's commit; None for a folder, which has none.
    """

    name: str
    folder: Path
    source: str
    revision: str | None = None


def resolve_source(
    source: str | os.PathLike[str], revision: str | None = None, *, name: str | None = None
) -> ResolvedSource:
    """Find an adapter's folder, downloading its files from the hub if it is a repository.

    A string of the form `org/name` is a repository unless such a folder exists; anything else
    is a folder. The revision is resolved to a commit by the configuration's download, all other
    files are that commit's, and only configuration and safetensors are downloaded, into
    huggingface_hub's cache. Its environment variables (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`,
    `HF_HUB_OFFLINE`, timeouts) work as ever; without a connection, what is in the cache serves.

    Raises:
        AdapterNotFoundError: no such repository, revision or file, or no access to it.
        AdapterFormatError: its index of shards is nonsense.
        HubError: the hub could not be reached, did not deliver, or not what it said.
    """
    try:
        path = Path(source)
    except TypeError as error:
        raise AdapterNotFoundError(
            f"{source!r} is neither a path nor the name of a hub repository"
        ) from error
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source) or os.path.lexists(source):
        name = name if name is not None else path.name
        if revision is not None:
            raise AdapterNotFoundError(
                f"adapter {name!r}: {str(source)!r} is no hub repository but a folder, which has no "
                f"revision {revision!r}; leave the revision out, or give the repository's name from "
                "where no such folder is"
            )
        return ResolvedSource(name, path, str(source))
    return fetch_adapter(source, revision, name=name)


def fetch_adapter(
    repository: str,
    revision: str | None = None,
    *,
    name: str | None = None,
    max_bytes: int | None = None,
) -> ResolvedSource:
    """Bring an adapter's files from the hub into huggingface_hub's cache, unless they are there.

    As `resolve_source`, but `repository` is never a folder. What the hub says of a file is checked
    against the file: its SHA-256 where the hub gives one, as for all large files.

    Args:
        repository: `org/name`.
        revision: branch, tag or commit; the default branch if None.
        name: what messages call the adapter; the repository's name by default.
        max_bytes: that all its files together may have, by the hub's word before a download, and
            by count during it. What is in the cache already is not counted.

    Raises:
        AdapterNotFoundError: no such repository, revision or file, or no access to it.
        AdapterFormatError: larger than it may be, or its index of shards is nonsense.
        HubError: the hub could not be reached, did not deliver, or not what it said.
    """
    fetch = _Fetch(repository, name if name is not None else repository, max_bytes)
    config = fetch.file(CONFIG_FILE, revision, MAX_CONFIG_BYTES)
    commit = config.parent.name
    if not _COMMIT.fullmatch(commit):
        raise HubError(
            f"adapter {fetch.name!r}: the hub gave {commit[:80]!r} as the commit of {repository!r}"
        )
    _fetch_weights(fetch, commit, config.parent)
    return ResolvedSource(fetch.name, config.parent, repository, commit)


def _fetch_weights(fetch: _Fetch, commit: str, folder: Path) -> None:
    """Bring the weights, one file or an index and its shards, to where the configuration is."""
    try:
        fetch.file(WEIGHTS_FILE, commit)
    except LegoError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        try:
            fetch.file(INDEX_FILE, commit, MAX_HEADER_BYTES)
        except LegoError as no_index:
            if not isinstance(no_index.__cause__, EntryNotFoundError):
                raise
            if _has_pickle(fetch.repository, commit):
                raise AdapterNotFoundError(
                    f"adapter {fetch.name!r}: {fetch.repository!r} at {commit[:12]} has no "
                    f"{WEIGHTS_FILE}: {PICKLE_HINT}"
                ) from None
            raise error from None
        index = read_small(folder, INDEX_FILE, fetch.name, MAX_HEADER_BYTES)
        shards = sorted(set(parse_index(index, fetch.name).values()))
        if len(shards) > _MAX_SHARDS:
            raise AdapterFormatError(
                f"adapter {fetch.name!r}: {INDEX_FILE} names {len(shards)} shards, over {_MAX_SHARDS}"
            ) from None
        fetch.expect(shards, commit)
        for shard in shards:
            fetch.file(shard, commit)


class _Fetch:
    """The download of one adapter's files, bounded in bytes where `max_bytes` says so."""

    def __init__(self, repository: str, name: str, max_bytes: int | None) -> None:
        self.repository = repository
        self.name = name
        self._max_bytes = max_bytes
        self._spent = 0

    def file(self, file: str, revision: str | None, limit: int | None = None) -> Path:
        """Return a file's place in the cache; its folder is named by the commit.

        Args:
            file: its name.
            revision: branch, tag or commit.
            limit: bytes that a file of this kind may have.
        """
        with _told(self.repository, file, revision, self.name):
            if self._max_bytes is None:
                path = Path(hf_hub_download(self.repository, file, revision=revision))
            else:
                left = self._max_bytes - self._spent
                path = self._bounded(file, revision, left if limit is None else min(left, limit))
            self._verify(path)
        return path

    def expect(self, files: Sequence[str], commit: str) -> None:
        """Refuse files that together are too large, before the first of them is downloaded."""
        if self._max_bytes is None:
            return
        size = 0
        for file in files:
            with _told(self.repository, file, commit, self.name):
                told = hf_hub_download(self.repository, file, revision=commit, dry_run=True)
            size += 0 if told.is_cached else told.file_size or 0
        self._check(f"the {len(files)} .safetensors", size, self._max_bytes - self._spent)

    def _check(self, what: str, size: int, most: int) -> None:
        if size > most:
            raise AdapterFormatError(
                f"adapter {self.name!r}: {what} of {self.repository!r} has {size} bytes or more; at "
                f"most {most} are downloaded for it, and {self._max_bytes} for an adapter"
            )

    def _bounded(self, file: str, revision: str | None, most: int) -> Path:
        def check(size: int) -> None:
            self._check(file, size, most)

        told = hf_hub_download(self.repository, file, revision=revision, dry_run=True)
        if not told.is_cached:
            check(told.file_size or 0)
        path = Path(
            hf_hub_download(self.repository, file, revision=revision, tqdm_class=_counting(check))
        )
        if not told.is_cached:
            size = path.stat().st_size
            self._spent += size
            if size > most:  # what did not come by plain HTTP may not have been counted
                _remove(path)
                check(size)
        return path

    def _verify(self, path: Path) -> None:
        """Compare a file with its digest, which the cache's link leads to: `blobs/<SHA-256>`.

        A file that was there before is compared too: the process may have died between its
        download and this. On a volume without links nothing is known of the digest.
        """
        digest = path.readlink().name if path.is_symlink() else ""
        if not _SHA256.fullmatch(digest):  # small files have git's SHA-1, or what a mirror likes
            return
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != digest:
            _remove(path)
            raise HubError(
                f"adapter {self.name!r}: {path.name} of {self.repository!r} has the SHA-256 "
                f"{found[:12]}, but the hub says {digest[:12]}; it was removed, try again"
            )


def _counting(check: Callable[[int], None]) -> type[tqdm]:
    """Return a progress bar that shows nothing and checks the bytes that have come so far.

    It is what huggingface_hub tells of every block before it writes it.
    """

    class Counting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]
            self.come = 0

        def update(self, n: float | None = 1) -> None:
            self.come += int(n or 0)
            check(self.come)

    return Counting


def _remove(path: Path) -> None:
    """Remove a file from the cache: the link, and the blob that it leads to."""
    blob = path.parent / path.readlink() if path.is_symlink() else path
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _has_pickle(repository: str, commit: str) -> bool:
    """Ask the hub, for the message's sake only."""
    try:
        return HfApi().file_exists(repository, PICKLE_FILE, revision=commit)
    except Exception:  # noqa: BLE001  # whatever it is, the weights are missing
        return False


@contextmanager
def _told(repository: str, file: str, revision: str | None, name: str) -> Iterator[None]:
    """Say in our errors what huggingface_hub says in its many."""
    at = f"{repository!r}" if revision is None else f"{repository!r} at {revision!r}"
    try:
        yield
    except LegoError:  # the bound of a download that is under way
        raise
    except GatedRepoError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: {at} is gated; accept its terms on the hub and set HF_TOKEN to a "
            "token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: the hub has no repository {repository!r} that you may read (nor is "
            "there a folder of that name); for a private one, set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: {repository!r} has no revision {revision!r}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreached(error, file, at, name) from error
    except EntryNotFoundError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: {at} has no {file}; it is no PEFT adapter"
        ) from error
    except HfHubHTTPError as error:
        raise _unreached(error, file, at, name) from error
    # The HTTP library that huggingface_hub raises errors of has changed more than once.
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise HubError(
            f"adapter {name!r}: {file} of {at} did not come from the hub ({type(error).__name__}: "
            f"{reason}); try again, or download it and give the folder"
        ) from error


def _unreached(error: Exception, file: str, at: str, name: str) -> LegoError:
    """Say why a file that is not in the cache could not be asked for."""
    if constants.HF_HUB_OFFLINE:
        return AdapterNotFoundError(
            f"adapter {name!r}: {file} of {at} is not in the cache, and HF_HUB_OFFLINE is set; "
            "unset it, or download the adapter first"
        )
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status in {401, 403}:
        return AdapterNotFoundError(
            f"adapter {name!r}: the hub refuses {at} to you (HTTP {status}); set HF_TOKEN to a token "
            "that may read it"
        )
    reason = f"HTTP {status}" if status else f"{type(cause or error).__name__}: {cause or error}"
    return HubError(
        f"adapter {name!r}: the hub could not be reached for {file} of {at} ({reason[:300]}); check "
        "the connection and HF_ENDPOINT, or give a folder"
    )

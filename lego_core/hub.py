"""Where an adapter is: a folder, or a hub repository brought into a folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lego_core.adapter_config import CONFIG_FILE
from lego_core.adapter_files import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    PICKLE_FILE,
    PICKLE_HINT,
    WEIGHTS_FILE,
    parse_index,
    read_small,
)
from lego_core.errors import AdapterNotFoundError, HubError, LegoError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


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
        HubError: the hub could not be reached or did not deliver.
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
    name = name if name is not None else source
    config = _download(source, CONFIG_FILE, revision, name)
    commit = config.parent.name
    if not _COMMIT.fullmatch(commit):
        raise HubError(
            f"adapter {name!r}: the hub gave {commit[:80]!r} as the commit of {source!r}"
        )
    _download_weights(source, commit, config.parent, name)
    return ResolvedSource(name, config.parent, source, commit)


def _download_weights(repository: str, commit: str, folder: Path, name: str) -> None:
    """Bring the weights, one file or an index and its shards, to where the configuration is."""
    try:
        _download(repository, WEIGHTS_FILE, commit, name)
    except LegoError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        try:
            _download(repository, INDEX_FILE, commit, name)
        except LegoError as no_index:
            if not isinstance(no_index.__cause__, EntryNotFoundError):
                raise
            if _has_pickle(repository, commit):
                raise AdapterNotFoundError(
                    f"adapter {name!r}: {repository!r} at {commit[:12]} has no {WEIGHTS_FILE}: "
                    f"{PICKLE_HINT}"
                ) from None
            raise error from None
        index = read_small(folder, INDEX_FILE, name, MAX_HEADER_BYTES)
        for shard in sorted(set(parse_index(index, name).values())):
            _download(repository, shard, commit, name)


def _has_pickle(repository: str, commit: str) -> bool:
    """Ask the hub, for the message's sake only."""
    try:
        return huggingface_hub.HfApi().file_exists(repository, PICKLE_FILE, revision=commit)
    except Exception:  # noqa: BLE001  # whatever it is, the weights are missing
        return False


def _download(repository: str, file: str, revision: str | None, name: str) -> Path:
    """Return a file's place in the cache; its folder is named by the commit."""
    at = f"{repository!r}" if revision is None else f"{repository!r} at {revision!r}"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except GatedRepoError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: {at} is gated; accept its terms on the hub and set HF_TOKEN to a "
            "token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterNotFoundError(
            f"adapter {name!r}: there is neither a folder {repository!r} here nor a repository of "
            "that name on the hub that you may read; for a private one, set HF_TOKEN"
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

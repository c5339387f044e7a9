"""What a worker keeps so that it need not read or merge again: members, and merges of old.

Merges go to host memory and to the store soon after they are made, so that what the device drops
later costs nothing to drop. Members are kept in host memory, and on the device in what its merges
leave of the budget. Everything is bounded in bytes and goes least recently used first.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from cachetools import Cache, LRUCache

from lego_core import LegoError, LoraAdapter, load_adapter
from vllm_lego.file_stamps import FilesRead, look, stamp
from vllm_lego.host_memory import HostMemory
from vllm_lego.packed import PackedAdapter
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings
from vllm_lego.store import MergeStore
from vllm_lego.threads import yield_to_the_engine

READERS = 4
"""Members that are read at the same time, beside those that the staging threads read."""
_EVENTS = 10_000  # told of at the next poll; nobody polls only while nothing happens


@dataclass(slots=True, eq=False)
class KeptMerge:
    """A merge in host memory, how it was made, and when it was last used (monotonic seconds)."""

    packed: PackedAdapter
    recipe: str  # encoded
    fidelity: float
    last_used: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        """Size of the merge in bytes."""
        return self.packed.nbytes


class Tiers:
    """The caches of one worker below the merges that are ready on its device. Thread-safe.

    On CUDA whoever asks for members or merges does so on one and the same stream: what another thread
    drops is not overwritten before it has been read.

    Args:
        device: of the worker.
        check: raises a `LegoError` for a member that does not fit the base model.
        settings: the budgets.
        memory: where that lies which is kept in host memory; as large as that budget. Without it,
            a copy has memory of its own, and what lies on the host already is not copied.
        writes: whether this worker writes to the store; one of an engine is enough.
    """

    def __init__(
        self,
        device: torch.device,
        check: Callable[[LoraAdapter], None],
        settings: Settings,
        memory: HostMemory | None = None,
        *,
        writes: bool,
    ) -> None:
        self._device = device
        self._check = check
        self._device_bytes = settings.device_cache_bytes
        self._memory = memory
        self._writes = writes
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, "lego-reading", initializer=yield_to_the_engine)
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._events: deque[tuple[str, str, float]] = deque(maxlen=_EVENTS)
        self._host = _Noticing(settings.host_cache_bytes, self._evicted)
        self._on_device: LRUCache[str, PackedAdapter] = LRUCache(
            settings.device_cache_bytes, getsizeof=lambda packed: packed.nbytes
        )
        self._store = (
            MergeStore(Path(settings.store_dir), settings.store_bytes, self.tell)
            if settings.store_dir
            else None
        )

    def members(self, members: Sequence[Member]) -> list[LoraAdapter]:
        """Return members on the device, from there, host memory or their files.

        Raises:
            LegoError: the files of one are not there, not the content that is meant, or do not fit.
        """
        with self._lock:
            here = {*self._on_device, *self._host}
        absent = {m.digest: m for m in members if m.digest not in here}
        # The first is read here. Of the others, here too what no reader has begun when its turn comes:
        # readers that wait for a volume hold up nobody else's sets.
        for first in list(absent)[:1]:
            del absent[first]
        reading = {digest: self._readers.submit(self._read, m) for digest, m in absent.items()}
        try:
            return [self._member(member, reading.pop(member.digest, None)) for member in members]
        except BaseException as error:
            reading.clear()
            _let_go(error)
            raise

    def _read(self, member: Member) -> PackedAdapter:
        """Read a member and keep it; another thread that is at it is waited for."""
        with self._lock:
            turn = self._turns.setdefault(member.digest, threading.Lock())
        with turn:
            with self._lock:
                kept = self._host.get(member.digest)
            if isinstance(kept, PackedAdapter):
                return kept
            loaded = self._load(member)
            return self._keep_in_host_memory(member.digest, loaded) or loaded

    def _load(self, member: Member) -> PackedAdapter:
        """Read a member's files, into host memory that is free if there is enough.

        They are hashed only if they are not, or do not stay, as the front end saw them when it did so.
        """
        adapter = self._load_as_seen(member) or self._load_files(member)
        self._check(adapter)
        return PackedAdapter.pack(adapter)

    def _load_as_seen(self, member: Member) -> LoraAdapter | None:
        if not member.stamp:
            return None
        mark = look(member.path).mark
        if stamp(mark) != member.stamp:
            return None
        read = FilesRead()
        with suppress(LegoError):  # half of it may have been another's: the hash will tell
            adapter = self._load_files(member, read)
            if read.are(mark):
                return adapter
        return None

    def _load_files(self, member: Member, trusted: FilesRead | None = None) -> LoraAdapter:
        return load_adapter(
            Path(member.path),
            name=member.name,
            digest=member.digest,
            trust_digest=trusted is not None,
            room=self._free_memory,
            observe=trusted.note if trusted else None,
        )

    def _free_memory(self, nbytes: int) -> torch.Tensor | None:
        # Nothing is dropped for it: what is read may prove to be no good.
        if self._memory is None or not 0 < nbytes <= self._host.maxsize:
            return None
        with self._lock:
            return self._memory.allocate(nbytes)

    def _member(self, member: Member, reading: Future[PackedAdapter] | None) -> LoraAdapter:
        with self._lock:
            packed = self._on_device.get(member.digest)
            kept = self._host.get(member.digest)
        if packed is None:
            if reading is not None and not reading.cancel():
                kept = reading.result()
            elif not isinstance(kept, PackedAdapter):
                kept = self._read(member)
            packed = kept.on(self._device)
            with self._lock:
                if packed is not kept and packed.nbytes <= self._on_device.maxsize:
                    self._on_device[member.digest] = packed
        return packed.unpack(member.name)

    def spare_device(self, merges_bytes: int) -> None:
        """Drop members from the device until merges of this size fit into the budget beside them."""
        with self._lock:
            while self._on_device and merges_bytes + self._on_device.currsize > self._device_bytes:
                self._on_device.popitem()

    def drop_from_device(self) -> None:
        """Drop all members from the device."""
        with self._lock:
            self._on_device.clear()

    def find(self, recipe: Recipe) -> tuple[PackedAdapter, float, str] | None:
        """Return a merge on the device, its fidelity and the tier it came from, if one has it.

        Raises:
            LegoError: the one in the store does not fit the base model.
        """
        with self._lock:
            kept = self._host.get(recipe.merge_id)
        if isinstance(kept, KeptMerge):
            kept.last_used = time.monotonic()
            return kept.packed.on(self._device), kept.fidelity, "host"
        try:
            stored = self._read_from_store(recipe)
        except BaseException as error:
            _let_go(error)
            raise
        if stored is None:
            return None
        loaded, fidelity = stored
        packed = self._keep_in_host_memory(recipe.merge_id, loaded, (recipe, fidelity)) or loaded
        return packed.on(self._device), fidelity, "disk"

    def _read_from_store(self, recipe: Recipe) -> tuple[PackedAdapter, float] | None:
        """Read a merge, into host memory that is free if there is enough."""
        stored = self._store.load(recipe, self._free_memory) if self._store else None
        if stored is None:
            return None
        adapter, fidelity = stored
        self._check(adapter)  # the folder may be shared with servers of another base model
        return PackedAdapter.pack(adapter), fidelity

    def keep(self, recipe: Recipe, packed: PackedAdapter, fidelity: float) -> None:
        """Keep a merge that was just made in host memory and in the store."""
        on_host = self._keep_in_host_memory(recipe.merge_id, packed, (recipe, fidelity))
        if self._store is not None and self._writes:
            on_host = on_host or packed.in_host_memory()
            self._store.save(recipe, on_host.unpack(), fidelity)

    def forget(self, merge_id: str) -> None:
        """Drop a merge from host memory. The store is the front end's to clear."""
        with self._lock:
            self._host.pop(merge_id, None)

    def in_host_memory(self) -> list[KeptMerge]:
        """Return the merges in host memory."""
        with self._lock:
            kept = [self._host.peek(key) for key in self._host]
        return [merge for merge in kept if isinstance(merge, KeptMerge)]

    def account(self) -> dict[str, tuple[int, int]]:
        """Return entries and bytes of merges by tier. Looks through the store: not for the loop."""
        on_disk = self._store.merges().values() if self._store else []
        return {"host": self.host_account(), "disk": (len(on_disk), sum(on_disk))}

    def host_account(self) -> tuple[int, int]:
        """Return entries and bytes of merges in host memory."""
        sizes = [merge.nbytes for merge in self.in_host_memory()]
        return len(sizes), sum(sizes)

    def events(self) -> list[tuple[str, str, float]]:
        """Return what the metrics have not been told of.

        It is (`evictions`, tier, seconds unused), (`store_seconds`, operation, seconds) or
        (`errors`, reason, 0).
        """
        events: list[tuple[str, str, float]] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def tell(self, kind: str, label: str, seconds: float = 0) -> None:
        """Note an event for the metrics, see `events`."""
        self._events.append((kind, label, seconds))

    def _keep_in_host_memory(
        self, key: str, packed: PackedAdapter, made: tuple[Recipe, float] | None = None
    ) -> PackedAdapter | None:
        """Keep a member, or a merge with how it was made and its fidelity, and return it there.

        None if there is no room: it is too large, or what was dropped for it is still in use.
        """
        in_place = self._memory is not None and self._memory.holds(packed.buffer)
        block = None
        with self._lock:
            if packed.nbytes > self._host.maxsize:
                return None
            if self._memory is not None and not in_place:
                # Where entries of other sizes or in use lie between the free parts, no more is dropped
                # for this one than twice its size.
                most = self._host.currsize - 2 * packed.nbytes
                while (block := self._memory.allocate(packed.nbytes)) is None:
                    if not self._host or self._host.currsize <= most:
                        return None
                    self._host.popitem()
        on_host = packed.in_host_memory(block)
        kept = KeptMerge(on_host, made[0].encode(), made[1]) if made else on_host
        with self._lock:
            self._host[key] = kept
        return on_host

    def _evicted(self, kept: PackedAdapter | KeptMerge) -> None:
        if isinstance(kept, KeptMerge):
            self.tell("evictions", "host", time.monotonic() - kept.last_used)


def _let_go(error: BaseException | None) -> None:
    """Drop what was read before an error: whoever waits for it may keep the error for a while."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class _Noticing(LRUCache[str, PackedAdapter | KeptMerge]):
    """A byte-bounded LRU that tells what it drops to make room."""

    def __init__(
        self, max_bytes: int, on_eviction: Callable[[PackedAdapter | KeptMerge], None]
    ) -> None:
        super().__init__(max_bytes, getsizeof=lambda kept: kept.nbytes)
        self._on_eviction = on_eviction

    def peek(self, key: str) -> PackedAdapter | KeptMerge:
        """Return an entry; looking is not using."""
        return Cache.__getitem__(self, key)

    def popitem(self) -> tuple[str, PackedAdapter | KeptMerge]:
        key, kept = super().popitem()
        self._on_eviction(kept)
        return key, kept

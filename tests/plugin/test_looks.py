"""Looks at files are shared, and a path that does not answer holds up nobody but who wants it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_lego import looks
from vllm_lego.looks import SHARED_S, Looks


class Volume:
    """Paths that answer with how often they were looked at; those in `hung` once they are let go."""

    def __init__(self, *hung: str) -> None:
        self.hung = {path: threading.Event() for path in hung}
        self.times: Counter[str] = Counter()
        self.threads: list[str] = []

    def see(self, path: str) -> int:
        self.times[path] += 1
        self.threads.append(threading.current_thread().name)
        if path in self.hung:
            assert self.hung[path].wait(60)
        return self.times[path]


async def at(looked: Looks, volume: Volume, *paths: str) -> list[object]:
    seen = await looked.at((volume.see, path) for path in paths)
    return [seen[volume.see, path] for path in paths]


async def begun(volume: Volume, path: str) -> None:
    async with asyncio.timeout(60):
        while not volume.times[path]:
            await asyncio.sleep(0.001)


def test_one_thread_looks_at_all_that_a_request_wants():
    async def scenario():
        volume = Volume()
        assert await at(Looks(), volume, "a", "b", "c", "a") == [1, 1, 1, 1]
        assert len(volume.threads) == 3
        assert len(set(volume.threads)) == 1

    asyncio.run(scenario())


def test_a_look_is_shared_while_it_is_young(monkeypatch):
    async def scenario():
        volume, looked = Volume(), Looks()
        await at(looked, volume, "a")
        await asyncio.sleep(SHARED_S)
        assert await at(looked, volume, "a", "b") == [2, 1]
        monkeypatch.setattr(looks, "SHARED_S", 1000.0)
        every = [at(looked, volume, "a", "b", "c") for _ in range(64)]
        assert await asyncio.gather(*every) == [[2, 1, 1]] * 64

    asyncio.run(scenario())


def test_what_does_not_answer_holds_one_thread_and_nobody_behind_it():
    async def scenario():
        volume = Volume("hung")
        with ThreadPoolExecutor(2) as threads:
            looked = Looks(threads)
            first = asyncio.create_task(at(looked, volume, "a", "hung", "b"))
            await begun(volume, "hung")
            await asyncio.sleep(SHARED_S)
            others = [asyncio.create_task(at(looked, volume, "hung", "c")) for _ in range(8)]
            async with asyncio.timeout(60):
                assert await at(looked, volume, "a", "b", "c") == [2, 1, 1]
            assert not any(task.done() for task in (first, *others))
            volume.hung["hung"].set()
            assert await first == [1, 1, 2]  # its own look at `b` came after the one above
            assert await asyncio.gather(*others) == [[1, volume.times["c"]]] * 8
            assert volume.times["hung"] == 1

    asyncio.run(scenario())


def test_who_leaves_takes_no_look_from_those_who_share_it():
    async def scenario():
        volume, looked = Volume("a"), Looks()
        first, second = (asyncio.create_task(at(looked, volume, "a")) for _ in range(2))
        await begun(volume, "a")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        volume.hung["a"].set()
        assert await second == [1]

    asyncio.run(scenario())


def test_what_goes_wrong_is_told_to_all_who_share_it():
    async def scenario():
        def see(path: str) -> int:
            raise RuntimeError(f"{path} is broken")

        looked = Looks()
        every = [looked.at([(see, "a"), (len, "bb")]) for _ in range(4)]
        for told in await asyncio.gather(*every, return_exceptions=True):
            assert str(told) == "a is broken"
        assert await looked.at([(len, "bb")]) == {(len, "bb"): 2}

    asyncio.run(scenario())


def test_looks_that_nobody_can_share_are_let_go_of(monkeypatch):
    monkeypatch.setattr(looks, "_REMEMBERED", 10)
    monkeypatch.setattr(looks, "SHARED_S", 0.0)

    async def scenario():
        volume, looked = Volume(), Looks()
        for i in range(100):
            await at(looked, volume, f"path{i}")
            assert len(looked._latest) <= 11

    asyncio.run(scenario())


@pytest.mark.parametrize("local", [True, False])
def test_the_loop_looks_at_local_files_itself_once_they_are_known_to_be(
    tmp_path, monkeypatch, local
):
    device = tmp_path.stat().st_dev
    monkeypatch.setattr(looks, "_local_devices", lambda: {device} if local else set())

    async def scenario():
        volume, looked, path = Volume(), Looks(), str(tmp_path)
        for times in (1, 2, 3):
            assert await at(looked, volume, path, path) == [times, times]
            await asyncio.sleep(SHARED_S)
        own = threading.current_thread().name
        return [thread == own for thread in volume.threads]

    assert asyncio.run(scenario()) == [False, local, local]


def test_what_goes_wrong_where_the_loop_looks_is_told_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "_local_devices", lambda: {tmp_path.stat().st_dev})

    async def scenario():
        def see(_: str) -> int:
            raise RuntimeError("broken")

        looked = Looks()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                await looked.at([(see, str(tmp_path))])
            await asyncio.sleep(SHARED_S)

    asyncio.run(scenario())


def test_local_are_the_file_systems_that_are_listed(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 25 0:27 / /dev/shm rw - tmpfs tmpfs rw,size=24683656k\n"
        "31 27 0:44 / /adapters rw,relatime shared:7 master:1 - nfs4 server:/adapters rw\n"
        "32 27 0:45 / /bucket rw - fuse.s3fs s3fs rw\n"
    )
    monkeypatch.setattr(looks, "_MOUNTS", mounts)
    looks._local_devices.cache_clear()
    assert looks._local_devices() == {os.makedev(254, 0), os.makedev(0, 27)}
    monkeypatch.setattr(looks, "_MOUNTS", tmp_path / "none")
    looks._local_devices.cache_clear()
    assert not looks._local_devices()
    looks._local_devices.cache_clear()

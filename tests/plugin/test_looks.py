"""Looks at files are shared, and a path that does not answer holds up nobody but who wants it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_lego import looks
from vllm_lego.looks import SHARED_S, Looks, Seen

READ_MOUNTS = looks._local_devices.__wrapped__  # not what was read before


class Volume:
    """Paths that answer with how often they were looked at; those in `hung` once they are let go."""

    def __init__(self, *hung: str, device: int = 1) -> None:
        self.hung = {path: threading.Event() for path in hung}
        self.times: Counter[str] = Counter()
        self.threads: list[str] = []
        self.device = device

    def see(self, path: str) -> Seen:
        self.times[path] += 1
        self.threads.append(threading.current_thread().name)
        if path in self.hung:
            assert self.hung[path].wait(60)
        return Seen(self.times[path], frozenset([self.device]))


@pytest.fixture(autouse=True)
def nothing_is_local(monkeypatch):
    monkeypatch.setattr(looks, "_local_devices", frozenset)


async def at(looked: Looks, volume: Volume, *paths: str) -> list[object]:
    return await looked.at((volume.see, path) for path in paths)


async def begun(volume: Volume, path: str) -> None:
    async with asyncio.timeout(60):
        while not volume.times[path]:
            await asyncio.sleep(0.001)


def test_a_look_is_shared_while_it_is_young(monkeypatch):
    async def scenario():
        volume, looked = Volume(), Looks()
        assert await at(looked, volume, "a", "a") == [1, 1]
        await asyncio.sleep(SHARED_S)
        assert await at(looked, volume, "a", "b") == [2, 1]
        monkeypatch.setattr(looks, "SHARED_S", 1000.0)
        every = [at(looked, volume, "a", "b", "c") for _ in range(64)]
        assert await asyncio.gather(*every) == [[2, 1, 1]] * 64

    asyncio.run(scenario())


def test_what_does_not_answer_holds_one_thread_and_nobody_else():
    async def scenario():
        volume = Volume("hung")
        with ThreadPoolExecutor(2) as threads:
            looked = Looks(threads)
            waiting = [asyncio.create_task(at(looked, volume, "hung", "b")) for _ in range(8)]
            await begun(volume, "hung")
            async with asyncio.timeout(60):
                for _ in range(2):
                    await at(looked, volume, "a", "b")
                    await asyncio.sleep(SHARED_S)
            assert not any(task.done() for task in waiting)
            waiting.append(asyncio.create_task(at(looked, volume, "hung", "b")))
            await asyncio.sleep(0)
            volume.hung["hung"].set()
            assert {seen[0] for seen in await asyncio.gather(*waiting)} == {1}
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


def test_what_goes_wrong_is_told_to_all_who_share_it_and_tried_again():
    async def scenario():
        answers = iter([None, Seen(1), Seen(2)])

        def see(_: str) -> Seen:
            answer = next(answers)
            if answer is None:
                raise RuntimeError("broken")
            return answer

        looked = Looks()
        every = [looked.at([(see, "a")]) for _ in range(4)]
        for told in await asyncio.gather(*every, return_exceptions=True):
            assert str(told) == "broken"
        for mark in (1, 2):
            await asyncio.sleep(SHARED_S)
            assert await looked.at([(see, "a")]) == [mark]

    asyncio.run(scenario())


def test_looks_that_nobody_can_share_are_let_go_of(monkeypatch):
    monkeypatch.setattr(looks, "_REMEMBERED", 10)
    monkeypatch.setattr(looks, "SHARED_S", 0.0)

    async def scenario():
        volume, looked = Volume(), Looks()
        for i in range(100):
            await at(looked, volume, f"path{i}")
            assert len(looked._latest) <= 10

    asyncio.run(scenario())


def test_the_loop_looks_at_local_files_itself_as_long_as_they_are(monkeypatch):
    monkeypatch.setattr(looks, "_local_devices", lambda: {1})

    async def scenario():
        volume, looked = Volume(), Looks()
        for times, device in enumerate((1, 1, 2, 2, 1, 1), 1):
            volume.device = device
            assert await at(looked, volume, "a", "a") == [times, times]
            await asyncio.sleep(SHARED_S)
        own = threading.current_thread().name
        return [thread == own for thread in volume.threads]

    assert asyncio.run(scenario()) == [False, True, True, False, False, True]


def test_who_cannot_wait_sees_what_needs_no_thread(monkeypatch):
    monkeypatch.setattr(looks, "_local_devices", lambda: {1})

    async def scenario():
        volume, looked = Volume("hung"), Looks()
        here, hung = (volume.see, "a"), (volume.see, "hung")
        assert looked.at_once([here]) is None  # nobody knows yet that it is local
        assert await looked.at([here]) == looked.at_once([here]) == [1]
        await asyncio.sleep(SHARED_S)
        assert looked.at_once([here]) == [2]
        assert looked.at_once([here, hung]) is None
        volume.hung["hung"].set()
        assert await looked.at([hung]) == [1]  # what was begun then

    asyncio.run(scenario())


def test_local_are_the_file_systems_that_are_listed(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        b"30 25 0:27 / /dev/sh\xffm rw - tmpfs tmpfs rw,size=24683656k\n"
        b"31 27 0:44 / /adapters rw,relatime shared:7 master:1 - nfs4 server:/adapters rw\n"
        b"32 27 0:45 / /bucket rw - fuse.s3fs s3fs rw\n"
        b"33 27 7:0 / /image ro - squashfs /dev/loop0 ro\n"
    )
    for path, local in (
        (mounts, {os.makedev(254, 0), os.makedev(0, 27), os.makedev(7, 0)}),
        (tmp_path / "none", set()),
    ):
        monkeypatch.setattr(looks, "_MOUNTS", path)
        assert READ_MOUNTS() == local
        assert looks.local_devices() == local - {os.makedev(7, 0)}, "no image's times are its own"

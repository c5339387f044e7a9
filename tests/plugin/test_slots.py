"""Admission: first come, first served, and nobody for ever."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lego.slots import Slots


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def slot(slots, name):
    if not slots.try_enter(name):
        await slots.stand_in_line(name)
    try:
        yield
    finally:
        slots.leave(name)


class Requests:
    """Requests that last until they are told to end."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.running: list[str] = []
        self._ends: dict[asyncio.Task[None], asyncio.Event] = {}

    async def start(self, name: str) -> asyncio.Task[None]:
        end = asyncio.Event()

        async def request() -> None:
            async with slot(self.slots, name):
                self.running.append(name)
                try:
                    await end.wait()
                finally:
                    self.running.remove(name)

        task = asyncio.create_task(request())
        self._ends[task] = end
        await settle()
        return task

    async def end(self, task: asyncio.Task[None]) -> None:
        self._ends[task].set()
        await task
        await settle()


def test_as_many_names_as_slots_and_the_rest_in_order():
    async def scenario():
        requests = Requests(Slots(2, 1.0, Clock()))
        a, b = await requests.start("a"), await requests.start("b")
        for name in ("c", "d", "c"):
            await requests.start(name)
        assert requests.running == ["a", "b"]
        await requests.end(b)
        assert requests.running == ["a", "c", "c"]
        await requests.end(a)
        assert requests.running == ["c", "c", "d"]

    asyncio.run(scenario())


def test_a_name_with_a_slot_admits_all_its_requests_while_nobody_waits():
    async def scenario():
        clock = Clock()
        requests = Requests(Slots(1, 1.0, clock))
        for clock.now in (0.0, 5.0, 10.0):
            await requests.start("a")
        assert requests.running == ["a"] * 3

    asyncio.run(scenario())


def test_steady_traffic_gives_way_after_its_quantum():
    async def scenario():
        clock = Clock()
        requests = Requests(Slots(1, 1.0, clock))
        first = await requests.start("a")
        waiting = await requests.start("b")
        clock.now = 0.9
        second = await requests.start("a")  # within its quantum
        assert requests.running == ["a", "a"]
        clock.now = 1.0
        third = await requests.start("a")  # beyond: in line behind b
        await requests.end(first)
        assert requests.running == ["a"]
        await requests.end(second)
        assert requests.running == ["b"]
        await requests.end(waiting)
        assert requests.running == ["a"]
        await requests.end(third)

    asyncio.run(scenario())


def test_only_as_many_give_way_as_names_wait():
    async def scenario():
        clock = Clock()
        requests = Requests(Slots(2, 1.0, clock))
        await requests.start("a")
        await requests.start("b")
        await requests.start("c")
        clock.now = 2.0
        await requests.start("b")
        assert requests.running == ["a", "b", "b"]

    asyncio.run(scenario())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_steady_traffic_on_all_slots_keeps_nobody_longer_than_the_bound(count):
    """Each busy name starts a request of 1 s every 0.1 s; others come in at 0.5 s."""

    async def scenario():
        clock, quantum, longest, tick = Clock(), 2.0, 1.0, 0.1
        slots = Slots(count, quantum, clock)
        ends: list[tuple[float, asyncio.Event]] = []
        admitted: dict[str, float] = {}

        async def request(name: str) -> None:
            async with slot(slots, name):
                admitted.setdefault(name, clock.now)
                end = asyncio.Event()
                ends.append((clock.now + longest, end))
                await end.wait()

        tasks = []
        others = [f"other{k}" for k in range(1, 6)]
        for step in range(300):
            clock.now = step * tick
            for _, end in [e for e in ends if e[0] <= clock.now]:
                end.set()
            names = [f"busy{i}" for i in range(count)] + (others if step == 5 else [])
            for name in names if step < 250 else ():
                tasks.append(asyncio.create_task(request(name)))  # noqa: PERF401
            await settle()
        waited = [admitted[name] - 5 * tick for name in others]
        for k, seconds in enumerate(waited, start=1):
            assert seconds <= -(-k // count) * (quantum + longest + tick)  # time moves in ticks
        assert max(waited) > 0
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("sec"), st.floats(0, 2))),
    st.integers(1, 3),
)
def test_whatever_happens_the_slots_are_kept_and_nobody_is_left(steps, count):
    async def scenario():
        clock = Clock()
        slots = Slots(count, 1.0, clock)
        requests = Requests(slots)
        tasks: list[asyncio.Task[None]] = []
        for name, step, seconds in steps:
            clock.now += seconds
            if step == "s" or not tasks:
                tasks.append(await requests.start(name))
            elif step == "e":
                requests._ends[tasks.pop(0)].set()
            else:
                tasks.pop().cancel()
            if seconds:  # without: in the same turn of the loop as the next step
                await settle()
                assert len(set(requests.running)) <= count
        while not all(task.done() for task in requests._ends):  # in line, and then running
            for end in requests._ends.values():
                end.set()
            await settle()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*requests._ends, return_exceptions=True)
        assert not requests.running
        assert slots.waiting() == 0
        assert not slots._admitted

    asyncio.run(scenario())


def test_one_cancelled_in_the_turn_in_which_it_is_admitted_takes_nothing_with_it():
    async def scenario():
        slots = Slots(1, 1.0)
        requests = Requests(slots)
        holder = await requests.start("a")
        gone, stays = await requests.start("b"), await requests.start("b")
        requests._ends[holder].set()  # it leaves before `gone` gets to know
        gone.cancel()
        await settle()
        assert requests.running == ["b"]
        requests._ends[stays].set()
        await settle()
        assert not slots._admitted

    asyncio.run(scenario())


def test_who_presses_gets_what_all_that_had_their_quantum_keep():
    async def scenario():
        clock = Clock()
        slots = Slots(2, 1.0, clock)
        requests = Requests(slots)
        first = await requests.start("a")
        clock.now = 2.0
        with slots.pressed():
            await requests.start("a")  # had its quantum: in line
            await requests.start("b")  # no new name, though there is a slot
            await settle()
            assert requests.running == ["a"]
            requests._ends[first].set()
            await settle()
            assert not slots._admitted  # now the room is free
        await settle()
        assert sorted(requests.running) == ["a", "b"]
        for end in requests._ends.values():
            end.set()
        await settle()

    asyncio.run(scenario())

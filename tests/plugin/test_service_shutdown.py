"""The end of a server. vLLM is played."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack

import pytest

from tests.plugin.played_vllm import holding, use
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import ShuttingDownError


def test_shutting_down_waits_for_what_was_taken_and_refuses_what_comes(start):
    """Those in line too: vLLM's scheduler does not know of them."""

    async def scenario():
        service, vllm = start()
        stopped = threading.Event()
        vllm.shutdown = lambda timeout: stopped.set()
        service._engine.before_shutdown(service.drain)
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            for names in ("ab", "ac", "ad", "ae"):  # as many as there are slots
                wanted = AdapterSet(dict.fromkeys(names, 1.0))
                await service.serve(wanted, stack, param="adapters")
            in_line = asyncio.create_task(use(service, "af"))
            while not service.slots.waiting():
                await asyncio.sleep(0.01)
            stopping = loop.run_in_executor(None, lambda: vllm.shutdown(timeout=60))
            while not service._closing:
                await asyncio.sleep(0.01)
            with pytest.raises(ShuttingDownError):
                await use(service, "bc")
            assert not stopped.is_set()
        assert (await in_line).result == "miss"
        await stopping
        assert stopped.is_set()

    asyncio.run(scenario())


def test_shutting_down_waits_no_longer_than_it_may(start):
    async def scenario():
        service, vllm = start()
        left: list[float] = []

        def shutdown(timeout: float) -> None:
            left.append(timeout)

        vllm.shutdown = shutdown
        service._engine.before_shutdown(service.drain)
        wanted = AdapterSet(dict.fromkeys("ab", 1.0))
        async with holding(service.serve, wanted, param="adapters"):
            await asyncio.to_thread(lambda: vllm.shutdown(timeout=0.1))
            assert left == [1]  # vLLM kills at once for 0

    asyncio.run(scenario())


def test_a_cancelled_server_asks_no_engine(start):
    """At its end the loop cancels all tasks; an engine that is gone would never answer."""

    async def scenario():
        service, vllm = start()

        async def silent(method: str, **_: object) -> None:
            asked.append(method)
            await asyncio.Event().wait()

        vllm.collective_rpc = silent
        asyncio.create_task(use(service, "ab"))  # noqa: RUF006
        while not asked:
            await asyncio.sleep(0.01)

    asked: list[str] = []
    asyncio.run(scenario())
    assert asked == ["lego_stage"]


def test_at_a_shutdown_single_adapters_are_refused_too(start):
    """Or steady traffic on one would keep the server from ever draining."""

    async def scenario():
        service, _ = start()
        async with holding(service.serve_native, "a"):
            draining = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDownError):
                await use(service, "a")
            async with holding(service.serve_native, "base"):
                pass
        await asyncio.wait_for(draining, 5)

    asyncio.run(scenario())

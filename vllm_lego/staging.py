"""The front end's side of staging: one call to the workers tells of all merges in progress.

The workers cannot call back: whatever waits in a worker's call holds up its engine. So they are
asked, in one call for all merges and at growing intervals, however many clients wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from vllm_lego.recipe import Recipe

Answer = dict[str, Any]
"""What one worker answers; see `StagingArea.stage`."""

_FIRST_POLL_S = 0.005
_SLOWEST_POLL_S = 0.02
_KEEPING_POLL_S = 0.1  # while nobody waits, but the metrics
_GROWTH = 1.25  # what a merge waits for the next question is a small part of what it took


class Stager:
    """Has merges staged on every worker.

    Args:
        ask: sends recipes to every worker and returns each one's answer.
        notice: called with every round of answers.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Recipe]], Awaitable[list[Answer]]],
        notice: Callable[[list[Answer]], None],
    ) -> None:
        self._ask = ask
        self._notice = notice
        self._waiting: dict[str, tuple[Recipe, asyncio.Future[list[Answer]]]] = {}
        self._news = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    async def staged(self, recipe: Recipe) -> list[Answer]:
        """Wait until every worker has a merge, or one of them says why not. One caller per merge.

        Returns:
            What each worker says of this merge.
        """
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting[recipe.merge_id] = recipe, future
        self._news.set()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(), name="lego-staging")
        try:
            return await future
        finally:
            self._waiting.pop(recipe.merge_id, None)

    async def refresh(self) -> None:
        """Notice how the workers' tiers are, while no merge tells."""
        self._notice(await self._ask([]))

    async def _poll(self) -> None:
        pause = _FIRST_POLL_S
        busy = False
        while self._waiting or busy:
            self._news.clear()
            asked = list(self._waiting.values())
            try:
                answers = await self._ask([recipe for recipe, _ in asked])
                self._notice(answers)
                told = [[answer["merges"][r.merge_id] for answer in answers] for r, _ in asked]
                busy = any(answer["busy"] for answer in answers)  # keeping what it has merged
            except Exception as error:  # noqa: BLE001  theirs who wait
                busy = False
                for recipe, future in asked:
                    self._waiting.pop(recipe.merge_id, None)
                    if not future.done():
                        future.set_exception(error)
                continue
            for (recipe, future), statuses in zip(asked, told, strict=True):
                states = {status["state"] for status in statuses}
                if not future.done() and (states == {"ready"} or "failed" in states):
                    future.set_result(statuses)
                    self._waiting.pop(recipe.merge_id, None)
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._news.wait(), pause if self._waiting else _KEEPING_POLL_S
                )
                pause = _FIRST_POLL_S
                continue
            pause = min(pause * _GROWTH, _SLOWEST_POLL_S)

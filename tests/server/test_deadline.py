"""A limit on one wait after another, with one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from server.deadline import Deadline


def run(test: Callable[[Deadline], Awaitable[None]]) -> None:
    async def main() -> None:
        with closing(Deadline()) as deadline:
            await test(deadline)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_wait_that_is_too_long_is_a_timeout_and_the_task_goes_on() -> None:
    async def test(deadline: Deadline) -> None:
        for seconds in (0.05, 0.02, 0.05):
            with pytest.raises(TimeoutError), deadline.within(seconds):
                await asyncio.sleep(5)
            task = asyncio.current_task()
            assert task is not None and not task.cancelling()
        with deadline.within(1):
            await asyncio.sleep(0.1)

    run(test)


def test_the_end_is_moved_while_it_is_waited() -> None:
    async def test(deadline: Deadline) -> None:
        with deadline.within(0.1):
            for _ in range(4):
                await asyncio.sleep(0.06)
                deadline.within(0.1)
        with pytest.raises(TimeoutError), deadline.within(60):
            deadline.within(0.05)  # nearer than the timer that is set
            await asyncio.sleep(5)

    run(test)


def test_nothing_is_cut_between_two_waits() -> None:
    async def test(deadline: Deadline) -> None:
        with deadline.within(0.02):
            pass
        await asyncio.sleep(0.06)
        with deadline.within(0.1):
            await asyncio.sleep(0.06)

    run(test)


def test_cancelling_from_outside_is_no_timeout() -> None:
    async def test(_: Deadline) -> None:
        async def work(seconds: float) -> None:
            with closing(Deadline()) as deadline, deadline.within(seconds):
                await asyncio.sleep(5)

        task = asyncio.create_task(work(1))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        both = asyncio.create_task(work(0.0))  # late, and cancelled before it could say so
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both

    run(test)


def test_an_error_of_the_work_stays_what_it_is() -> None:
    async def test(deadline: Deadline) -> None:
        with pytest.raises(KeyError), deadline.within(1):
            raise KeyError

    run(test)

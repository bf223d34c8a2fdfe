"""Calls from one event loop to another: carried over, cancelled, and ended when the other loop ends."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.support.waiting import until

from broadcache.shared.process.loops import (
    Home,
    LoopUnavailable,
    awaited_on,
    end_task,
    is_in_event_loop,
    on_loop,
    result_from,
)

pytestmark = pytest.mark.anyio


class OtherLoop:
    """An event loop that runs in a thread until it is told to end."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        """End as `asyncio.run` does: cancel all tasks, and close the loop."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.close()


@pytest.fixture
def other() -> Iterator[OtherLoop]:
    with another_loop() as loop:
        yield loop


@contextmanager
def another_loop() -> Iterator[OtherLoop]:
    other = OtherLoop()
    try:
        yield other
    finally:
        other.end()


async def loop_of_this() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def failing() -> None:
    raise KeyError("theirs")


async def test_work_is_done_on_the_other_loop_and_its_result_and_errors_arrive_here(other: OtherLoop) -> None:
    assert await awaited_on(other.loop, loop_of_this) is other.loop
    assert await on_loop(other.loop, loop_of_this) is other.loop
    assert await on_loop(None, loop_of_this) is asyncio.get_running_loop()
    with pytest.raises(KeyError, match="theirs"):
        await awaited_on(other.loop, failing)
    assert result_from(other.loop, loop_of_this) is other.loop
    with pytest.raises(KeyError, match="theirs"):
        result_from(other.loop, failing)


async def test_a_cancellation_is_passed_on(other: OtherLoop) -> None:
    has_begun, was_cancelled = threading.Event(), threading.Event()

    async def wait_for_ever() -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    call = asyncio.create_task(awaited_on(other.loop, wait_for_ever))
    await until(has_begun.is_set, "the work")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(was_cancelled.is_set, "the cancellation")


async def test_a_loop_that_ends_during_the_call_ends_the_call(other: OtherLoop) -> None:
    has_begun = threading.Event()

    async def wait_for_ever() -> None:
        has_begun.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(awaited_on(other.loop, wait_for_ever))
    in_thread = asyncio.create_task(asyncio.to_thread(result_from, other.loop, wait_for_ever))
    await until(has_begun.is_set, "the work")
    await asyncio.to_thread(other.end)
    for ended in (call, in_thread):
        with pytest.raises(LoopUnavailable, match="ended"):
            await ended
    with pytest.raises(LoopUnavailable, match="ended"):
        await awaited_on(other.loop, wait_for_ever)
    with pytest.raises(LoopUnavailable, match="ended"):
        result_from(other.loop, wait_for_ever)


async def test_a_loop_that_is_not_running_any_more_is_detected_although_it_never_answers() -> None:
    paused = asyncio.new_event_loop()
    try:
        with pytest.raises(LoopUnavailable, match="ended"):
            await awaited_on(paused, loop_of_this)
        with pytest.raises(LoopUnavailable, match="ended"):
            result_from(paused, loop_of_this)
    finally:
        # It may run again: the calls that were given up do nothing.
        await asyncio.to_thread(paused.run_until_complete, loop_of_this())
        paused.close()


async def test_a_blocked_loop_is_given_up(other: OtherLoop) -> None:
    unblock = threading.Event()
    other.loop.call_soon_threadsafe(unblock.wait)
    try:
        with pytest.raises(LoopUnavailable, match="blocked"):
            await awaited_on(other.loop, loop_of_this, begin_seconds=0.3)
        with pytest.raises(LoopUnavailable, match="blocked"):
            result_from(other.loop, loop_of_this, timeout_seconds=0.3)
    finally:
        unblock.set()


async def test_a_task_is_ended_from_any_loop(other: OtherLoop) -> None:
    async def start() -> "asyncio.Task[bool]":
        return asyncio.create_task(asyncio.Event().wait())

    task = await awaited_on(other.loop, start)
    await end_task(task)
    assert task.cancelled()
    await end_task(task)
    here = asyncio.create_task(asyncio.Event().wait())
    await end_task(here)
    assert here.cancelled()


async def test_a_thread_without_a_loop_is_in_none(other: OtherLoop) -> None:
    assert is_in_event_loop()
    assert not await asyncio.to_thread(is_in_event_loop)


class Resource:
    """Something that belongs to one event loop at a time."""

    def __init__(self) -> None:
        self.moves = 0
        self.has_arrived = False
        self.home = Home(self.move, begin_seconds=5.0)

    def move(self) -> Coroutine[Any, Any, None]:
        self.moves += 1
        return self.arrive()

    async def arrive(self) -> None:
        await asyncio.sleep(0)
        self.has_arrived = True


async def test_an_object_stays_on_its_loop_while_that_runs_and_then_moves() -> None:
    resource = Resource()
    with another_loop() as other:
        assert await awaited_on(other.loop, lambda: resource.home.run(loop_of_this)) is other.loop
        assert await resource.home.run(loop_of_this) is other.loop
        assert not resource.home.is_here
        assert resource.moves == 0
    assert await resource.home.run(loop_of_this) is asyncio.get_running_loop()
    assert (resource.home.is_here, resource.moves, resource.has_arrived) == (True, 1, True)


async def test_work_whose_loop_ends_is_done_again_here() -> None:
    resource, has_begun = Resource(), threading.Event()
    here = asyncio.get_running_loop()

    async def work() -> str:
        if asyncio.get_running_loop() is here:
            return "here"
        has_begun.set()
        await asyncio.Event().wait()
        return "there"

    with another_loop() as other:
        await awaited_on(other.loop, lambda: resource.home.run(loop_of_this))
        call = asyncio.create_task(resource.home.run(work))
        await until(has_begun.is_set, "the work")
    assert await call == "here"


async def test_an_object_that_has_left_moves_without_anything_to_drop() -> None:
    resource = Resource()
    with another_loop() as other:
        await awaited_on(other.loop, lambda: resource.home.run(loop_of_this))
        resource.home.leave()
        assert await resource.home.run(loop_of_this) is asyncio.get_running_loop()
    assert resource.moves == 0

"""Waiting for a condition: no sleep decides a test, only the condition, or the end of patience."""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Callable

from redis.exceptions import RedisError

PATIENCE_SECONDS = 20.0
_SERVERS_PATIENCE_SECONDS = 30.0


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Return as soon as `condition()`, or what it awaits, is true; fail when it never is."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await _value_of(condition()):
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true in {PATIENCE_SECONDS:g} s") from None


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Like `until`, without an event loop. A server that does not answer yet is asked again."""
    deadline = time.monotonic() + _SERVERS_PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(RedisError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come in {_SERVERS_PATIENCE_SECONDS:g} s")


async def _value_of(result: object) -> object:
    return await result if inspect.isawaitable(result) else result

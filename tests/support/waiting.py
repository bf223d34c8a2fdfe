"""Waiting for what must become true: no sleep decides a test, only a condition, or the end of patience."""

import asyncio
from collections.abc import Callable

PATIENCE_SECONDS = 20.0


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Return as soon as `condition()` is true; fail when it never is."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true in {PATIENCE_SECONDS:g} s") from None

"""What asyncio does not tell in one word."""

import asyncio

__all__ = ["is_cancelled"]


def is_cancelled() -> bool:
    """Whether the caller itself is being cancelled, and not just something that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

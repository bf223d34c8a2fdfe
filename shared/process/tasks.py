"""asyncio helpers."""

import asyncio

__all__ = ["is_cancelled"]


def is_cancelled() -> bool:
    """Whether the current task is being cancelled, and not just an operation that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

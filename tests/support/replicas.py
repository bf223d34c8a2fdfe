"""What the tests of several servers put into caches, and expect of them."""

from typing import Any

from cachetools import TTLCache
from tests.support.waiting import until

from broadcache.shared import Receipt
from broadcache.subscriber import LocalCache, Subscriber

FAST: dict[str, Any] = {
    "echo_interval_seconds": 0.05,
    "echo_timeout_seconds": 0.5,
    "connect_timeout_seconds": 2.0,
    "backoff_seconds_max": 0.1,
    "start_timeout_seconds": 10.0,
}

"""Numbers for tests: an answer is asked for often, and a start waits for it."""
FAST_START: dict[str, Any] = {**FAST, "start_timeout_seconds": 0}
"""The same, and a start waits for nothing."""


def new_cache(**options: Any) -> LocalCache:
    return LocalCache(TTLCache(maxsize=1_000, ttl=600), **options)


def fill(cache: LocalCache, *keys: str) -> None:
    for key in keys:
        assert cache.store(cache.begin_load(key), "old")


async def reached(subscriber: Subscriber, receipt: Receipt) -> None:
    """Wait until the invalidation has been applied, or is covered by a clear, and the caches are coherent."""
    await until(
        lambda: subscriber.state == "coherent" and subscriber.position(receipt.namespace) == receipt.position,
        f"position {receipt.position}",
    )

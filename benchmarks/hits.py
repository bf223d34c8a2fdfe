"""The cost of a hit: a read of an entry that is cached and may be served.

All contestants hold the same 100,000 entries, and are asked for the same 10,000 keys in the same shuffled order, in a
plain loop; the loop is part of every figure. What is a coroutine is awaited in that loop, without an event loop's help.
`get_or_load` is handed a new lambda each time, as in real use.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import cachetools
from async_lru import alru_cache
from cachetools import TTLCache

from benchmarks.harness import Effort, Limit, Row, compare, take_turns
from broadcache.shared.clock import monotonic
from broadcache.subscriber import LocalCache

ENTRIES: Final = 100_000
_TTL_SECONDS: Final = 3_600


def run(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 20)
    repeats = effort.pick(full=5, quick=1)
    keys = [f"product:{number}" for number in range(entries)]
    asked = random.Random(2).sample(keys, entries // 10) * repeats
    contestants = {
        "get": _get(keys, asked),
        "get_or_load": _get_or_load(keys, asked),
        "get_or_load_sync": _get_or_load_sync(keys, asked),
        "TTLCache": _ttl_cache(keys, asked),
        "cached": _cached(keys, asked),
        "async_lru": _async_lru(keys, asked),
    }
    nanoseconds = take_turns(contestants, rounds=effort.pick(full=15, quick=2))

    def row(ours: str, peer_name: str, peer: str, limit: Limit | None = None) -> Row:
        return compare(f"hit, {ours}", nanoseconds[ours], peer_name, nanoseconds[peer], unit="ns", limit=limit)

    cheaper = Limit("<", 1.0)
    return [
        row("get", "TTLCache[k]", "TTLCache", Limit("≤", 1.3)),
        row("get_or_load", "cachetools.cached(lock=RLock())", "cached", cheaper),
        row("get_or_load_sync", "cachetools.cached(lock=RLock())", "cached", cheaper),
        row("get_or_load", "async_lru.alru_cache(ttl=)", "async_lru"),
        row("get_or_load", "TTLCache[k]", "TTLCache"),
    ]


def _local_cache(keys: list[str]) -> LocalCache:
    cache = LocalCache(TTLCache(maxsize=len(keys), ttl=_TTL_SECONDS), max_staleness_seconds=_TTL_SECONDS)
    cache.confirm_coherent(monotonic())
    for number, key in enumerate(keys):
        cache.store(cache.begin_load(key), number)
    return cache


def _per_call(asked: list[str], began_ns: int) -> float:
    # CPU time of this thread: time taken by other processes is not counted.
    return (time.thread_time_ns() - began_ns) / len(asked)


def _get(keys: list[str], asked: list[str]) -> Callable[[], float]:
    cache = _local_cache(keys)

    def measure() -> float:
        get = cache.get
        began_ns = time.thread_time_ns()
        for key in asked:
            get(key)
        return _per_call(asked, began_ns)

    return measure


def _get_or_load(keys: list[str], asked: list[str]) -> Callable[[], float]:
    cache = _local_cache(keys)

    async def measure() -> float:
        get_or_load = cache.get_or_load
        began_ns = time.thread_time_ns()
        for key in asked:
            await get_or_load(key, lambda: _load(key))  # noqa: B023  (never called: every read is a hit)
        return _per_call(asked, began_ns)

    return lambda: asyncio.run(measure())


def _get_or_load_sync(keys: list[str], asked: list[str]) -> Callable[[], float]:
    cache = _local_cache(keys)

    def measure() -> float:
        get_or_load_sync = cache.get_or_load_sync
        began_ns = time.thread_time_ns()
        for key in asked:
            get_or_load_sync(key, lambda: _load_sync(key))  # noqa: B023  (the same)
        return _per_call(asked, began_ns)

    return measure


def _ttl_cache(keys: list[str], asked: list[str]) -> Callable[[], float]:
    cache: TTLCache[str, int] = TTLCache(maxsize=len(keys), ttl=_TTL_SECONDS)
    for number, key in enumerate(keys):
        cache[key] = number

    def measure() -> float:
        began_ns = time.thread_time_ns()
        for key in asked:
            cache[key]
        return _per_call(asked, began_ns)

    return measure


def _cached(keys: list[str], asked: list[str]) -> Callable[[], float]:
    store: TTLCache[object, int] = TTLCache(maxsize=len(keys), ttl=_TTL_SECONDS)
    load = cachetools.cached(store, lock=threading.RLock())(len)
    for key in keys:
        load(key)

    def measure() -> float:
        began_ns = time.thread_time_ns()
        for key in asked:
            load(key)
        return _per_call(asked, began_ns)

    return measure


def _async_lru(keys: list[str], asked: list[str]) -> Callable[[], float]:
    loop = asyncio.new_event_loop()  # its timers, one for each entry, belong to the loop that filled it
    load = alru_cache(maxsize=len(keys), ttl=_TTL_SECONDS)(_load)

    async def fill() -> None:
        for key in keys:
            await load(key)

    async def measure() -> float:
        began_ns = time.thread_time_ns()
        for key in asked:
            await load(key)
        return _per_call(asked, began_ns)

    loop.run_until_complete(fill())
    return lambda: loop.run_until_complete(measure())


async def _load(key: str) -> int:
    return len(key)


def _load_sync(key: str) -> int:
    return len(key)

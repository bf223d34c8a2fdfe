"""The cost of a hit: a read of an entry that is cached and may be served.

All contestants hold the same 100,000 entries, and are asked for the same 10,000 keys in the same shuffled order, in a
plain loop; the loop is part of every figure. Once more with 2,000 entries, all of which are asked for: they fit into
the processor's cache. What is a coroutine is awaited in that loop, without an event loop's help. `get_or_load` is
handed a new lambda each time, as in real use. `@cached` makes a key of a number each time; its peers are given a
string.

With threads, eight of them read as fast as they can for a while, and one stores an entry a thousand times a second:
hits in wall time, because the threads share the interpreter's lock, and waiting for another lock is what is compared.
"""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import cachetools
from async_lru import alru_cache
from cachetools import TTLCache
from cachetools.keys import hashkey

from benchmarks.harness import Effort, Limit, Row, compare, take_turns
from broadcache.shared.clock import monotonic
from broadcache.subscriber import LocalCache

ENTRIES: Final = 100_000
FEW_ENTRIES: Final = 2_000
_READS_A_ROUND: Final = 50_000
_TTL_SECONDS: Final = 3_600
_THREADS: Final = 8
_SECONDS_OF_THREADS: Final = 1.0
_STORES_A_SECOND: Final = 1_000


def run(effort: Effort) -> list[Row]:
    return [
        *_rows(effort.pick(full=ENTRIES, quick=ENTRIES // 20), 10, effort),
        *_rows(FEW_ENTRIES, 1, effort),
        *_rows_of_threads(effort),
    ]


def _rows(entries: int, one_in: int, effort: Effort) -> list[Row]:
    """Compare the reads of one key in so many."""
    keys = [f"product:{number}" for number in range(entries)]
    chosen = random.Random(2).sample(keys, entries // one_in)
    asked = chosen * effort.pick(full=_READS_A_ROUND // len(chosen), quick=1)
    contestants = {
        "get": _get(keys, asked),
        "get_or_load": _get_or_load(keys, asked),
        "get_or_load_sync": _get_or_load_sync(keys, asked),
        "@cached": _our_cached(keys, asked),
        "@cached async": _our_cached_async(keys, asked),
        "TTLCache": _ttl_cache(keys, asked),
        "cached": _cached(keys, asked),
        "async_lru": _async_lru(keys, asked),
    }
    nanoseconds = take_turns(contestants, rounds=effort.pick(full=15, quick=2))

    def row(ours: str, peer_name: str, peer: str, limit: Limit | None = None) -> Row:
        what = f"hit of {entries:,}, {ours}"
        return compare(what, nanoseconds[ours], peer_name, nanoseconds[peer], unit="ns", limit=limit)

    return [
        row("get", "TTLCache[k]", "TTLCache", Limit("≤", 0.65)),
        row("get_or_load", "async_lru.alru_cache(ttl=)", "async_lru", Limit("≤", 0.7)),
        row("get_or_load_sync", "cachetools.cached(lock=RLock())", "cached", Limit("≤", 0.5)),
        row("@cached", "cachetools.cached(lock=RLock())", "cached", Limit("≤", 1.0)),
        row("@cached async", "async_lru.alru_cache(ttl=)", "async_lru", Limit("≤", 1.0)),
        row("get_or_load", "TTLCache[k]", "TTLCache"),
    ]


def _rows_of_threads(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 20)
    seconds = _SECONDS_OF_THREADS if not effort.is_quick else 0.1
    keys = [f"product:{number}" for number in range(entries)]
    cache = _local_cache(keys)
    bare: TTLCache[object, int] = TTLCache(maxsize=entries, ttl=_TTL_SECONDS)
    lock = threading.RLock()
    load = cachetools.cached(bare, lock=lock)(len)
    for key in keys:
        load(key)

    def store_in_bare(key: str) -> None:
        with lock:
            bare[hashkey(key)] = 1

    hits = take_turns(
        {
            "ours": lambda: _hits_a_second(
                lambda key: cache.get_or_load_sync(key, lambda: _load_sync(key)),
                lambda key: cache.store(cache.begin_load(key), 1),
                keys,
                seconds,
            ),
            "cached": lambda: _hits_a_second(load, store_in_bare, keys, seconds),
        },
        rounds=effort.pick(full=7, quick=1),
    )
    return [
        compare(
            f"hits, {_THREADS} threads and a writer",
            hits["ours"],
            "cachetools.cached(lock=RLock())",
            hits["cached"],
            unit="/s",
            measure="wall",
            limit=Limit("≥", 1.5),
        )
    ]


def _hits_a_second(
    read: Callable[[str], object], store: Callable[[str], object], keys: list[str], seconds: float
) -> float:
    """Return how many reads all threads together finish in a second."""
    counts: list[int] = []
    is_over = threading.Event()
    is_stopped = is_over.is_set
    start = threading.Barrier(_THREADS + 2)

    def reads(seed: int) -> None:
        asked = random.Random(seed).sample(keys, len(keys) // 10)
        finished = 0
        start.wait()
        while not is_stopped():
            for key in asked[:100]:
                read(key)
            asked = asked[100:] + asked[:100]
            finished += 100
        counts.append(finished)

    def writes() -> None:
        written = itertools.cycle(keys)
        start.wait()
        while not is_over.wait(1 / _STORES_A_SECOND):
            store(next(written))

    threads = [threading.Thread(target=reads, args=[seed]) for seed in range(_THREADS)]
    threads.append(threading.Thread(target=writes))
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    is_over.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


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


def _our_cached(keys: list[str], asked: list[str]) -> Callable[[], float]:
    load = _local_cache(keys).cached("product:{number}")(_load_number_sync)
    numbers = _numbers_of(asked)

    def measure() -> float:
        began_ns = time.thread_time_ns()
        for number in numbers:
            load(number)
        return _per_call(asked, began_ns)

    return measure


def _our_cached_async(keys: list[str], asked: list[str]) -> Callable[[], float]:
    load = _local_cache(keys).cached("product:{number}")(_load_number)
    numbers = _numbers_of(asked)

    async def measure() -> float:
        began_ns = time.thread_time_ns()
        for number in numbers:
            await load(number)
        return _per_call(asked, began_ns)

    return lambda: asyncio.run(measure())


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


def _numbers_of(keys: list[str]) -> list[int]:
    return [int(key.removeprefix("product:")) for key in keys]


async def _load_number(number: int) -> int:
    return number


def _load_number_sync(number: int) -> int:
    return number


async def _load(key: str) -> int:
    return len(key)


def _load_sync(key: str) -> int:
    return len(key)

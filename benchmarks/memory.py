"""The memory of 100,000 untagged entries: a LocalCache over a TTLCache compared with the bare TTLCache.

Each is filled in a fresh interpreter. The entries have keys such as `product:42` and all the same value, so that only
the caches' bookkeeping and the keys are compared: with values of any size the ratio is lower. Traced is the memory
requested from Python's allocator; resident is the growth of the process.
"""

import gc
import resource
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, NamedTuple

from cachetools import TTLCache

from benchmarks.harness import Effort, Limit, Row, answer, child, compare
from broadcache.shared.clock import monotonic
from broadcache.subscriber import LocalCache

ENTRIES: Final = 100_000
_TTL_SECONDS: Final = 3_600
_MEGABYTE: Final = 1_000_000
_STATM: Final = Path("/proc/self/statm")


class Size(NamedTuple):
    """The memory that filling a cache took, in bytes."""

    traced: int
    resident: int


def run(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 10)
    rounds = effort.pick(full=3, quick=1)
    ours = [_size_of(fill_local_cache, entries) for _ in range(rounds)]
    bare = [_size_of(fill_ttl_cache, entries) for _ in range(rounds)]

    def row(kind: str, mine: list[int], theirs: list[int], limit: Limit | None = None) -> Row:
        return compare(
            f"{entries:,} entries, {kind}",
            [each / _MEGABYTE for each in mine],
            "bare TTLCache",
            [each / _MEGABYTE for each in theirs],
            unit="MB",
            measure="memory",
            limit=limit,
        )

    rows = [row("traced", [each.traced for each in ours], [each.traced for each in bare], Limit("≤", 1.25))]
    if _STATM.exists():
        rows.append(row("resident", [each.resident for each in ours], [each.resident for each in bare]))
    return rows


def _size_of(fill: Callable[[int], object], entries: int) -> Size:
    return Size(_measured(fill, entries, is_traced=True), _measured(fill, entries, is_traced=False))


def _measured(fill: Callable[[int], object], entries: int, *, is_traced: bool) -> int:
    # Tracing itself takes memory: the two are never measured in one process.
    with child(measure, fill, entries, is_traced) as pipe:
        size_bytes: int = answer(pipe)
    return size_bytes


def measure(pipe: Connection, fill: Callable[[int], object], entries: int, is_traced: bool) -> None:
    if is_traced:
        tracemalloc.start()
    fill(10)  # allocations that happen only once
    gc.collect()
    before = _traced_bytes() if is_traced else _resident_bytes()
    filled = fill(entries)
    gc.collect()
    pipe.send((_traced_bytes() if is_traced else _resident_bytes()) - before)
    del filled


def fill_local_cache(entries: int) -> object:
    cache = LocalCache(TTLCache(maxsize=entries, ttl=_TTL_SECONDS))
    cache.confirm_coherent(monotonic())
    for number in range(entries):
        cache.store(cache.begin_load(f"product:{number}"), 1)
    return cache


def fill_ttl_cache(entries: int) -> object:
    cache: TTLCache[str, int] = TTLCache(maxsize=entries, ttl=_TTL_SECONDS)
    for number in range(entries):
        cache[f"product:{number}"] = 1
    return cache


def _traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * resource.getpagesize() if _STATM.exists() else 0

"""How long the event loop is held when a prefix, a tag or everything drops 100,000 entries, or only counts them.

A real Publisher and Subscriber share a loop with a ticker, a task that only reschedules itself. The longest time
between two of its turns, from before the publish until the sweep has freed all memory, is how long any other task of
the process would have waited. Ten of the entries are read as soon as the invalidation has been applied: none may be
served. The peer is the naive way on a bare TTLCache: find the matching entries and delete them, in one go. A dry run is
a question and its answer, over the same server; its peer counts the matching entries.

Two more need no server. 200,000 entries expire at the same moment, and a store, a read and all that shows the size
follow, one after the other, until the memory is free; a bare TTLCache does that within its next `len`. And a value of a
million parts is asked for its fingerprint; the peer encodes and hashes it.

CPU time of the thread measures our code; wall time includes other activity of the machine, so the same ticker on an
idle loop, for the same time, is shown as the floor.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import msgspec
from cachetools import Cache, TTLCache

from benchmarks.harness import Effort, Limit, Row, compare
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Everything, Keys, Prefixes, Tags, Target
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

ENTRIES: Final = 100_000
_NAMESPACE: Final = "products"
_TTL_SECONDS: Final = 3_600
_TIMEOUT_SECONDS: Final = 60.0
_TARGETS: Final[dict[str, Target]] = {
    "prefix": Prefixes("product:"),
    "tag": Tags("catalogue"),
    "everything": Everything(),
}
_MILLISECONDS: Final = 1_000


class Held(NamedTuple):
    """The longest time the loop was held, in seconds."""

    wall: float
    cpu: float


class Way(NamedTuple):
    """One operation on all matching entries: ours, on the loop, and the naive one, in one go."""

    name: str
    hold: Callable[[str, Target, str, int], Coroutine[Any, Any, tuple[Held, float]]]
    peer: str
    act: Callable[[TTLCache[str, int], list[str]], None]


def run(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 10)
    rounds = effort.pick(full=5, quick=1)
    rows: list[Row] = []
    with EmbeddedServer() as server:
        for way in (_DROPPING, _COUNTING):
            for kind, target in _TARGETS.items():
                turns = [_take_turns(way, server.url, target, kind, entries) for _ in range(rounds)]
                ours, naive, idle = (list(held) for held in zip(*turns, strict=True))
                rows += _rows(f"{way.name}{kind} of {entries:,}, loop held", way.peer, ours, naive, idle)
    for what, peer, ours_of, naive_of in (
        (f"{2 * entries:,} expire at once, loop held", "len(TTLCache)", _held_by_expiry, _held_by_len),
        (
            f"fingerprint of {10 * entries:,} parts, loop held",
            "msgspec and BLAKE2b",
            _held_by_fingerprint,
            _held_by_hash,
        ),
    ):
        ours = [asyncio.run(ours_of(entries)) for _ in range(rounds)]
        idle = [asyncio.run(_held_by_nothing(0.5)) for _ in range(rounds)]
        rows += _rows(what, peer, ours, [naive_of(entries) for _ in range(rounds)], idle)
    return rows


def _take_turns(way: Way, url: str, target: Target, kind: str, entries: int) -> tuple[Held, Held, Held]:
    """Return how long our way, the naive way, and an idle loop held the loop."""
    ours, seconds = asyncio.run(way.hold(url, target, kind, entries))
    return ours, _held_by_scan(kind, entries, way.act), asyncio.run(_held_by_nothing(seconds))


def _rows(what: str, peer: str, ours: list[Held], naive: list[Held], idle: list[Held]) -> list[Row]:
    def milliseconds(held: list[Held], attribute: str) -> list[float]:
        return [getattr(each, attribute) * _MILLISECONDS for each in held]

    return [
        compare(
            what,
            milliseconds(ours, "cpu"),
            peer,
            milliseconds(naive, "cpu"),
            unit="ms",
            limit=Limit("<", 2.0, of="ours"),
        ),
        compare(
            what, milliseconds(ours, "wall"), "idle loop (floor)", milliseconds(idle, "wall"), unit="ms", measure="wall"
        ),
    ]


async def _held_by_us(url: str, target: Target, kind: str, entries: int) -> tuple[Held, float]:
    """Return the longest hold, and how many seconds publish and sweep took altogether."""
    async with _filled(url, kind, entries) as (publisher, subscriber, cache):
        before = await publisher.head(_NAMESPACE)  # connects before the measurement
        began = time.perf_counter()
        publishing = asyncio.create_task(publisher.publish(target, namespace=_NAMESPACE))
        ticker = Ticker()
        while subscriber.position(_NAMESPACE) == before:
            await ticker.turn()
        if any(cache.get(f"product:{number}") is not None for number in range(0, entries, entries // 10)):
            raise RuntimeError(f"expected no entry to be served after {target}, got one")
        while cache.has_sweep_work:
            await ticker.turn()
        await publishing
        if cache.stats().entries:
            raise RuntimeError(f"expected the sweep to remove all entries, got {cache.stats()}")
        return ticker.longest, time.perf_counter() - began


async def _held_by_a_dry_run(url: str, target: Target, kind: str, entries: int) -> tuple[Held, float]:
    """Return the longest hold, and how many seconds the question and its answer took altogether."""
    async with _filled(url, kind, entries) as (publisher, _, _):
        await publisher.preview(Keys("none"), namespace=_NAMESPACE)  # connects before the measurement
        began = time.perf_counter()
        asking = asyncio.create_task(publisher.preview(target, namespace=_NAMESPACE))
        ticker = Ticker()
        while not asking.done():
            await ticker.turn()
        preview = await asking
        if preview.entries != entries:
            raise RuntimeError(f"expected {target} to name all {entries:,} entries, got {preview}")
        return ticker.longest, time.perf_counter() - began


@asynccontextmanager
async def _filled(url: str, kind: str, entries: int) -> AsyncIterator[tuple[Publisher, Subscriber, LocalCache]]:
    """A publisher, and a replica whose cache is full."""
    cache = LocalCache(TTLCache(maxsize=entries, ttl=_TTL_SECONDS))
    async with (
        asyncio.timeout(_TIMEOUT_SECONDS),
        Publisher(url) as publisher,
        Subscriber(url, caches={_NAMESPACE: cache}) as subscriber,
    ):
        tags = ("catalogue",) if kind == "tag" else ()
        for number in range(entries):
            cache.store(cache.begin_load(f"product:{number}"), number, tags=tags)
            if not number % 1_000:
                await asyncio.sleep(0)
        yield publisher, subscriber, cache


class MovableClock:
    """The real time, which can be moved forward."""

    def __init__(self) -> None:
        self.ahead_by = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_by


async def _held_by_expiry(entries: int) -> Held:
    clock = MovableClock()
    mapping: TTLCache[str, int] = TTLCache(maxsize=2 * entries, ttl=_TTL_SECONDS, timer=clock)
    cache = LocalCache(mapping, clock=clock, max_staleness_seconds=10 * _TTL_SECONDS)
    cache.confirm_coherent(clock())
    for number in range(2 * entries):
        cache.store(cache.begin_load(f"product:{number}"), number)
    clock.ahead_by = 2 * _TTL_SECONDS
    ticker = Ticker()
    await ticker.turn()
    for act in (
        lambda: cache.store(cache.begin_load("new"), 1),
        lambda: cache.get("product:1"),
        cache.stats,
        lambda: cache.currsize,
        lambda: repr(cache),
    ):
        act()
        await ticker.turn()
    while cache.has_sweep_work:
        cache.sweep()
        await ticker.turn()
    if (len(cache), Cache.__len__(mapping)) != (1, 1):
        raise RuntimeError(f"expected all but one entry to be removed, got {cache.stats()}")
    return ticker.longest


def _held_by_len(entries: int) -> Held:
    clock = MovableClock()
    mapping: TTLCache[str, int] = TTLCache(maxsize=2 * entries, ttl=_TTL_SECONDS, timer=clock)
    for number in range(2 * entries):
        mapping[f"product:{number}"] = number
    clock.ahead_by = 2 * _TTL_SECONDS
    return _held_by(lambda: len(mapping))


async def _held_by_fingerprint(entries: int) -> Held:
    cache = LocalCache({})
    cache.confirm_coherent(cache.clock() + _TTL_SECONDS)
    cache.store(cache.begin_load("large"), list(range(10 * entries)))
    cache.store(cache.begin_load("allowed"), list(range(1_900)))
    ticker = Ticker()
    await ticker.turn()
    for key in ("large", "allowed"):
        cache.fingerprint(key)
        await ticker.turn()
    return ticker.longest


def _held_by_hash(entries: int) -> Held:
    value = list(range(10 * entries))
    return _held_by(lambda: hashlib.blake2b(msgspec.json.encode(value, order="deterministic")).digest())


def _held_by(act: Callable[[], object]) -> Held:
    wall, cpu = time.perf_counter(), time.thread_time()
    act()
    return Held(time.perf_counter() - wall, time.thread_time() - cpu)


async def _held_by_nothing(seconds: float) -> Held:
    ticker = Ticker()
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        await ticker.turn()
    return ticker.longest


class Ticker:
    """Takes turns on the event loop, and records the longest time between two."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()
        self.longest = Held(0.0, 0.0)

    async def turn(self) -> None:
        await asyncio.sleep(0)
        wall, cpu = time.perf_counter(), time.thread_time()
        self.longest = Held(max(self.longest.wall, wall - self._wall), max(self.longest.cpu, cpu - self._cpu))
        self._wall, self._cpu = wall, cpu


def _held_by_scan(kind: str, entries: int, act: Callable[[TTLCache[str, int], list[str]], None]) -> Held:
    cache: TTLCache[str, int] = TTLCache(maxsize=entries, ttl=_TTL_SECONDS)
    for number in range(entries):
        cache[f"product:{number}"] = number
    keys_of_tag = {"catalogue": set(cache)}
    scans: dict[str, Callable[[], list[str]]] = {
        "prefix": lambda: [key for key in cache if key.startswith("product:")],
        "tag": lambda: list(keys_of_tag.pop("catalogue")),
        "everything": lambda: list(cache),
    }
    return _held_by(lambda: act(cache, scans[kind]()))


def _delete(cache: TTLCache[str, int], keys: list[str]) -> None:
    for key in keys:
        del cache[key]


def _count(cache: TTLCache[str, int], keys: list[str]) -> None:
    if sum(1 for key in keys if key in cache) != len(cache):
        raise RuntimeError("expected all entries to match")


_DROPPING: Final = Way("", _held_by_us, "scan and delete, TTLCache", _delete)
_COUNTING: Final = Way("dry run, ", _held_by_a_dry_run, "scan and count, TTLCache", _count)

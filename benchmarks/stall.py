"""How long the event loop is held when a prefix, a tag or everything drops 100,000 entries.

A real Publisher and Subscriber on one loop, and beside them a ticker that does nothing but come round again: the
longest time between two of its turns, from before the publish until the sweep has given all memory back, is how long
anything else in the process would have had to wait. Ten of the entries are looked up as soon as the invalidation has
been applied: none may be there. The peer is the naive way on a bare TTLCache: find what matches, delete it, in one go.

CPU time of the thread shows what our code does; wall time has in it whatever else the machine did meanwhile, so the
same ticker on an idle loop, for as long, stands beside it as the floor.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from cachetools import TTLCache

from benchmarks.harness import Effort, Limit, Row, compare
from broadcache.publisher import Publisher
from broadcache.shared.embedded import EmbeddedServer
from broadcache.shared.invalidation import Everything, Prefixes, Tags, Target
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


def run(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 10)
    rounds = effort.pick(full=5, quick=1)
    rows: list[Row] = []
    with EmbeddedServer() as server:
        for kind, target in _TARGETS.items():
            ours: list[Held] = []
            idle: list[Held] = []
            naive: list[Held] = []
            for _ in range(rounds):
                held, seconds = asyncio.run(_held_by_us(server.url, target, kind, entries))
                ours.append(held)
                idle.append(asyncio.run(_held_by_nothing(seconds)))
                naive.append(_held_by_scan(kind, entries))
            rows += _rows(f"{kind} of {entries:,}, loop held", ours, naive, idle)
    return rows


def _rows(what: str, ours: list[Held], naive: list[Held], idle: list[Held]) -> list[Row]:
    def milliseconds(held: list[Held], attribute: str) -> list[float]:
        return [getattr(each, attribute) * _MILLISECONDS for each in held]

    return [
        compare(
            what,
            milliseconds(ours, "cpu"),
            "scan and delete, TTLCache",
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
        before = await publisher.head(_NAMESPACE)  # connects, which is none of the sweep's doing
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


async def _held_by_nothing(seconds: float) -> Held:
    ticker = Ticker()
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        await ticker.turn()
    return ticker.longest


class Ticker:
    """Takes turns on the event loop, and notes the longest time between two."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()
        self.longest = Held(0.0, 0.0)

    async def turn(self) -> None:
        await asyncio.sleep(0)
        wall, cpu = time.perf_counter(), time.thread_time()
        self.longest = Held(max(self.longest.wall, wall - self._wall), max(self.longest.cpu, cpu - self._cpu))
        self._wall, self._cpu = wall, cpu


def _held_by_scan(kind: str, entries: int) -> Held:
    cache: TTLCache[str, int] = TTLCache(maxsize=entries, ttl=_TTL_SECONDS)
    for number in range(entries):
        cache[f"product:{number}"] = number
    keys_of_tag = {"catalogue": set(cache)}
    scans: dict[str, Callable[[], list[str]]] = {
        "prefix": lambda: [key for key in cache if key.startswith("product:")],
        "tag": lambda: list(keys_of_tag.pop("catalogue")),
        "everything": lambda: list(cache),
    }
    wall, cpu = time.perf_counter(), time.thread_time()
    for key in scans[kind]():
        del cache[key]
    return Held(time.perf_counter() - wall, time.thread_time() - cpu)

"""What one publish costs the server, the network and each replica, as replicas, namespaces, entries and messages grow.

One server; the replicas are Subscribers in four processes, with an echo that never comes due, so that only messages
cost; a Publisher in this process. For each number of replicas, namespaces of each replica, entries of each cache, and
messages a second, some messages are published to one namespace, each with one key that is not cached. What is shown is
the CPU time of the server (`INFO`) and the bytes that it sends, for each publish, and the CPU time of the replicas, for
each publish and replica. What the server uses while nothing is published is measured before, for a second, and
subtracted. Each process collects its garbage before: filling 100,000 entries is not what is measured.

The peer is the smallest configuration of the same kind. The last rows are a straight line through the figures of the
growing number of replicas, by least squares: a part for each publish, and one for each of its receivers. They are what
docs/scale.md computes with.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from cachetools import TTLCache
from redis import Redis

from benchmarks.fleet import allow_files
from benchmarks.harness import Effort, Measure, Row, Stopwatch, answer, child, compare, run_async
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

_NAMESPACE: Final = "tenant-0"
_NEVER_SECONDS: Final = 3_600.0
_PATIENCE_SECONDS: Final = 60.0
_CONNECTS_AT_ONCE: Final = 10
_PROCESSES_MAX: Final = 4
_FILES_BESIDE_CONNECTIONS: Final = 100
_LOOK_SECONDS: Final = 0.02
_CALLERS: Final = 64
_IDLE_SECONDS: Final = 1.0
_MICROSECONDS: Final = 1_000_000
_LEAST: Final = 0.001
"""In place of a cost that was too small to be measured: a ratio needs a number above 0."""


class Size(NamedTuple):
    """One configuration. With 0 messages a second, 64 callers publish as fast as they can."""

    replicas: int = 10
    namespaces: int = 1
    entries: int = 10
    per_second: int = 100


class Cost(NamedTuple):
    """The cost of one publish. Units: microseconds of CPU time, and bytes."""

    server_us: float
    replica_us: float
    sent_bytes: float
    per_second: float


def run(effort: Effort) -> list[Row]:
    quick = effort.is_quick
    messages = effort.pick(full=200, quick=20)
    series: dict[str, list[tuple[str, Size]]] = {
        "replicas": [
            (f"{n:,} replica{'s' * (n > 1)}", Size(replicas=n)) for n in ((1, 10) if quick else (1, 10, 100, 1_000))
        ],
        "namespaces": [
            (f"{n:,} namespace{'s' * (n > 1)}", Size(namespaces=n)) for n in ((1, 10) if quick else (1, 10, 100))
        ],
        "entries": [(f"{n:,} entries", Size(entries=n)) for n in ((10, 1_000) if quick else (10, 1_000, 100_000))],
        "messages": [
            (f"{n:,} /s asked for" if n else "as fast as it goes", Size(per_second=n))
            for n in ((100, 0) if quick else (1, 10, 100, 1_000, 10_000, 0))
        ],
    }
    rows: list[Row] = []
    for kind, sizes in series.items():
        costs = [_cost(size, messages) for _, size in sizes]
        for field, what, unit in (
            ("server_us", "server", "µs"),
            ("replica_us", "each replica", "µs"),
            ("sent_bytes", "sent by the server", "B"),
            *([("per_second", "messages a second", "/s")] if kind == "messages" else []),
        ):
            figures = [getattr(cost, field) for cost in costs]
            for (name, _), figure in zip(sizes, figures, strict=True):
                measure: Measure = "CPU" if field.endswith("_us") else "count"
                row = compare(f"{name}: {what}", [figure], sizes[0][0], [figures[0]], unit=unit, measure=measure)
                rows.append(row)
        if kind == "replicas":
            rows += _fitted([size.replicas for _, size in sizes], costs)
    return rows


def _fitted(replicas: Sequence[int], costs: Sequence[Cost]) -> list[Row]:
    rows: list[Row] = []
    for field, what, unit in (("server_us", "server", "µs"), ("sent_bytes", "sent by the server", "B")):
        line = _line(replicas, [getattr(cost, field) for cost in costs])
        each, fixed = (max(_LEAST, part) for part in line)
        rows.append(compare(f"fitted: {what}, for each receiver", [each], "for each publish", [fixed], unit=unit))
    return rows


def _line(numbers: Sequence[int], figures: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept of the line with the least squares of relative errors."""
    # Of absolute errors, those of the largest fleet alone would decide.
    weights = [1 / figure**2 for figure in figures]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, numbers, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, figures, strict=True)) / total
    along = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, numbers, strict=True))
    both = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, numbers, figures, strict=True))
    return both / along, mean_y - both / along * mean_x


def _cost(size: Size, messages: int) -> Cost:
    """Measure one configuration."""
    processes = min(_PROCESSES_MAX, size.replicas)
    shares = [len(range(first, size.replicas, processes)) for first in range(processes)]
    with EmbeddedServer() as server, ExitStack() as stack:
        redis = stack.enter_context(Redis.from_url(server.url))
        main = partial(run_async, hold)
        pipes = [stack.enter_context(child(main, server.url, share, size)) for share in shares]
        for pipe in pipes:
            answer(pipe)
        return asyncio.run(_publish(server.url, redis, pipes, size, messages))


async def _publish(url: str, redis: Redis, pipes: Sequence[Connection], size: Size, messages: int) -> Cost:
    count = min(messages, 5) if size.per_second == 1 else max(messages, min(size.per_second, 10_000))
    count = count if size.per_second else max(messages, messages * 25)
    async with Publisher(url) as publisher:
        await _send(publisher, range(20), per_second=0)
        _until_applied(pipes, 20)
        idle_from = _used(redis)
        await asyncio.sleep(_IDLE_SECONDS)
        before, began = _used(redis), time.perf_counter()
        idle_us_per_second = (before[0] - idle_from[0]) / _IDLE_SECONDS
        for pipe in pipes:
            pipe.send("begin")
        took_seconds = await _send(publisher, range(count), per_second=size.per_second)
        replicas_us = _until_applied(pipes, 20 + count) * _MICROSECONDS
        after, elapsed_seconds = _used(redis), time.perf_counter() - began
    used_us = (after[0] - before[0] - idle_us_per_second * elapsed_seconds) / count
    sent_bytes = (after[1] - before[1]) / count
    return Cost(
        max(_LEAST, used_us), max(_LEAST, replicas_us / count / size.replicas), sent_bytes, count / took_seconds
    )


async def _send(publisher: Publisher, numbers: range, *, per_second: int) -> float:
    """Publish one message for each number, at this pace; return how long that took, in seconds."""
    remaining = iter(numbers)
    pace = itertools.count()
    began = time.perf_counter()

    async def call() -> None:
        for number in remaining:
            if per_second:
                due_in = began + next(pace) / per_second - time.perf_counter()
                if due_in > 0:
                    await asyncio.sleep(due_in)
            await publisher.publish(Keys(f"product:{number}"), namespace=_NAMESPACE, reason="price change")

    await asyncio.gather(*[call() for _ in range(_CALLERS if per_second == 0 or per_second > 100 else 1)])
    return time.perf_counter() - began


def _used(redis: Redis) -> tuple[float, float]:
    """Return the CPU time of the server so far, in microseconds, and the bytes that it has sent."""
    info: Any = redis.info()
    used = (info["used_cpu_user"] + info["used_cpu_sys"]) * _MICROSECONDS
    return used, info["total_net_output_bytes"]


def _until_applied(pipes: Sequence[Connection], sequence: int) -> float:
    """Wait until all replicas have applied the log up to `sequence`; return their CPU time since, in seconds."""
    for pipe in pipes:
        pipe.send(sequence)
    taken: list[float] = [answer(pipe) for pipe in pipes]
    return sum(taken)


async def hold(pipe: Connection, url: str, replicas: int, size: Size) -> None:
    """Hold this many replicas, and answer how much CPU time it took them until they had applied what was asked."""
    allow_files(replicas + _FILES_BESIDE_CONNECTIONS)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        subscribers: list[Subscriber] = []
        caches: list[LocalCache] = []
        for first in range(0, replicas, _CONNECTS_AT_ONCE):
            together = range(first, min(first + _CONNECTS_AT_ONCE, replicas))
            entered = [stack.enter_async_context(_subscriber(url, size, caches)) for _ in together]
            subscribers += await asyncio.gather(*entered)
        for cache in caches:  # not before: a new subscription drops everything
            _fill(cache, size.entries)
        gc.collect()
        pipe.send("ready")
        stopwatch = Stopwatch()
        with suppress(EOFError):
            while True:
                asked = await loop.run_in_executor(None, pipe.recv)
                if asked == "begin":
                    stopwatch = Stopwatch()
                    continue
                for subscriber in subscribers:
                    while (position := subscriber.position(_NAMESPACE)) is None or position.sequence < asked:  # noqa: ASYNC110
                        await asyncio.sleep(_LOOK_SECONDS)
                pipe.send(stopwatch.read().cpu)


def _subscriber(url: str, size: Size, caches: list[LocalCache]) -> Subscriber:
    """Return a subscriber with empty caches, which are appended to `caches`."""
    own = {f"tenant-{number}": _empty(size.entries) for number in range(size.namespaces)}
    caches += own.values()
    return Subscriber(
        url,
        caches=own,
        echo_interval_seconds=_NEVER_SECONDS,
        echo_timeout_seconds=_PATIENCE_SECONDS,
        connect_timeout_seconds=_PATIENCE_SECONDS,
        start_timeout_seconds=_PATIENCE_SECONDS,
    )


def _empty(entries: int) -> LocalCache:
    return LocalCache(TTLCache(maxsize=entries, ttl=3_600), max_staleness_seconds=2 * _NEVER_SECONDS)


def _fill(cache: LocalCache, entries: int) -> None:
    for number in range(entries):
        cache.store(cache.begin_load(f"entry:{number}"), number)
    while cache.sweep():
        pass

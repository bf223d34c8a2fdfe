"""A flood of messages into a replica that serves 1,000 reads a second: is it ever wrong, and does it keep serving?

One process holds the replica, a Subscriber with a LocalCache of 10,000 entries, and reads 1,000 keys a second with
`get_or_load`. Another floods its namespace: first with 50,000 unsequenced messages a second, then with as many logged
ones as the server takes, for 30 s each. A hundred times a second one of the keys that are read changes. Before each
flood the same replica is measured in calm, for 5 s: that is the peer of each row.

A read is wrong if it was served locally, its value was loaded before the source changed, and that change was accepted
longer ago than `max_staleness_seconds`: computed afterwards from the times of all reads and of all changes, by the
system's monotonic clock. A read of a key that has just changed loads it anew: it is neither bypassed nor local. The
longest hold of the event loop is the CPU time of its thread between two turns of a task that does nothing else. Memory
is the peak of the process.
"""

import asyncio
import resource
import socket
import time
from array import array
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from cachetools import TTLCache

from benchmarks.harness import Effort, Limit, Measure, Row, answer, child, compare, run_async
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.wire import encode_unsequenced
from broadcache.subscriber import LocalCache, Subscriber

_NAMESPACE: Final = "products"
_ENTRIES: Final = 10_000
_KEYS_READ: Final = 100
_READS_PER_SECOND: Final = 1_000
_FLOOD_PER_SECOND: Final = 50_000
_BATCH: Final = 500
_CALLERS: Final = 256
_BOUND_SECONDS: Final = 5.0
_NS: Final = 1_000_000_000


class Change(NamedTuple):
    """A change of the source: from when on a load returns the new value, and when its invalidation was accepted."""

    key: int
    changed_ns: int
    accepted_ns: int


class Served(NamedTuple):
    """What the replica measured: of each local read the key, the time of the load and that of the read, in turn.

    Flat, because tuples in a list would be a burden on the garbage collector of the measured process.
    """

    local: "array[int]"
    reads: int
    bypassed: int
    hold_ms: float
    memory_mib: float
    applied: int


class Flood(NamedTuple):
    """The measurements of one flood."""

    right: float
    not_bypassed: float
    share: float
    hold_ms: float
    memory_mib: float
    coherent_seconds: float
    per_second: float


def run(effort: Effort) -> list[Row]:
    seconds = effort.pick(full=30, quick=2)
    calm_seconds = effort.pick(full=5, quick=1)
    rows: list[Row] = []
    for kind, is_logged in (("unsequenced", False), ("logged", True)):
        with EmbeddedServer() as server, child(partial(run_async, replicate), server.url) as pipe:
            answer(pipe)
            calm = _measured(server, pipe, calm_seconds, None)
            flood = _measured(server, pipe, seconds, is_logged)
        rows += _rows(f"flood of {flood.per_second:,.0f} {kind}/s", calm, flood)
    return rows


def _rows(what: str, calm: Flood, flood: Flood) -> list[Row]:
    def row(name: str, field: str, unit: str, measure: Measure, limit: Limit | None = None) -> Row:
        ours, peer = ([getattr(each, field)] for each in (flood, calm))
        return compare(f"{what}, {name}", ours, "the same replica, calm", peer, unit=unit, measure=measure, limit=limit)

    return [
        row("reads within the bound", "right", "%", "count", Limit("≥", 100, of="ours")),
        row("reads not bypassed", "not_bypassed", "%", "count", Limit("≥", 99, of="ours")),
        row("reads served locally", "share", "%", "count"),
        row("longest hold of the loop", "hold_ms", "ms", "CPU"),
        row("peak memory", "memory_mib", "MiB", "memory"),
        row("until coherent after it", "coherent_seconds", "s", "wall"),
    ]


def _measured(server: EmbeddedServer, pipe: Connection, seconds: float, is_logged: bool | None) -> Flood:
    pipe.send("begin")
    answer(pipe)
    changes = asyncio.run(_flood(server, seconds, is_logged))
    pipe.send("end")
    coherent_seconds: float = answer(pipe)
    served: Served = answer(pipe)
    return Flood(
        100 * (1 - _wrong(served.local, changes) / served.reads),
        100 * (1 - served.bypassed / served.reads),
        100 * len(served.local) / 3 / served.reads,
        served.hold_ms,
        served.memory_mib,
        coherent_seconds,
        served.applied / seconds,
    )


def _wrong(reads: "array[int]", changes: list[Change]) -> int:
    of_key: dict[int, list[Change]] = {}
    for change in changes:
        of_key.setdefault(change.key, []).append(change)
    return sum(
        any(
            loaded_ns < each.changed_ns and each.accepted_ns + _BOUND_SECONDS * _NS < read_ns
            for each in of_key.get(key, ())
        )
        for key, loaded_ns, read_ns in zip(reads[::3], reads[1::3], reads[2::3], strict=True)
    )


async def _flood(server: EmbeddedServer, seconds: float, is_logged: bool | None) -> list[Change]:
    """Change keys a hundred times a second, and send the flood beside; return the changes."""
    changes: list[Change] = []
    end_ns = time.monotonic_ns() + round(seconds * _NS)
    async with Publisher(server.url, timeout_seconds=30) as publisher:

        async def change() -> None:
            number = 0
            while time.monotonic_ns() < end_ns:
                key = number % _KEYS_READ
                changed_ns = time.monotonic_ns()
                await publisher.publish(Keys(f"product:{key}"), namespace=_NAMESPACE)
                changes.append(Change(key, changed_ns, time.monotonic_ns()))
                number += 1
                await asyncio.sleep(1 / _KEYS_READ)

        async def publish() -> None:
            number = 0
            while time.monotonic_ns() < end_ns:
                await publisher.publish(Keys(f"other:{number % _ENTRIES}"), namespace=_NAMESPACE)
                number += 1

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(change())
            if is_logged:
                for _ in range(_CALLERS):
                    tasks.create_task(publish())
            elif is_logged is not None:
                tasks.create_task(asyncio.to_thread(_send_unsequenced, server.port, end_ns))
    return changes


def _send_unsequenced(port: int, end_ns: int) -> None:
    channel = names_of(_NAMESPACE).channel.encode()
    batches: list[bytes] = []
    for first in range(0, _ENTRIES, _BATCH):
        commands: list[bytes] = []
        for number in range(first, first + _BATCH):
            [frame] = encode_unsequenced(invalidation_of([Keys(f"other:{number}")], namespace=_NAMESPACE))
            commands.append(
                b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(channel), channel, len(frame), frame)
            )
        batches.append(b"".join(commands))
    began, sent = time.monotonic(), 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while time.monotonic_ns() < end_ns:
            connection.sendall(batches[sent % len(batches)])
            replies = 0
            while replies < _BATCH:
                replies += connection.recv(65_536).count(b"\r\n")
            sent += 1
            time.sleep(max(0.0, began + sent * _BATCH / _FLOOD_PER_SECOND - time.monotonic()))


async def replicate(pipe: Connection, url: str) -> None:
    """Hold the replica, read from it, and send back what was measured in each window."""
    loop = asyncio.get_running_loop()
    cache = LocalCache(TTLCache(maxsize=_ENTRIES, ttl=3_600), max_staleness_seconds=_BOUND_SECONDS)
    async with Subscriber(url, caches={_NAMESPACE: cache}, start_timeout_seconds=30) as subscriber:
        pipe.send("ready")
        with suppress(EOFError):
            while True:
                await loop.run_in_executor(None, pipe.recv)
                ended = asyncio.Event()
                applied = subscriber.stats().received.get("applied", 0)
                bypassed = cache.stats().bypassed
                reading = asyncio.create_task(_read(cache, ended))
                watching = asyncio.create_task(_watch(ended))
                pipe.send("begun")
                await loop.run_in_executor(None, pipe.recv)
                flooded_until = time.monotonic()
                ended.set()
                # Coherent as of a moment after the flood.
                echoes = subscriber.stats().echoes
                while subscriber.stats().echoes < echoes + 2 or not cache.is_coherent:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                pipe.send(time.monotonic() - flooded_until)
                local, reads = await reading
                usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
                applied = subscriber.stats().received.get("applied", 0) - applied
                bypassed = cache.stats().bypassed - bypassed
                pipe.send(Served(local, reads, bypassed, await watching, usage, applied))


async def _read(cache: LocalCache, ended: asyncio.Event) -> tuple["array[int]", int]:
    """Read at an even pace; return the local reads, and how many reads there were."""
    local = array("q")
    reads = 0
    loads = 0

    async def load() -> int:
        nonlocal loads
        loads += 1
        return time.monotonic_ns()

    began = time.monotonic()
    while not ended.is_set():
        for _ in range(max(0, round((time.monotonic() - began) * _READS_PER_SECOND) - reads)):
            key = reads % _KEYS_READ
            before = loads
            loaded_ns: Any = await cache.get_or_load(f"product:{key}", load)
            if loads == before:
                local.extend((key, loaded_ns, time.monotonic_ns()))
            reads += 1
        await asyncio.sleep(0.001)
    return local, reads


async def _watch(ended: asyncio.Event) -> float:
    """Return the longest hold of the event loop, in milliseconds of its thread's CPU time."""
    longest = 0.0
    before = time.thread_time()
    while not ended.is_set():
        await asyncio.sleep(0.001)
        now = time.thread_time()
        longest = max(longest, now - before)
        before = now
    return longest * 1_000

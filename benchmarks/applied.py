"""How many single-key invalidations one replica applies in a second.

A round: three readers, each in its own process, subscribe to one channel and then pause, while 20,000 real frames are
logged and published. Then they resume one after the other, and each works off the same backlog at its own pace.
Ours decodes, orders and applies each frame to a LocalCache over a TTLCache of 10,000 entries: half of the frames drop
an entry, half name a key that is not there. The others only count: redis-py's asyncio `PubSub.listen()`, and a bare
hiredis reader on a blocking socket, which is the floor.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

from cachetools import TTLCache

from benchmarks.harness import HAS_HIREDIS, Effort, Limit, Row, Stopwatch, Taken, answer, child, compare, run_async
from broadcache.shared.invalidation import Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, RedisAddress
from broadcache.shared.transport.redis.log import append, names_of
from broadcache.subscriber import LocalCache, Subscriber

ENTRIES: Final = 10_000
FRAMES_PER_ENTRY: Final = 2
_APPENDS_AT_ONCE: Final = 500
# The server must not cut off a paused reader, and the reader must not mistake its own pause for a lost link.
_UNLIMITED_BUFFER: Final = ("--client-output-buffer-limit", "pubsub", "0", "0", "0")
_STANDSTILL_SECONDS: Final = 300.0


def run(effort: Effort) -> list[Row]:
    entries = effort.pick(full=ENTRIES, quick=ENTRIES // 10)
    rounds = effort.pick(full=9, quick=2)
    readers: dict[str, Callable[..., None]] = {
        "ours": partial(run_async, read_with_subscriber),
        "listen": partial(run_async, read_with_listen),
    }
    if HAS_HIREDIS:
        readers["hiredis"] = read_with_hiredis
    taken: dict[str, list[Taken]] = {name: [] for name in readers}
    with EmbeddedServer(extra_arguments=_UNLIMITED_BUFFER) as server:
        for number in range(rounds):
            _round(number, server, readers, entries, taken)
    frames = entries * FRAMES_PER_ENTRY
    cpu = {name: [frames / each.cpu for each in all_taken] for name, all_taken in taken.items()}
    wall = {name: [frames / each.wall for each in all_taken] for name, all_taken in taken.items()}
    what = "applied, one key each"
    target = Limit("≥", 2.3)
    rows = [
        compare(what, cpu["ours"], "PubSub.listen() iterating", cpu["listen"], unit="/s", limit=target),
        compare(what, wall["ours"], "PubSub.listen() iterating", wall["listen"], unit="/s", measure="wall"),
    ]
    if HAS_HIREDIS:
        rows.append(compare(what, cpu["ours"], "bare hiredis reader (floor)", cpu["hiredis"], unit="/s"))
    return rows


def _round(
    number: int,
    server: EmbeddedServer,
    readers: dict[str, Callable[..., None]],
    entries: int,
    taken: dict[str, list[Taken]],
) -> None:
    namespace = f"applied-{number}"
    with ExitStack() as stack:
        pipes = {
            name: stack.enter_context(child(reader, server.url, server.port, namespace, entries))
            for name, reader in readers.items()
        }
        for pipe in pipes.values():
            answer(pipe)
        asyncio.run(_send(server.url, namespace, entries * FRAMES_PER_ENTRY))
        names = list(pipes)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pipes[name].send("go")
            taken[name].append(answer(pipes[name]))


async def _send(url: str, namespace: str, frames: int) -> None:
    link = await Link.open(RedisAddress(url), client_name="benchmark", timeout_seconds=5)
    for first in range(0, frames, _APPENDS_AT_ONCE):
        numbers = range(first, min(first + _APPENDS_AT_ONCE, frames))
        invalidations = [
            invalidation_of([Keys(f"product:{number}")], namespace=namespace, reason="price change")
            for number in numbers
        ]
        await asyncio.gather(*[append(link, each) for each in invalidations])
    await link.close()


async def read_with_subscriber(pipe: Connection, url: str, port: int, namespace: str, entries: int) -> None:
    frames = entries * FRAMES_PER_ENTRY
    cache = LocalCache(TTLCache(maxsize=entries, ttl=3_600), max_staleness_seconds=2 * _STANDSTILL_SECONDS)
    async with Subscriber(
        url,
        caches={namespace: cache},
        echo_interval_seconds=_STANDSTILL_SECONDS,
        echo_timeout_seconds=_STANDSTILL_SECONDS,
    ) as subscriber:
        for number in range(entries):
            cache.store(cache.begin_load(f"product:{number * FRAMES_PER_ENTRY}"), number)
        while cache.sweep():  # what the stores have left for later belongs to them
            pass
        pipe.send("ready")
        pipe.recv()  # holds up the whole event loop, which is the point
        stopwatch = Stopwatch()
        # One check every millisecond, so that counting costs the reader nothing.
        while (position := subscriber.position(namespace)) is None or position.sequence < frames:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        taken = stopwatch.read()
        stats = cache.stats()
        if (stats.applied["keys"], stats.dropped) != (frames, entries):
            raise RuntimeError(f"expected {frames} keys applied and {entries} entries dropped, got {stats}")
        pipe.send(taken)


async def read_with_listen(pipe: Connection, url: str, port: int, namespace: str, entries: int) -> None:
    from redis.asyncio import Redis

    frames = entries * FRAMES_PER_ENTRY
    async with Redis.from_url(url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe(names_of(namespace).channel)
        messages: Any = pubsub.listen()
        await anext(messages)  # the confirmation
        pipe.send("ready")
        pipe.recv()
        stopwatch = Stopwatch()
        async for _ in messages:
            frames -= 1
            if not frames:
                break
        pipe.send(stopwatch.read())


def read_with_hiredis(pipe: Connection, url: str, port: int, namespace: str, entries: int) -> None:
    import hiredis

    frames = entries * FRAMES_PER_ENTRY
    reader = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"SUBSCRIBE {names_of(namespace).channel}\r\n".encode())
        while reader.gets() is False:
            reader.feed(connection.recv(65_536))
        pipe.send("ready")
        pipe.recv()
        stopwatch = Stopwatch()
        while frames:
            reader.feed(connection.recv(65_536))
            while reader.gets() is not False:
                frames -= 1
        pipe.send(stopwatch.read())

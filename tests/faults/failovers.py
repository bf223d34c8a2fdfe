"""Faults on stages of several servers: a primary that freezes and thaws, or dies, and a slot that moves."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

from tests.faults.fault import BOTH, SOME_WRITES, Fault
from tests.faults.ledger import NAMESPACE
from tests.faults.stage import CALL_TIMEOUT_SECONDS, StageSettings, Topology
from tests.faults.stages import ClusterStage, FailoverStage
from tests.support.servers import ServerName

from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, RedisAddress
from broadcache.shared.transport.redis.names import names_of

QUEUED: Final = 60
QUEUED_KEY: Final = b'"other:'
GIVES_UP_SECONDS: Final = 0.8


async def thawed(stage: FailoverStage) -> None:
    """The primary freezes with publishes in its socket; its successor takes over; then it thaws and carries them out.

    In a cluster its messages reach the subscribers of the successor, with sequences that the successor hands out as
    well. As many changes as that follow at once, so that numbers agree again before the next echo.
    """
    await stage.pause_writes()
    former = await asyncio.to_thread(lambda: stage.server)
    async with Publisher(stage.writer_url, timeout_seconds=GIVES_UP_SECONDS) as dying:
        await dying.publish(Keys("other:warm"), namespace=NAMESPACE)
        head = await stage.head()
        former.pause()
        queued = (dying.publish(Keys(f"other:{number}"), namespace=NAMESPACE) for number in range(QUEUED))
        await asyncio.gather(*queued, return_exceptions=True)
    successor = await stage.other_primary_than(former)
    # Accepted by the successor: the controls, which listen to the frozen one, do not hear of it.
    await stage.burst(SOME_WRITES)
    await stage.outlast_bound()
    await stage.recovered()
    await stage.all_cached()
    accepted = await stage.head() - head
    async with _queue_heard_at(successor) as heard:
        await stage.next_echo()
        former.resume()
        demoted = asyncio.create_task(stage.demoted(former))
        await asyncio.wait([heard, demoted], return_when=asyncio.FIRST_COMPLETED)
        await stage.burst(max(SOME_WRITES, QUEUED - accepted))
        await demoted
    await stage.outlast_bound()
    await stage.resume_writes()


@asynccontextmanager
async def _queue_heard_at(server: EmbeddedServer) -> AsyncIterator[asyncio.Future[None]]:
    """Done when all that was queued has come over this server's channel. With sentinels nothing ever does."""
    heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    frames = 0

    def on_message(channel: bytes, frame: bytes) -> None:
        nonlocal frames
        frames += QUEUED_KEY in frame
        if frames == QUEUED and not heard.done():
            heard.set_result(None)

    address = RedisAddress(server.url)
    link = await Link.open(address, client_name="faults", timeout_seconds=CALL_TIMEOUT_SECONDS, on_message=on_message)
    try:
        await link.subscribe(names_of(NAMESPACE).channel)
        yield heard
    finally:
        heard.cancel()
        await link.close()


async def failed_over(stage: FailoverStage) -> None:
    """The primary is killed among changes; its successor may lack the last ones, and give their sequences out again."""
    await stage.writes(SOME_WRITES)
    former = await asyncio.to_thread(lambda: stage.server)
    await asyncio.to_thread(former.kill)
    await stage.other_primary_than(former)
    await stage.writes(SOME_WRITES)


async def migrated(stage: ClusterStage) -> None:
    """The slot moves to another primary, key by key, among changes."""
    await asyncio.to_thread(stage.cluster.migrate, NAMESPACE, await _another(stage))
    await stage.writes(SOME_WRITES)


async def migrated_at_once(stage: ClusterStage) -> None:
    """The slot moves to another primary in one step, among changes."""
    await asyncio.to_thread(stage.cluster.migrate_at_once, NAMESPACE, await _another(stage))
    await stage.writes(SOME_WRITES)


async def _another(stage: ClusterStage) -> EmbeddedServer:
    def find() -> EmbeddedServer:
        primary = stage.server
        return next(each for each in stage.cluster.primaries() if each is not primary)

    return await asyncio.to_thread(find)


def _faults() -> Iterator[Fault]:
    servers: tuple[ServerName, ...] = ("valkey", "redis", "redis-6.2")
    for server in servers:
        sentinels, cluster = _settings("sentinels", server), _settings("cluster", server)
        yield Fault("sentinels: primary killed", failed_over, settings=sentinels)
        yield Fault("sentinels: primary thawed", thawed, BOTH, sentinels)
        yield Fault("cluster: primary killed", failed_over, settings=cluster)
        yield Fault("cluster: primary thawed", thawed, BOTH, cluster)
        # Sharded subscriptions end when their slot leaves. redis-py does not subscribe again, and waits on.
        is_sharded = server != "redis-6.2"
        yield Fault("cluster: slot migrated", migrated, BOTH if is_sharded else frozenset(), cluster)
    yield Fault("cluster: slot migrated at once", migrated_at_once, BOTH, _settings("cluster", "valkey"))


def _settings(topology: Topology, server: ServerName) -> StageSettings:
    return StageSettings(topology=topology, server=server)


FAULTS: Final = tuple(_faults())

"""The log against what came over the channel: forged positions, foreign hands, servers without a name."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cachetools import TTLCache
from redis.asyncio import Redis
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import Invalidation, Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.following import follower

pytestmark = pytest.mark.anyio

NAMES = names_of("products")


@asynccontextmanager
async def replica(url: str, cache: LocalCache, **options: Any) -> AsyncIterator[Subscriber]:
    async with Subscriber(url, caches={"products": cache}, **{**FAST, **options}) as subscriber:
        yield subscriber


async def proven(subscriber: Subscriber) -> None:
    """Wait until an echo that is yet to be sent has come back."""
    echoes = subscriber.stats().echoes
    await until(lambda: subscriber.stats().echoes > echoes + 1 and subscriber.state == "coherent")


async def forge(foreign: Redis, subscriber: Subscriber, ahead: int, key: str = "x") -> None:
    position = subscriber.position("products")
    assert position is not None
    frame = Invalidation(epoch=position.epoch, seq=position.sequence + ahead, keys=(key,), namespace="products")
    await foreign.publish(NAMES.channel, encode(frame))


# --- forged positions ------------------------------------------------------------------------------------------------


async def test_no_invalidation_is_hidden_by_forged_next_positions(redis_url: str) -> None:
    cache = new_cache()
    async with (
        replica(redis_url, cache) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
        served = 0
        for number in range(50):
            await until(lambda: subscriber.state == "coherent")
            fill(cache, f"key {number}", "kept")
            await forge(foreign, subscriber, 1)
            await until(lambda count=2 * number + 1: subscriber.stats().received["applied"] > count)  # type: ignore[misc]
            served += cache.get(f"key {number}") is not None
            await publisher.publish(Keys(f"key {number}"), namespace="products")
            await until(lambda number=number: cache.get(f"key {number}") is None)  # type: ignore[misc]
        assert served > 0  # else the cache was bypassed all the time


async def test_a_forged_position_a_cut_and_what_was_accepted_meanwhile_do_not_add_up(redis_url: str) -> None:
    """The position goes on from what an echo has proven. A replica that took the forged one would skip "a"."""
    cache = new_cache(max_staleness_seconds=60)
    async with (
        replica(redis_url, cache, replica_id="forged-at", echo_interval_seconds=30) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        first = await publisher.publish(Keys("first"), namespace="products")
        await reached(subscriber, first)
        fill(cache, "a", "b", "c")
        await forge(foreign, subscriber, 1)
        await until(lambda: subscriber.position("products") != first.position)
        [client] = [each for each in await foreign.client_list() if each["name"] == "broadcache:forged-at"]
        async with foreign.pipeline(transaction=True) as together:
            together.client_kill_filter(_id=client["id"])
            together.hget(NAMES.head, "seq")
            await together.execute()
        for key in "ab":
            await publisher.publish(Keys(key), namespace="products")
        await until(lambda: subscriber.stats().subscriptions == 2 and subscriber.state == "coherent")
        assert (cache.get("a"), cache.get("b")) == (None, None)


async def test_a_flood_of_forged_gaps_sends_no_echoes_and_few_reads(redis_url: str) -> None:
    """Any client may claim what the log does not have: that must not set the pace of every replica."""
    cache = new_cache(max_staleness_seconds=600)
    async with (
        replica(redis_url, cache, echo_interval_seconds=300) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):

        async def calls() -> dict[str, int]:
            commands = await foreign.info("commandstats")
            return {each: commands.get(f"cmdstat_{each}", {"calls": 0})["calls"] for each in ("evalsha", "xrange")}

        await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
        before = await calls()
        for number in range(25):  # one after the other: each is looked for in the log
            await forge(foreign, subscriber, 5 + 5 * number)
            await until(lambda number=number: subscriber.stats().received.get("unlogged") == number + 1)  # type: ignore[misc]
        one_by_one = await calls()
        assert one_by_one["evalsha"] - before["evalsha"] <= 2
        assert one_by_one["xrange"] - before["xrange"] <= 30
        applied = subscriber.stats().received["applied"]
        position = subscriber.position("products")
        assert position is not None
        async with foreign.pipeline(transaction=False) as burst:
            for number in range(50):
                frame = Invalidation(epoch=position.epoch, seq=1_000 + 5 * number, keys=("x",), namespace="products")
                burst.publish(NAMES.channel, encode(frame))
            await burst.execute()
        await until(lambda: subscriber.stats().received["applied"] == applied + 50)
        fill(cache, "a", "kept")
        await reached(subscriber, await publisher.publish(Keys("a"), namespace="products"))
        together = await calls()
        assert together["evalsha"] - one_by_one["evalsha"] <= 3  # one of them is the publisher's
        assert together["xrange"] - one_by_one["xrange"] <= 12
        assert (cache.get("a"), cache.get("kept"), cache.stats().clears) == (None, "old", {"subscribed": 1})


async def test_forged_gaps_do_not_set_the_pace_of_reads(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the pause after a look is over, whatever is claimed waits. Here it lasts longer than the test."""
    async with (
        replica(redis_url, new_cache(max_staleness_seconds=600), echo_interval_seconds=300) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
        await forge(foreign, subscriber, 5)
        await until(lambda: subscriber.stats().received.get("unlogged") == 1)
        monkeypatch.setattr(follower, "_GAP_PAUSE_SECONDS", 600.0)
        before = await foreign.info("commandstats")
        for number in range(50):
            applied = subscriber.stats().received["applied"]
            await forge(foreign, subscriber, 5 + 5 * number)
            await until(lambda applied=applied: subscriber.stats().received["applied"] > applied)  # type: ignore[misc]
        after = await foreign.info("commandstats")
        for command in ("cmdstat_xrange", "cmdstat_evalsha"):
            assert after[command]["calls"] - before[command]["calls"] <= 1
        assert subscriber.stats().received["applied"] >= 50


# --- foreign hands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [-3, -1, 5])
async def test_a_head_that_was_moved_by_a_foreign_hand_hides_nothing(redis_url: str, steps: int) -> None:
    """As many publishes as the head went back by bring it to where it was: the numbers agree, the frames do not."""
    cache = new_cache()
    async with (
        replica(redis_url, cache, echo_interval_seconds=0.5) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        for number in range(4):
            await reached(subscriber, await publisher.publish(Keys(str(number)), namespace="products"))
        await proven(subscriber)
        keys = [f"key {number}" for number in range(max(1, -steps))]
        fill(cache, *keys, "kept")
        await foreign.hincrby(NAMES.head, "seq", steps)
        last = None
        for key in keys:
            last = await publisher.publish(Keys(key), namespace="products")
        await until(lambda: not any(cache.get(key) for key in keys))
        assert last is not None
        await reached(subscriber, last)
        await proven(subscriber)
        assert [cache.get(key) for key in keys] == [None] * len(keys)
        assert sum(cache.stats().clears.values()) > 1  # another history: everything is in doubt


NO_HEADS = pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seq", value) for value in ("-3", "7.5", "inf", "nan", "1" + "0" * 30, "abc", "")),
        *(("epoch", value) for value in ("two words", b"\xff\xfe", "")),
        ("digest_seq", "abc"),
        (None, "no hash"),
    ],
)


async def spoil_head(foreign: Redis, field: str | None, value: str | bytes) -> None:
    """Write `value` into a field of the head, or in its place."""
    if field is None:
        await foreign.set(NAMES.head, value)
    else:
        await foreign.hset(NAMES.head, field, value)


@NO_HEADS
async def test_a_head_that_is_none_is_made_anew_and_hides_nothing(
    redis_url: str, field: str | None, value: str | bytes
) -> None:
    """A replica that could not read it would be bypassed for ever, or clear with each echo."""
    cache = new_cache()
    async with (
        replica(redis_url, cache) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
        await proven(subscriber)
        await spoil_head(foreign, field, value)
        await proven(subscriber)
        for key in "ab":
            fill(cache, key)
            await reached(subscriber, await publisher.publish(Keys(key), namespace="products"))
            assert cache.get(key) is None
        fill(cache, "c", "kept")
        await proven(subscriber)
        await reached(subscriber, await publisher.publish(Keys("c"), namespace="products"))
        assert (cache.get("c"), cache.get("kept")) == (None, "old")
        assert sum(cache.stats().clears.values()) - 1 <= 2


@NO_HEADS
async def test_a_head_that_is_none_is_in_the_way_of_no_publish_and_no_start(
    redis_url: str, field: str | None, value: str | bytes
) -> None:
    cache = new_cache()
    async with Publisher(redis_url) as publisher, Redis.from_url(redis_url) as foreign:
        await publisher.publish(Keys("first"), namespace="products")
        await spoil_head(foreign, field, value)
        receipt = await publisher.publish(Keys("second"), namespace="products")
        assert await publisher.head("products") == receipt.position
        await spoil_head(foreign, field, value)
        async with replica(redis_url, cache) as subscriber:
            assert (subscriber.state, subscriber.stats().lost) == ("coherent", 0)
            fill(cache, "a")
            await reached(subscriber, await publisher.publish(Keys("a"), namespace="products"))
            assert cache.get("a") is None


@pytest.mark.parametrize("other_type", ["string", "deleted"])
async def test_a_log_that_another_type_took_the_place_of_is_a_doubt(
    own_server: EmbeddedServer, other_type: str
) -> None:
    """What was missed cannot be read: everything is dropped, and the replica is coherent again."""
    cache = new_cache()
    async with (
        replica(own_server.url, cache) as subscriber,
        Publisher(own_server.url) as publisher,
        Redis.from_url(own_server.url) as foreign,
    ):
        await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
        await proven(subscriber)
        fill(cache, "a", "b")
        async with foreign.pipeline(transaction=True) as together:
            together.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await together.execute()
        await publisher.publish(Keys("a"), namespace="products")
        if other_type == "string":
            await foreign.set(NAMES.log, "somebody else's")
        else:
            await foreign.delete(NAMES.log)
        await until(lambda: subscriber.stats().subscriptions == 2 and subscriber.state == "coherent")
        assert cache.get("a") is None
        # The next one begins the log again.
        fill(cache, "b")
        await reached(subscriber, await publisher.publish(Keys("b"), namespace="products"))
        assert cache.get("b") is None


# --- a server that does not tell who it is ---------------------------------------------------------------------------


@asynccontextmanager
async def anonymous(port: int) -> AsyncIterator[str]:
    """A proxy that takes the run id and the replication id out of all that a server says."""
    name = re.compile(rb"(?<=run_id:)[0-9a-f]{40}|(?<=master_replid:)[0-9a-f]{40}")
    known: set[bytes] = set()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        while received := await reader.read(65_536):
            writer.write(change(received))
            await writer.drain()
        writer.close()

    def blank(received: bytes) -> bytes:
        known.update(name.findall(received))
        received = name.sub(b" " * 40, received)
        for each in known:  # the echo's answer has the id alone
            received = received.replace(b"$40\r\n" + each + b"\r\n", b"$0\r\n\r\n")
        return received

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            pump(reader, server_writer, bytes), pump(server_reader, writer, blank), return_exceptions=True
        )
        server_writer.close()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        listener.close()


async def test_what_does_not_tell_who_it_is_is_not_taken_for_the_same_server(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of the new one has the same epoch and as many entries: only who answers could tell."""
    cache = new_cache()
    async with anonymous(own_server.port) as url, replica(url, cache) as subscriber:
        async with Publisher(own_server.url) as publisher, Redis.from_url(own_server.url) as foreign:
            first = await publisher.publish(Keys("first"), namespace="products")
            await reached(subscriber, first)
            await proven(subscriber)
            fill(cache, "a", "kept")
            await foreign.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: subscriber.stats().subscriptions == 2 and subscriber.state == "coherent")
        assert cache.stats().clears == {"subscribed": 1, "server changed": 1}
        # Once: matching digests then keep that link coherent.
        fill(cache, "a")
        await proven(subscriber)
        await proven(subscriber)
        assert (cache.get("a"), cache.stats().clears["server changed"]) == ("old", 1)
    assert caplog.text.count("expected INFO to have run_id and master_replid") == 1


# --- a slow link -----------------------------------------------------------------------------------------------------


class SlowLinks:
    """A proxy over which a server's answers come slowly, and which can be cut for a while."""

    def __init__(self, port: int, *, bytes_per_second: float) -> None:
        self._port = port
        self._bytes_per_second = bytes_per_second
        self._writers: list[asyncio.StreamWriter] = []
        self._is_open = asyncio.Event()
        self._is_open.set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as listener:
            yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            listener.close()
            self.cut()
            self.mend()

    def cut(self) -> None:
        self._is_open.clear()
        while self._writers:
            self._writers.pop().transport.abort()

    def mend(self) -> None:
        self._is_open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._is_open.wait()
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=16_384)
        self._writers += [writer, server_writer]
        await asyncio.gather(
            self._pump(reader, server_writer),
            self._pump(server_reader, writer, self._bytes_per_second),
            return_exceptions=True,
        )
        for each in (server_writer, writer):
            each.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_per_second: float = math.inf
    ) -> None:
        while received := await reader.read(16_384):
            writer.write(received)
            await writer.drain()
            await asyncio.sleep(len(received) / bytes_per_second)
        writer.close()


async def test_a_backlog_comes_over_a_slow_link_although_it_takes_longer_than_an_echo_may() -> None:
    """Silence ends a link, not the size of an answer. The whole backlog takes some twenty times an echo's time-out."""
    with EmbeddedServer(extra_arguments=("--client-output-buffer-limit", "pubsub 0 0 0")) as server:
        cache = LocalCache(TTLCache(maxsize=100, ttl=600))
        links = SlowLinks(server.port, bytes_per_second=1_000_000)
        async with (
            links.listening() as url,
            Publisher(server.url) as publisher,
            replica(url, cache, echo_timeout_seconds=0.3) as subscriber,
        ):
            await reached(subscriber, await publisher.publish(Keys("first"), namespace="products"))
            await proven(subscriber)
            fill(cache, "a", "kept")
            links.cut()
            last = None
            for number in range(6):
                names = [f"{number}:{each}:".ljust(1_000, "x") for each in range(1_000)]
                last = await publisher.publish(Keys("a", *names), namespace="products")
            links.mend()
            assert last is not None
            await reached(subscriber, last)
            assert (cache.get("a"), cache.get("kept")) == (None, "old")
            assert cache.stats().clears == {"subscribed": 1}
            assert subscriber.stats().subscriptions == 2

"""One connection: replies and messages in the server's order, and nothing kept from its owner."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis._parsers import _AsyncRESP3Parser
from tests.support.redis_probe import redis_probe
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.shared import InvalidSettings, LinkLost
from broadcache.shared.transport.redis import address
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, OnMessage, RedisAddress, Refused

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True, params=["from the stream", "from the library"])
def both_ways_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "from the library":
        # As if it were not installed; the client library has chosen its parser when it was imported.
        monkeypatch.setitem(sys.modules, "hiredis", None)
        settings = address._automatisms_off
        monkeypatch.setattr(address, "_automatisms_off", lambda: {**settings(), "parser_class": _AsyncRESP3Parser})


@asynccontextmanager
async def link_to(url: str, on_message: OnMessage | None = None) -> AsyncIterator[Link]:
    link = await Link.open(RedisAddress(url), client_name="test", timeout_seconds=5, on_message=on_message)
    try:
        yield link
    finally:
        await link.close()


async def test_concurrent_calls_get_their_own_replies(redis_url: str) -> None:
    async with link_to(redis_url) as link:
        texts = [f"text {number}" for number in range(500)]
        replies = await asyncio.gather(*[link.call("ECHO", text) for text in texts])
        assert [reply.decode() for reply in replies] == texts


async def test_a_reply_proves_that_every_earlier_message_was_handled(redis_url: str) -> None:
    heard: list[bytes] = []
    async with link_to(redis_url, lambda channel, frame: heard.append(frame)) as link, link_to(redis_url) as other:
        await link.subscribe("channel")
        for number in range(300):
            await other.call("PUBLISH", "channel", str(number))
        await link.call("PING")
        assert heard == [b"%d" % number for number in range(300)]


async def test_a_refused_command_leaves_the_link_open_and_in_step(redis_url: str) -> None:
    async with link_to(redis_url) as link:
        commands = [("ECHO", "a"), ("NO-SUCH-COMMAND",), ("ECHO", "b")]
        first, refused, last = await asyncio.gather(*(link.call(*each) for each in commands), return_exceptions=True)
        assert (first, type(refused), last) == (b"a", Refused, b"b")
        with pytest.raises(Refused) as refusal:
            await link.call("EVALSHA", "0" * 40, 0)
        assert refusal.value.code == "NOSCRIPT"
        assert link.is_open


async def test_a_refused_subscription_is_a_refusal_and_leaves_calls_in_step(own_server: EmbeddedServer) -> None:
    async with link_to(own_server.url) as admin:
        await admin.call("ACL", "SETUSER", "reader", "on", ">secret", "+@all", "~*", "resetchannels")
    async with link_to(f"redis://reader:secret@127.0.0.1:{own_server.port}") as link:
        subscribing = asyncio.create_task(link.subscribe("channel"))
        echoing = asyncio.create_task(link.call("ECHO", "in step"))
        with pytest.raises(Refused) as refusal:
            await subscribing
        assert (refusal.value.code, await echoing) == ("NOPERM", b"in step")


async def test_a_cancelled_call_leaves_the_others_in_step(redis_url: str) -> None:
    async with link_to(redis_url) as link:
        first, second = asyncio.create_task(link.call("ECHO", "1")), asyncio.create_task(link.call("ECHO", "2"))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == b"2"
        assert first.cancelled()


async def test_a_lost_link_fails_every_call_that_waits_and_every_later_one(own_server: EmbeddedServer) -> None:
    async with link_to(own_server.url) as link:
        own_server.pause()
        waiting = [asyncio.create_task(link.call("PING")) for _ in range(3)]
        await asyncio.sleep(0)
        own_server.kill()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [LinkLost] * 3
        assert not link.is_open
        with pytest.raises(LinkLost, match="was lost"):
            await link.call("PING")


async def test_a_message_handler_that_raises_ends_the_link_and_not_the_process(redis_url: str) -> None:
    def fail(channel: bytes, frame: bytes) -> None:
        raise ValueError("no such thing")

    async with link_to(redis_url, fail) as link, link_to(redis_url) as other:
        await link.subscribe("channel")
        await other.call("PUBLISH", "channel", "x")
        await until(link.lost.done)
        assert "no such thing" in str(link.lost.result())


async def test_closing_is_idempotent_and_fails_what_waits(own_server: EmbeddedServer) -> None:
    async with link_to(own_server.url) as link:
        own_server.pause()
        waiting = asyncio.create_task(link.call("PING"))
        await asyncio.sleep(0)
        await link.close()
        await link.close()
        with pytest.raises(LinkLost, match="was closed"):
            await waiting


async def test_a_server_that_accepts_and_keeps_silent_is_given_up_in_time(own_server: EmbeddedServer) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy:
        proxy.black_hole("both")
        with pytest.raises(LinkLost, match=r"no answer from .* within 0\.2 s"):
            await Link.open(RedisAddress(proxy.url), client_name="test", timeout_seconds=0.2)


async def test_a_refused_connection_is_reported_with_the_address() -> None:
    with pytest.raises(LinkLost, match=r"cannot connect to redis://127\.0\.0\.1:1: .*111"):
        await Link.open(RedisAddress("redis://127.0.0.1:1"), client_name="test", timeout_seconds=5)


async def test_an_address_never_shows_its_password() -> None:
    shown = repr(RedisAddress("rediss://me:hunter2@127.0.0.1:6379/3?ssl_cert_reqs=none&password=hunter2"))
    assert shown == "RedisAddress('rediss://…@127.0.0.1:6379/3')"
    with pytest.raises(InvalidSettings) as refusal:
        RedisAddress("http://me:hunter2@127.0.0.1")
    assert "hunter2" not in str(refusal.value)


async def test_a_unix_socket_is_an_address_too() -> None:
    with EmbeddedServer(unix_socket=True) as server:
        async with link_to(server.url) as link:
            assert await link.call("ECHO", "here") == b"here"


async def test_a_close_that_is_cancelled_closes_all_the_same(redis_url: str) -> None:
    link = await Link.open(RedisAddress(redis_url), client_name="cancelled", timeout_seconds=5)
    closing = asyncio.create_task(link.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    async with redis_probe(redis_url) as probe:

        async def is_gone() -> bool:
            return b"name=cancelled " not in await probe.call("CLIENT", "LIST")

        await until(is_gone, "the end of the connection")


async def test_commands_keep_their_order_while_the_server_does_not_read(own_server: EmbeddedServer) -> None:
    async with link_to(own_server.url) as link:
        own_server.pause()
        # Far more than the kernel and the transport buffer, then small ones that find the transport full.
        large = [asyncio.create_task(link.call("ECHO", b"x" * 60_000)) for _ in range(200)]
        await asyncio.sleep(0)
        small = []
        for number in range(100):
            small.append(asyncio.create_task(link.call("ECHO", str(number))))
            await asyncio.sleep(0)
        assert not any(each.done() for each in (*large, *small))
        own_server.resume()
        assert [len(await each) for each in large] == [60_000] * 200
        assert [int(await each) for each in small] == list(range(100))
        assert await link.call("ECHO", "after") == b"after"


async def test_a_command_that_cannot_be_encoded_fails_alone(redis_url: str) -> None:
    async with link_to(redis_url) as link:
        waiting = asyncio.create_task(link.call("ECHO", "before"))
        await asyncio.sleep(0)
        with pytest.raises(Exception, match=r"object|type|tuple item"):
            await link.call("ECHO", object())  # type: ignore[arg-type]
        assert await waiting == b"before"
        assert await link.call("ECHO", "after") == b"after"


async def test_a_flood_of_messages_lets_other_tasks_run_between_slices(redis_url: str) -> None:
    heard: list[int] = []
    most = 0
    running = True

    async def watch() -> None:
        nonlocal most
        seen = 0
        while running:
            most, seen = max(most, len(heard) - seen), len(heard)
            await asyncio.sleep(0)

    async with link_to(redis_url, lambda channel, frame: heard.append(int(frame))) as link, link_to(redis_url) as other:
        await link.subscribe("channel")
        watching = asyncio.create_task(watch())
        await asyncio.gather(*[other.call("PUBLISH", "channel", str(number)) for number in range(5_000)])
        await until(lambda: len(heard) == 5_000)
        running = False
        await watching
    assert heard == list(range(5_000))
    assert most <= 256  # a slice, and the beginning of the next read

"""GET /events: a real web server, a real Redis, and a client that sees the bytes."""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from tests.publisher.api.test_api import PATH, client_of, problem_of
from tests.shared.transport.redis.test_topology_acl import allow, rights_in, rights_of
from tests.support.command_line import running
from tests.support.event_client import EventClient, Told, following
from tests.support.redis_probe import redis_probe
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until
from tests.support.web_server import served

from broadcache.publisher import Publisher
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.events.hub import Hub, HubFull
from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.history.feed import Feed
from broadcache.shared import Everything, Keys, Prefixes, Receipt
from broadcache.shared.invalidation import Position
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, RedisAddress
from broadcache.shared.transport.redis.log import names_of

pytestmark = pytest.mark.anyio

NAME = b"name=broadcache:events "
CHANNEL = names_of("default").channel
LOG = names_of("default").log
HEAD = names_of("default").head


@asynccontextmanager
async def api(redis_url: str, **settings: Any) -> AsyncIterator[str]:
    async with served(create_app(ApiSettings(redis_url=redis_url, **settings))) as client:
        yield str(client.base_url)


@asynccontextmanager
async def publisher_of(url: str) -> AsyncIterator[Publisher]:
    async with Publisher(url, timeout_seconds=20) as publisher:
        yield publisher


async def joined(client: EventClient) -> Told:
    """The first event: from then on nothing that is published is missed."""
    assert client.status == 200
    told = await client.next()
    assert told is not None
    assert (told.kind, told.data) == ("linked", {})
    return told


async def called(url: str, *command: str | int | bytes) -> Any:
    async with redis_probe(url) as probe:
        return await probe.call(*command)


async def publish_keys(url: str, *keys: str) -> None:
    async with publisher_of(url) as publisher:
        for key in keys:
            await publisher.publish(Keys(key))


# What is told, and in which order


def epoch_of(receipt: Receipt) -> str:
    assert receipt.position is not None
    return receipt.position.epoch


async def test_events_are_what_the_history_shows_with_their_place_as_id(redis_url: str) -> None:
    async with api(redis_url) as url, publisher_of(redis_url) as publisher, following(url) as client:
        assert client.headers["content-type"] == "text/event-stream"
        assert client.headers["cache-control"] == "no-store"
        await joined(client)
        for target in (Keys("a", "b"), Prefixes("p:"), Everything()):
            await publisher.publish(target, reason="line\nbreak\r\u2028")
        told = await client.next_some(3)
        async with client_of(ApiSettings(redis_url=redis_url)) as http:
            history = (await http.get(PATH)).json()["invalidations"]
    assert [each.data for each in told] == history[::-1]
    assert [each.kind for each in told] == ["invalidation"] * 3
    assert [each.id for each in told] == [f"{entry['epoch']}:{entry['sequence']}" for entry in history[::-1]]


async def test_events_and_audits_are_of_the_redis_and_the_prefix_of_a_given_publisher(redis_url: str) -> None:
    settings = ApiSettings(redis_url="redis://127.0.0.1:1", audit_namespaces=("default",), audit_sample=1)
    publisher = Publisher(redis_url, prefix="acme", timeout_seconds=20)
    async with (
        served(create_app(settings, publisher=publisher)) as http,
        following(str(http.base_url)) as client,
        publisher_of(redis_url) as other,
    ):
        await joined(client)
        await other.publish(Keys("without the prefix"))
        await publisher.publish(Keys("with it"))
        told = await client.next()
        assert told is not None
        assert told.keys == "with it"

        async def is_audited() -> bool:
            metrics = (await http.get("/metrics")).text
            return 'broadcache_audit_seen_total{namespace="default"} 1.0' in metrics

        await until(is_audited)


async def test_a_message_past_the_log_is_an_event_without_id(redis_url: str) -> None:
    async with api(redis_url) as url, following(url) as client:
        await joined(client)
        await called(redis_url, "PUBLISH", CHANNEL, '{"keys":["by hand"]}')
        told = await client.next()
    assert told is not None
    assert (told.kind, told.id, told.keys, told.data["sequence"]) == ("invalidation", None, "by hand", None)


async def test_an_epoch_made_up_by_somebody_cannot_add_lines_to_the_stream(redis_url: str) -> None:
    forged = json.dumps({"keys": ["k"], "epoch": "E\nevent: gap\ndata: {}\n", "seq": 1})
    async with api(redis_url) as url, following(url) as client:
        await joined(client)
        await called(redis_url, "PUBLISH", CHANNEL, forged)
        told = await client.next()
    assert told is not None
    assert (told.kind, told.id) == ("invalidation", None)


async def test_a_position_made_up_by_somebody_hides_nothing_that_comes_later(redis_url: str) -> None:
    async with api(redis_url) as url, following(url) as client, publisher_of(redis_url) as publisher:
        await joined(client)
        epoch = epoch_of(await publisher.publish(Keys("1")))
        for sequence in (7, 10**12):
            await called(redis_url, "PUBLISH", CHANNEL, json.dumps({"keys": ["x"], "epoch": epoch, "seq": sequence}))
        await publisher.publish(Keys("2"))
        await publisher.publish(Keys("3"))
        told = await client.next_some(5)
    assert [(each.keys, each.data["sequence"]) for each in told] == [
        ("1", 1), ("x", None), ("x", None), ("2", 2), ("3", 3),
    ]  # fmt: skip


async def test_an_unreadable_message_is_told_once_wherever_it_is_met_first(redis_url: str) -> None:
    of_the_future = b'{"v":2,"epoch":"E","seq":%d,"targets":[]}'
    async with redis_probe(redis_url) as probe, api(redis_url) as url, following(url) as client:

        async def append(sequence: int, frame: bytes, is_published: bool = True) -> None:
            await probe.call("XADD", LOG, f"{sequence}-0", "f", frame)
            await probe.call("HSET", HEAD, "epoch", "E", "seq", sequence)
            if is_published:
                await probe.call("PUBLISH", CHANNEL, frame)

        await joined(client)
        await append(1, b'{"v":1,"epoch":"E","seq":1,"keys":["1"]}')
        await append(2, of_the_future % 2)  # comes over the channel, and is then met in the log
        await append(3, b'{"v":1,"epoch":"E","seq":3,"keys":["3"]}')
        await append(4, of_the_future % 4, is_published=False)  # is only in the log
        await append(5, b'{"v":1,"epoch":"E","seq":5,"keys":["5"]}')
        await probe.call("PUBLISH", CHANNEL, of_the_future % 4)
        await probe.call("PUBLISH", CHANNEL, "now")
        told = await client.next_some(6)
    assert [(each.kind, each.id) for each in told] == [
        ("invalidation", "E:1"),
        ("unreadable", None),
        ("invalidation", "E:3"),
        ("unreadable", "E:4"),
        ("invalidation", "E:5"),
        ("unreadable", None),
    ]
    assert told[3].data["sequence"] == 4
    assert all(each.data["unreadable"] for each in told if each.kind == "unreadable")


# Coming back


@pytest.mark.parametrize("way", ["header", "query", "both"])
async def test_a_client_that_comes_back_gets_what_it_missed_and_nothing_twice(redis_url: str, way: str) -> None:
    async with api(redis_url) as url, publisher_of(redis_url) as publisher:
        async with following(url) as client:
            await joined(client)
            for number in range(3):
                await publisher.publish(Keys(str(number)))
            last = (await client.next_some(3))[1]
        assert last.id
        for number in range(3, 350):
            await publisher.publish(Keys(str(number)))
        path = {"header": "/events", "query": f"/events?last_event_id={last.id}", "both": "/events?last_event_id=E:1"}
        headers = {} if way == "query" else {"Last_Event_ID": last.id}
        async with following(url, path[way], **headers) as client:
            assert (await joined(client)).id is None
            await publisher.publish(Keys("350"))
            assert [each.keys for each in await client.next_some(349)] == [str(number) for number in range(2, 351)]


async def test_a_client_that_left_before_the_first_event_misses_nothing_either(redis_url: str) -> None:
    async with api(redis_url) as url:
        async with following(url) as client:
            id = (await joined(client)).id
        assert id == ":0"
        await publish_keys(redis_url, "a")
        async with following(url, Last_Event_ID=id) as client:
            await joined(client)
            [told] = await client.next_some(1)
            assert (told.kind, told.keys) == ("invalidation", "a")


async def test_clients_that_come_back_during_a_storm_of_publishes_miss_nothing(redis_url: str) -> None:
    async with api(redis_url) as url, publisher_of(redis_url) as publisher:
        receipt = await publisher.publish(Keys("0"))

        async def come_back() -> list[str]:
            found: list[str] = []
            id = f"{epoch_of(receipt)}:0"
            while len(found) < 400:
                async with following(url, Last_Event_ID=id) as client:
                    await joined(client)
                    for told in await client.next_some(min(57, 400 - len(found))):
                        assert told.id
                        found.append(told.keys)
                        id = told.id
            return found

        publishing = asyncio.gather(*[publisher.publish(Keys(str(number))) for number in range(1, 400)])
        found = await asyncio.gather(*[come_back() for _ in range(3)])
        logged = [entry.invalidation for entry in reversed(await publisher.history(count=400))]
        await publishing
    assert all(keys == [each.keys[0] for each in logged if each] for keys in found)


async def test_what_waits_for_a_client_and_is_also_in_the_log_is_told_once(redis_url: str) -> None:
    hub = Hub(redis_url)
    await publish_keys(redis_url, "a")
    async with publisher_of(redis_url) as publisher, hub.client("default", Position("", 0)) as client:
        while (chunk := await client.next()) and b"linked" not in chunk:
            pass
        await publisher.publish(Keys("b"))
        await until(lambda: client._waiting)
        missed = await client.next()
        assert missed is not None
        assert missed.count(b"event: invalidation") == 2
        await publisher.publish(Keys("c"))
        told = await client.next()
        assert told is not None
        assert b'"keys":["c"]' in told
    await hub.close()


async def test_a_client_of_another_epoch_is_told_of_the_gap_and_gets_the_log_that_there_is(redis_url: str) -> None:
    await publish_keys(redis_url, "a", "b")
    async with api(redis_url) as url, following(url, Last_Event_ID="LOST:7") as client:
        await joined(client)
        gap, *told = await client.next_some(3)
    assert (gap.kind, gap.id, gap.data["reason"]) == ("gap", None, "epoch-changed")
    assert [each.keys for each in told] == ["a", "b"]


async def test_a_client_that_the_log_does_not_reach_back_to_is_told_and_goes_on_from_the_oldest(
    redis_url: str,
) -> None:
    await publish_keys(redis_url, *"abcde")
    async with api(redis_url) as url, publisher_of(redis_url) as publisher:
        newest = await publisher.head()
        assert newest is not None
        await called(redis_url, "XTRIM", LOG, "MAXLEN", 2)
        async with following(url, Last_Event_ID=f"{newest.epoch}:1") as client:
            await joined(client)
            gap, *told = await client.next_some(3)
            assert (gap.kind, gap.data["reason"]) == ("gap", "log-trimmed")
            assert "2 to 3" in gap.data["detail"]
            assert [each.keys for each in told] == ["d", "e"]
        await called(redis_url, "DEL", LOG)
        async with following(url, Last_Event_ID=f"{newest.epoch}:4") as client:
            await joined(client)
            [gap] = await client.next_some(1)
            assert (gap.kind, gap.data["reason"]) == ("gap", "log-trimmed")
            await publisher.publish(Keys("f"))
            assert [each.keys for each in await client.next_some(1)] == ["f"]


async def test_a_client_ahead_of_the_log_or_of_a_log_that_is_gone_is_told(redis_url: str) -> None:
    async with api(redis_url) as url, publisher_of(redis_url) as publisher:
        async with following(url, Last_Event_ID="E:1") as client:
            await joined(client)
            assert [each.data["reason"] for each in await client.next_some(1)] == ["log-lost"]
        epoch = epoch_of(await publisher.publish(Keys("a")))
        async with following(url, Last_Event_ID=f"{epoch}:9") as client:
            await joined(client)
            assert [each.data["reason"] for each in await client.next_some(1)] == ["log-rewritten"]
            await publisher.publish(Keys("b"))
            assert [each.keys for each in await client.next_some(1)] == ["b"]


# Links that break


async def naive_listener(url: str, heard: list[str], is_there: asyncio.Event) -> None:
    """What most people write: subscribe, and when the connection breaks subscribe again."""
    while True:
        link = None
        try:
            link = await Link.open(
                RedisAddress(url),
                client_name="naive",
                timeout_seconds=5,
                on_message=lambda _, frame: heard.extend(json.loads(frame)["keys"]),
            )
            await link.subscribe(CHANNEL)
            is_there.set()
            await asyncio.shield(link.lost)
        except ConnectionError:
            pass
        finally:
            is_there.clear()
            if link is not None:
                await link.close()
        await asyncio.sleep(0.01)


async def test_what_is_logged_while_the_link_is_cut_is_told_by_the_feed_and_missed_by_a_naive_listener(
    redis_url: str, valkey_server: EmbeddedServer
) -> None:
    heard: list[str] = []
    is_there = asyncio.Event()
    async with (
        TcpProxy("127.0.0.1", valkey_server.port) as proxy,
        publisher_of(redis_url) as publisher,
        api(proxy.url) as url,
        following(url) as client,
    ):
        naive = asyncio.create_task(naive_listener(proxy.url, heard, is_there))
        await joined(client)
        await is_there.wait()
        await publisher.publish(Keys("before"))
        assert [each.keys for each in await client.next_some(1)] == ["before"]
        await proxy.refuse()
        await proxy.cut()
        assert [each.kind for each in await client.next_some(1)] == ["lost"]
        for number in range(250):
            await publisher.publish(Keys(f"meanwhile-{number}"))
        await until(lambda: not is_there.is_set())
        await proxy.accept()
        assert [each.kind for each in await client.next_some(1)] == ["linked"]
        await is_there.wait()
        await publisher.publish(Keys("after"))
        told = await client.next_some(251)
        await until(lambda: "after" in heard)
        naive.cancel()
        await asyncio.gather(naive, return_exceptions=True)
    assert [each.keys for each in told] == [*(f"meanwhile-{number}" for number in range(250)), "after"]
    assert heard == ["before", "after"]


async def test_connections_that_are_killed_again_and_again_cost_no_event(own_server: EmbeddedServer) -> None:
    async with (
        api(own_server.url) as url,
        following(url) as client,
        publisher_of(own_server.url) as publisher,
        redis_probe(own_server.url) as probe,
    ):
        await joined(client)
        found: list[str] = []

        async def until_told(kind: str) -> None:
            while (told := await client.next()) is not None:
                if told.kind == "invalidation":
                    found.append(told.keys)
                if told.kind == kind:
                    return

        for number in range(300):
            await publisher.publish(Keys(str(number)))
            if number % 50 == 20:
                await probe.call("CLIENT", "KILL", "TYPE", "pubsub")
                await publisher.publish(Keys(f"{number} again"))
                await until_told("lost")
            elif number % 50 == 40:
                await until_told("linked")
        while len(found) < 306:
            await until_told("invalidation")
    sent = [[str(number), *([f"{number} again"] if number % 50 == 20 else [])] for number in range(300)]
    assert found == [key for keys in sent for key in keys]


async def test_while_redis_is_away_clients_are_told_once_and_then_that_it_is_back(own_server: EmbeddedServer) -> None:
    async with api(own_server.url) as url, following(url) as client:
        await joined(client)
        await publish_keys(own_server.url, "a")
        [first] = await client.next_some(1)
        own_server.kill()
        [lost] = await client.next_some(1)
        assert lost.kind == "lost"
        assert lost.data["detail"]
        async with following(url) as late, following(url, Last_Event_ID=first.id or "") as resuming:
            for each in (late, resuming):
                assert [told.kind for told in await each.next_some(1)] == ["lost"]
            own_server.restart()
            for each in (client, late, resuming):
                assert [told.kind for told in await each.next_some(1)] == ["linked"]
            # Nothing was kept: what had been logged before is gone, and whoever saw it has to hear so.
            for each in (client, resuming):
                assert [told.data["reason"] for told in await each.next_some(1)] == ["log-lost"]
            await publish_keys(own_server.url, "b")
            for each in (client, late, resuming):
                assert [told.keys for told in await each.next_some(1)] == ["b"]


async def test_a_log_that_is_emptied_under_a_client_is_a_gap_and_then_goes_on(redis_url: str) -> None:
    async with api(redis_url) as url, following(url) as client:
        await joined(client)
        await publish_keys(redis_url, "a", "b")
        await client.next_some(2)
        await called(redis_url, "FLUSHALL")
        await publish_keys(redis_url, "c", "d")
        gap, *told = await client.next_some(3)
    assert (gap.kind, gap.data["reason"]) == ("gap", "epoch-changed")
    assert [(each.keys, each.data["sequence"]) for each in told] == [("c", 1), ("d", 2)]


async def test_a_log_trimmed_while_there_was_no_link_is_a_gap_and_goes_on_from_the_oldest(
    redis_url: str, valkey_server: EmbeddedServer
) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy, api(proxy.url) as url, following(url) as client:
        await joined(client)
        await publish_keys(redis_url, "a")
        await client.next_some(1)
        await proxy.refuse()
        await proxy.cut()
        await publish_keys(redis_url, "b", "c", "d")
        await called(redis_url, "XTRIM", LOG, "MAXLEN", 1)
        await proxy.accept()
        kinds = [(each.kind, each.data.get("keys")) for each in await client.next_some(4)]
    assert kinds == [("lost", None), ("linked", None), ("gap", None), ("invalidation", ["d"])]


async def test_a_log_that_a_failover_has_rewritten_is_a_gap_though_its_sequences_go_on(
    redis_url: str, valkey_server: EmbeddedServer
) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy, api(proxy.url) as url, following(url) as client:
        await joined(client)
        await publish_keys(redis_url, "a", "lost")
        await client.next_some(2)
        await proxy.refuse()
        await proxy.cut()
        async with redis_probe(redis_url) as probe:
            # What a replica that was one entry behind holds after it was promoted.
            await probe.call("HSET", HEAD, "seq", 1)
            [oldest] = await probe.call("XRANGE", LOG, "-", "+", "COUNT", 1)
            await probe.call("DEL", LOG)
            await probe.call("XADD", LOG, oldest[0], *oldest[1])
        await publish_keys(redis_url, "instead", "c")
        await proxy.accept()
        _, _, gap = await client.next_some(3)
        assert (gap.kind, gap.data["reason"]) == ("gap", "log-rewritten")
        await publish_keys(redis_url, "d")
        assert [each.keys for each in await client.next_some(1)] == ["d"]


async def test_a_half_open_link_is_noticed_and_what_came_meanwhile_is_told(
    redis_url: str, valkey_server: EmbeddedServer
) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy, api(proxy.url) as url, following(url) as client:
        await joined(client)
        proxy.black_hole()
        await publish_keys(redis_url, "a")
        assert [each.kind for each in await client.next_some(1)] == ["lost"]
        proxy.heal()
        linked, told = await client.next_some(2)
    assert (linked.kind, told.keys) == ("linked", "a")


async def test_a_log_that_redis_does_not_let_read_is_a_gap_for_whoever_comes_back(own_server: EmbeddedServer) -> None:
    await publish_keys(own_server.url, "a")
    async with publisher_of(own_server.url) as publisher:
        newest = await publisher.head()
    assert newest is not None
    await called(own_server.url, "SET", LOG, "something else")
    async with api(own_server.url) as url, following(url, Last_Event_ID=f"{newest.epoch}:0") as client:
        await joined(client)
        assert [each.data["reason"] for each in await client.next_some(1)] == ["log-refused"]
        # What took the log's place is removed, and a new log begun.
        await publish_keys(own_server.url, "b")
        [begun, published] = await client.next_some(2)
        assert (begun.data["reason"], published.keys) == ("epoch-changed", "b")


async def test_the_rights_that_the_page_adds_for_following_are_enough(own_server: EmbeddedServer) -> None:
    await publish_keys(own_server.url, "a", "b")
    async with publisher_of(own_server.url) as publisher:
        newest = await publisher.head()
    assert newest is not None
    redis_url = allow(own_server, "publisher", [*rights_of("publisher"), *rights_in("Following takes")])
    async with (
        api(redis_url, event_heartbeat_seconds=0.1) as url,
        following(url, Last_Event_ID=f"{newest.epoch}:1") as client,
    ):
        await joined(client)
        assert [each.keys for each in await client.next_some(1)] == ["b"]
        # Longer than it takes to ask a silent server whether it is there: that must not be refused either.
        while client.comments < 15:
            block = await client.next_block()
            assert block == b": still here"
            client.comments += 1
        await publish_keys(own_server.url, "c")
        assert [each.keys for each in await client.next_some(1)] == ["c"]


# Many clients, slow ones, and those that leave


async def subscriptions_at(url: str) -> int:
    clients: bytes = await called(url, "CLIENT", "LIST")
    return clients.count(NAME)


async def test_all_clients_of_a_namespace_share_a_subscription_that_ends_with_the_last_of_them(
    own_server: EmbeddedServer,
) -> None:
    tasks_before = asyncio.all_tasks()
    async with api(own_server.url) as url, publisher_of(own_server.url) as publisher:
        assert await subscriptions_at(own_server.url) == 0
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(following(url)) for _ in range(30)]
            async with following(url, "/events?namespace=other") as other:
                for each in (other, *clients):
                    await joined(each)
                assert await subscriptions_at(own_server.url) == 2
                await publisher.publish(Keys("k"))
                for each in clients:
                    assert [told.keys for told in await each.next_some(1)] == ["k"]
        await until(lambda: not any("broadcache events" in task.get_name() for task in asyncio.all_tasks()))
        assert await subscriptions_at(own_server.url) == 0
        async with following(url) as client:
            await joined(client)
            assert await subscriptions_at(own_server.url) == 1
    await until(lambda: asyncio.all_tasks() <= tasks_before)


async def test_a_client_that_does_not_read_is_cut_off_and_the_others_go_on(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    big = [f"{number:05}" + "x" * 1_000 for number in range(50)]
    async with (
        api(redis_url) as url,
        publisher_of(redis_url) as publisher,
        following(url) as slow,
        following(url) as quick,
    ):
        await joined(slow)
        await joined(quick)
        sent = 0
        while "did not read" not in caplog.text:
            await publisher.publish(Keys(*big))
            [told] = await quick.next_some(1)
            sent += 1
            assert told.data["sequence"] == sent
            assert sent < 2_000, "a client that reads nothing must not make anybody hold everything"
        # It finds what the sockets held, then the end; and the rest in the log.
        last: str | None = None
        read = 0
        while (each := await slow.next()) is not None:
            last = each.id
            read += 1
        assert read < sent
        async with following(url, Last_Event_ID=last or "") as again:
            await joined(again)
            assert [told.data["sequence"] for told in await again.next_some(sent - read)] == list(
                range(read + 1, sent + 1)
            )


async def test_what_waits_for_a_client_is_bounded(redis_url: str) -> None:
    hub = Hub(redis_url, waiting_bytes_max=10_000)
    async with hub.client("default", None) as client, publisher_of(redis_url) as publisher:
        while (chunk := await client.next()) and b"linked" not in chunk:
            pass
        for _ in range(200):
            await publisher.publish(Keys("k" * 1_000))
        await client.is_cut.wait()
        assert not client._waiting
    await hub.close()


async def test_no_more_clients_follow_than_may(redis_url: str) -> None:
    async with api(redis_url, event_clients_max=2) as url:
        async with following(url) as one, following(url, "/events?namespace=other") as two:
            await joined(one)
            await joined(two)
            async with following(url) as refused:
                assert refused.status == 503
                assert refused.headers["retry-after"] == "5"
                problem = json.loads(await refused.body())
                assert problem["type"] == "urn:broadcache:problem:streams-exhausted"
                assert "BROADCACHE_EVENT_CLIENTS_MAX" in problem["detail"]
        await until(lambda: not any("to a client" in task.get_name() for task in asyncio.all_tasks()))
        async with following(url) as one:
            await joined(one)


async def test_a_silent_stream_gives_signs_of_life(redis_url: str) -> None:
    async with api(redis_url, event_heartbeat_seconds=0.02) as url, following(url) as client:
        await joined(client)
        assert await client.next_block() == b": still here"
        await publish_keys(redis_url, "a")
        assert [each.keys for each in await client.next_some(1)] == ["a"]


async def test_a_stream_gives_signs_of_life_while_redis_is_away(own_server: EmbeddedServer) -> None:
    own_server.kill()
    async with api(own_server.url, event_heartbeat_seconds=0.02) as url, following(url) as client:
        told = await client.next()
        assert told is not None
        assert told.kind == "lost"
        assert await client.next_block() == b": still here"


# The gate, the questions, the end


async def test_events_need_a_token_that_may_read(redis_url: str) -> None:
    async with api(redis_url, tokens=("ro:reader", "rw:writer")) as url:
        async with following(url) as stranger:
            assert stranger.status == 401
        for token in ("reader", "writer"):
            async with following(url, Authorization=f"Bearer {token}") as client:
                await joined(client)


@pytest.mark.parametrize(
    ("path", "status", "kind", "said"),
    [
        ("/events?namespace=a%20b", 422, "parameter-invalid", "at query parameter namespace"),
        ("/events?namespace=other", 404, "namespace-unknown", "got 'other'"),
        ("/events?last_event_id=7", 422, "parameter-invalid", "EPOCH:SEQUENCE, got '7' at query parameter"),
        ("/events?last_event_id=E:-7", 422, "parameter-invalid", "got 'E:-7'"),
        ("/events?since=15m", 422, "parameter-invalid", "expected no query parameter 'since'"),
    ],
)
async def test_a_bad_question_is_a_problem(redis_url: str, path: str, status: int, kind: str, said: str) -> None:
    namespaces = () if "%20" in path else ("default",)
    async with client_of(ApiSettings(redis_url=redis_url, namespaces=namespaces)) as client:
        assert said in problem_of(await client.get(path), status, kind)["detail"]
        answer = await client.get("/events", headers={"Last-Event-ID": "yesterday"})
        problem_of(answer, 422, "parameter-invalid")


async def test_a_hub_that_is_closed_takes_nobody_and_closing_again_is_harmless(redis_url: str) -> None:
    hub = Hub(redis_url)
    await hub.close()
    await hub.close()
    with pytest.raises(HubFull, match="is shutting down"):
        async with hub.client("default", None):
            pass


async def test_a_feed_that_fails_lets_its_clients_go(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def receive(self: Feed, *_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Feed, "_receive", receive)
    async with api(redis_url) as url, following(url) as client:
        await joined(client)
        await publish_keys(redis_url, "a")
        assert await client.next() is None
    assert "following default failed" in caplog.text


async def test_open_streams_end_in_order_when_the_server_ends(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncExitStack() as stack:
        async with api(redis_url) as url:
            paths = ("/events", "/events", "/events?namespace=other")
            clients = [await stack.enter_async_context(following(url, path)) for path in paths]
            for client in clients:
                await joined(client)
        for client in clients:
            assert await client.next() is None
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
async def test_serve_ends_in_order_on_sigterm_though_a_stream_is_open(redis_url: str) -> None:
    with running("serve", "--port", "0", "--redis-url", redis_url) as serve:
        async with following(serve.url()) as client:
            await joined(client)
            code, log = await asyncio.to_thread(serve.end, signal.SIGTERM)
            assert code == 0
            # uvicorn says so when it had to cancel what did not end by itself.
            assert "graceful shutdown exceeded" not in log
            assert await client.next() is None

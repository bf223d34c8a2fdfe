"""What counts as taken by the fan-out of an invalidation: the answer of a replica that has applied it."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.support.called_replicas import fleet
from tests.support.pods import Behaviour, Pods, Received, answers, as_replica, says
from tests.support.registry import make_registry_old
from tests.support.replicas import new_cache
from tests.support.tcp_proxy import TcpProxy

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.publisher.fanout.broadcaster import Limits
from broadcache.publisher.telemetry.prometheus import PublisherMetrics
from broadcache.shared import Confirmation, InvalidSettings, Keys, NotDelivered, ReplicaConfirmation
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.wire import encode_unsequenced
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio

LARGE = Keys(*[f"{number:04}".ljust(1_000, "x") for number in range(200)])


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    async with Pods(2) as running:
        for number, pod in enumerate(running.all):
            pod.behaviour = as_replica(replica=f"web-{number}")
        yield running


def fanout_of(pods: Pods, **more: Any) -> Fanout:
    return Fanout("web", 80, addresses=[f"{host}:{pods.port}" for host in pods.hosts], **more)


@pytest.mark.parametrize("outcome", ["applied", "repeat"])
async def test_an_address_has_taken_it_when_a_replica_has_applied_this_very_id(pods: Pods, outcome: str) -> None:
    pods[1].behaviour = as_replica(outcome, replica="web-1")
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(Keys("a"), confirm=Confirm())
    assert receipt.fanout is not None
    assert receipt.fanout.is_delivered
    assert [(each.replica, each.outcome, each.error) for each in receipt.fanout.outcomes] == [
        ("web-0", "applied", None),
        ("web-1", outcome, None),
    ]
    assert receipt.confirmation is not None
    assert receipt.confirmation.confirmed == ("web-0", "web-1")


async def test_a_replica_that_cleared_has_dropped_it_whatever_id_it_names(pods: Pods) -> None:
    pods[1].behaviour = as_replica("cleared", id=None)
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(Keys("a"))
    assert receipt.fanout is not None
    assert receipt.fanout.is_delivered


async def test_the_parts_of_a_large_one_are_each_answered_for(pods: Pods) -> None:
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(LARGE, id="large")
        assert receipt.fanout is not None
        assert receipt.fanout.is_delivered
        pods[1].behaviour = as_replica(replica="web-1", id="large.1")
        with pytest.raises(NotDelivered, match=r"to have applied id 'large\.2', got id 'large\.1'"):
            await publisher.publish(LARGE, id="large")


async def test_parts_that_two_replicas_behind_one_address_have_answered_confirm_neither(
    redis_url: str, pods: Pods
) -> None:
    workers = itertools.cycle([as_replica(replica=name, processes=None) for name in ("worker-a", "worker-b")])

    async def take_turns(received: Received, writer: asyncio.StreamWriter) -> None:
        await next(workers)(received, writer)

    pods[1].behaviour = take_turns
    said = "expected one replica to apply all 4 parts, got several behind one address: worker-a, worker-b"
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        with pytest.raises(NotDelivered, match=said):
            await publisher.publish(LARGE)
    async with Publisher(redis_url, delivery="both", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(LARGE, confirm=Confirm(timeout_seconds=0.1))
    assert receipt.fanout is not None
    assert [(each.is_success, each.error) for each in receipt.fanout.outcomes] == [(True, None), (False, said)]
    assert receipt.confirmation is not None
    assert receipt.confirmation.confirmed == ("web-0",)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (answers(200), "got 200 and an empty body; check that service, port and path are those of the replicas"),
        (answers(204), "got 204 and an empty body"),
        (answers(200, b"<html>Welcome to nginx!</html>"), "got 200 and 30 bytes, which begin '<html>Welcome"),
        (answers(200, b'"ok"'), "expected the answer of a replica (a JSON object with replica, outcome and id)"),
        (answers(200, b'{"status":"ok"}'), "expected the answer of a replica"),
        (answers(200, b"[" * 50_000), "expected the answer of a replica"),
        (answers(200, b"\xff\xfe"), "expected the answer of a replica"),
        (as_replica(replica="web-1", outcome=7), "expected the answer of a replica"),
        (as_replica("queued", replica="web-1"), "expected replica 'web-1' to have applied it, got outcome 'queued'"),
        (as_replica(replica="web-1", id="another"), "got id 'another'"),
        (as_replica(replica="web-1", id=None), "got id None"),
        (as_replica(replica="web-1", more="x" * 65_536), "65536 bytes, cut at the limit of 65536 bytes, which begin"),
        (says(b'HTTP/1.1 200 X\r\nContent-Length: 99\r\n\r\n{"replica":"web-1"'), "and 18 bytes, which begin"),
    ],
    ids=lambda value: value[:40].replace(" ", "-") if isinstance(value, str) else "",
)
async def test_any_other_answer_is_no_success_confirms_nothing_and_says_what_was_expected(
    redis_url: str, pods: Pods, behaviour: Behaviour, said: str
) -> None:
    pods[1].behaviour = behaviour
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        with pytest.raises(NotDelivered) as caught:
            await publisher.publish(Keys("a"), id="order-7", confirm=Confirm())
    report = caught.value.report
    assert report is not None
    assert (report.total, report.succeeded, report.failed, report.is_delivered) == (2, 1, 1, False)
    assert [each.is_success for each in report.outcomes] == [True, False]
    assert said in (report.outcomes[1].error or "")
    assert f"reached 1 of 2 replicas of web; unreached: http://{pods[1].host}:{pods.port}/" in report.summary()
    assert said in str(caught.value)
    # With a log it is accepted, and the answer confirms nothing.
    async with Publisher(redis_url, delivery="both", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(Keys("a"), id="order-7", confirm=Confirm(timeout_seconds=0.1))
    assert receipt.is_logged
    assert receipt.confirmation is not None
    assert receipt.confirmation.confirmed == ("web-0",)


async def test_not_followed_is_told_apart_from_a_stranger(pods: Pods) -> None:
    pods[0].behaviour = as_replica("not followed", replica="web-0")
    pods[1].behaviour = answers(200, b"hello")
    report = await fanout_of(pods).send(encode_unsequenced(invalidation_of([Keys("a")])))
    assert [(each.replica, each.outcome) for each in report.outcomes] == [("web-0", "not followed"), (None, None)]


async def test_not_followed_is_listed_and_is_neither_applied_nor_missing(pods: Pods) -> None:
    pods[1].behaviour = as_replica("not followed", replica="web-1")
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        receipt = await publisher.publish(Keys("a"), confirm=Confirm())
        large = await publisher.publish(LARGE, confirm=Confirm())
    assert (report := receipt.fanout) is not None
    assert (report.total, report.succeeded, report.failed, report.not_followed) == (2, 1, 0, 1)
    assert [(each.is_success, each.is_not_followed, each.error) for each in report.outcomes] == [
        (True, False, None),
        (False, True, None),
    ]
    assert f"not followed by any subscriber of the process at: http://{pods[1].host}:{pods.port}/" in report.summary()
    for confirmation in (receipt.confirmation, large.confirmation):
        assert confirmation is not None
        assert (confirmation.confirmed, confirmation.missing, confirmation.not_followed) == (("web-0",), (), ("web-1",))
        assert confirmation.is_complete


async def test_not_followed_alone_is_neither_delivered_nor_confirmed(pods: Pods) -> None:
    for pod in (pods[0], pods[1]):
        pod.behaviour = as_replica("not followed", replica="web-1")
    async with Publisher(None, delivery="fanout", fanout=fanout_of(pods)) as publisher:
        with pytest.raises(NotDelivered, match="have the fan-out call the service whose replicas follow the namespace"):
            await publisher.publish(Keys("a"), confirm=Confirm())
    assert not Confirmation(replicas=(ReplicaConfirmation(replica="web-1", outcome="not followed"),)).is_complete


async def test_a_registered_replica_whose_only_word_is_not_followed_is_missing(
    own_server: EmbeddedServer, pods: Pods
) -> None:
    """Its process has two mixins, say, and the endpoint of the other one answers."""
    pods[1].behaviour = as_replica("not followed", replica="web-1")
    seldom: dict[str, Any] = {"echo_interval_seconds": 4.0}
    async with (
        Publisher(own_server.url, delivery="both", fanout=fanout_of(pods), timeout_seconds=0.5) as publisher,
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"products": new_cache()}, replica_id="web-1", **seldom),
    ):
        await make_registry_old(own_server.url)
        proxy.stall()
        receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm(timeout_seconds=0.1))
        assert receipt.is_logged
        assert receipt.confirmation is not None
        assert (receipt.confirmation.missing, receipt.confirmation.is_complete) == (("web-1",), False)
        # The registry was read before: also without Redis it is known that it does follow the namespace.
        own_server.pause()
        try:
            receipt = await publisher.publish(Keys("b"), namespace="products", confirm=Confirm(timeout_seconds=0.1))
        finally:
            own_server.resume()
            proxy.heal()
        assert not receipt.is_logged
        assert receipt.confirmation is not None
        assert (receipt.confirmation.confirmed, receipt.confirmation.missing) == (("web-0",), ("web-1",))


async def test_a_real_replica_that_does_not_follow_the_namespace_has_not_taken_it(own_server: EmbeddedServer) -> None:
    async with (
        fleet(own_server.url) as (_, fanout),
        Publisher(own_server.url, delivery="redis-then-fanout", fanout=fanout, timeout_seconds=0.5) as publisher,
    ):
        own_server.pause()
        try:
            assert (await publisher.publish(Keys("a"), namespace="products")).pending
            with pytest.raises(NotDelivered, match="not followed by any subscriber of the process at: http://"):
                await publisher.publish(Keys("a"), namespace="prices")
        finally:
            own_server.resume()


async def test_parts_that_were_not_sent_are_not_taken(pods: Pods) -> None:
    fanout = fanout_of(pods)

    applies = as_replica(replica="web-0")

    async def behave(received: Received, writer: asyncio.StreamWriter) -> None:
        # From the second part on, as many broadcasts are under way as there may be.
        object.__setattr__(fanout.broadcaster.limits, "broadcasts_max", 0)
        await applies(received, writer)

    pods[0].behaviour = behave
    report = await fanout.send(encode_unsequenced(invalidation_of([LARGE], id="large")))
    assert report.problem is not None
    assert (report.total, report.succeeded) == (2, 0)
    assert "only 1 of 4 parts were sent to this address; publish again" in (report.outcomes[0].error or "")


async def test_the_metrics_count_it_as_not_applied(pods: Pods) -> None:
    registry = CollectorRegistry()
    pods[1].behaviour = answers(200)
    fanout = fanout_of(pods, observer=PublisherMetrics(registry))
    await fanout.send(encode_unsequenced(invalidation_of([Keys("a")])))
    for result, count in {"success": 1, "not applied": 1, "status": 0}.items():
        labels = {"service": "web", "result": result}
        assert registry.get_sample_value("broadcache_broadcast_addresses_total", labels) == count
    assert registry.get_sample_value("broadcache_broadcasts_total", {"service": "web", "reached": "all"}) == 0


async def test_what_a_replica_answers_is_read_up_to_the_limit(pods: Pods) -> None:
    pods[1].behaviour = as_replica(replica="web-1")
    fanout = fanout_of(pods, limits=Limits(answer_bytes_max=40))
    report = await fanout.send(encode_unsequenced(invalidation_of([Keys("a")])))
    assert (report.succeeded, report.failed) == (0, 2)
    assert "40 bytes, cut at the limit of 40 bytes" in (report.outcomes[1].error or "")
    assert json.loads(pods[1].received[0].body)["keys"] == ["a"]


@pytest.mark.parametrize(
    ("service", "port", "problem"),
    [
        ("127.0.0.1", 80, "service: expected the DNS name of a service, got '127.0.0.1'"),
        ("web one", 80, "service: expected the name of a service, of labels"),
        ("web", "nope nope", "port: expected a number from 1 to 65535"),
        ("web", "*", "port: expected a number from 1 to 65535"),
    ],
)
def test_a_wrong_argument_is_named_and_no_setting(service: str, port: int | str, problem: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{re.escape(problem)}") as caught:
        Fanout(service, port)
    assert "BROADCACHE_" not in str(caught.value)

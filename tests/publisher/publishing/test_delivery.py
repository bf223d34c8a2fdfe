"""The second path: what Redis does not take reaches the replicas by HTTP, and is logged when Redis is back."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx2
import msgspec
import pytest
from tests.support.receipts import position_of
from tests.support.redis_probe import redis_probe
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Delivery, Publisher
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.publishing.backlog import Pending
from broadcache.publisher.publishing.retry_queue import RetryQueue
from broadcache.publisher.publishing.second_path import SecondPath
from broadcache.shared import (
    AddressOutcome,
    Everything,
    FanoutReport,
    IdempotencyConflict,
    Invalidation,
    InvalidSettings,
    InvalidTarget,
    Keys,
    LinkLost,
    LogRefused,
    NotDelivered,
    Receipt,
    Tags,
)
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer

pytestmark = pytest.mark.anyio

SECOND_PATHS: list[Delivery] = ["redis-then-fanout", "both"]


class Pod:
    """The least of a replica's HTTP end: hears frames, and answers as a replica does, or with a status."""

    def __init__(self) -> None:
        self.heard: list[Invalidation] = []
        self.status = 200
        self.on_heard: Callable[[], None] = lambda: None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            self.heard.append(msgspec.json.decode(await reader.readexactly(length), type=Invalidation))
            self.on_heard()
            await self.may_answer.wait()
            told = {"replica": f"pod-{self.port}", "outcome": "applied", "id": self.heard[-1].id}
            body = msgspec.json.encode(told) if self.status == 200 else b""
            head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (self.status, len(body))
            writer.write(head + body)
            await writer.drain()
        finally:
            self._serving.discard(task)
            writer.close()


class Fleet:
    """Real pods, and the teller that POSTs to them over real sockets."""

    def __init__(self, pods: Sequence[Pod]) -> None:
        self.pods = pods
        self.is_complete = True
        self.problem: str | None = None
        self.mistake: Exception | None = None
        self.entered = 0
        self.closed = 0
        self._ports = [pod.port for pod in pods]

    async def __aenter__(self) -> Self:
        self.entered += 1
        return self

    async def close(self) -> None:
        self.closed += 1

    @property
    def heard(self) -> list[list[Invalidation]]:
        return [pod.heard for pod in self.pods]

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        if self.mistake is not None:
            raise self.mistake
        outcomes: tuple[AddressOutcome, ...] = ()
        if self.problem is None:
            outcomes = tuple(await asyncio.gather(*[self._told(port, frames) for port in self._ports]))
        succeeded = sum(outcome.status_code == 200 for outcome in outcomes)
        return FanoutReport(
            service="replicas:http",
            total=len(outcomes),
            succeeded=succeeded,
            failed=len(outcomes) - succeeded,
            complete=self.is_complete,
            discovery="list",
            elapsed_ms=1.0,
            outcomes=outcomes,
            problem=self.problem,
        )

    async def _told(self, port: int, frames: Sequence[bytes]) -> AddressOutcome:
        url = f"http://127.0.0.1:{port}/cache-invalidation"
        status: int | None = None
        for frame in frames:
            try:
                status = await _post(port, frame)
            except OSError as error:
                return AddressOutcome(address=url, status_code=None, error=str(error), latency_ms=None, attempts=1)
            if status != 200:
                break
        return AddressOutcome(address=url, status_code=status, error=None, latency_ms=1.0, attempts=1)


async def _post(port: int, frame: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"POST /cache-invalidation HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(frame))
        writer.write(frame)
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    pods = [Pod() for _ in range(3)]
    for pod in pods:
        await pod.start()
    yield Fleet(pods)
    for pod in pods:
        await pod.stop()


@asynccontextmanager
async def redis_away(server: EmbeddedServer) -> AsyncIterator[None]:
    await asyncio.to_thread(server.kill)
    yield
    await asyncio.to_thread(server.restart)


async def logged_ids(url: str, namespace: str = "default") -> list[str]:
    async with Publisher(url) as reader:
        entries = await reader.history(namespace, count=1_000)
    return [entry.invalidation.id for entry in reversed(entries) if entry.invalidation is not None]


def ids_heard(pod: Pod) -> list[str]:
    return [invalidation.id for invalidation in pod.heard]


# Redis is up


async def test_while_redis_takes_it_nobody_is_called(redis_url: str, fleet: Fleet) -> None:
    async with Publisher(redis_url, delivery="redis-then-fanout", fanout=fleet, fallback_after_seconds=30) as publisher:
        receipt = await publisher.publish(Keys("k"))
    assert (position_of(receipt).sequence, receipt.is_logged, receipt.pending, receipt.fanout) == (1, True, False, None)
    assert fleet.heard == [[], [], []]


async def test_both_logs_it_and_calls_everybody_with_the_same_id(redis_url: str, fleet: Fleet) -> None:
    async with Publisher(redis_url, delivery="both", fanout=fleet, fallback_after_seconds=30) as publisher:
        receipt = await publisher.publish(Keys("k"), Tags("t"), namespace="products", reason="price")
        assert publisher.retry_queue_length == 0
    assert (position_of(receipt).sequence, receipt.pending) == (1, False)
    assert receipt.fanout is not None
    assert receipt.fanout.is_delivered
    assert await logged_ids(redis_url, "products") == [receipt.id]
    for pod in fleet.pods:
        [heard] = pod.heard
        assert (heard.id, heard.keys, heard.tags, heard.position) == (receipt.id, ("k",), ("t",), None)


async def test_both_is_delivered_by_the_log_when_nobody_can_be_called(redis_url: str, fleet: Fleet) -> None:
    fleet.problem = "the service was not found"
    async with Publisher(redis_url, delivery="both", fanout=fleet, fallback_after_seconds=30) as publisher:
        receipt = await publisher.publish(Keys("k"))
    assert receipt.is_logged
    assert receipt.fanout is not None
    assert receipt.fanout.problem == "the service was not found"


async def test_a_large_invalidation_has_the_same_parts_on_both_paths(redis_url: str, fleet: Fleet) -> None:
    large = Keys(*[f"{number:04}".ljust(1_000, "x") for number in range(200)])
    async with Publisher(redis_url, delivery="both", fanout=fleet, timeout_seconds=20) as publisher:
        receipt = await publisher.publish(large, id="large")
        await until(lambda: publisher.retry_queue_length == 0)
    logged = await logged_ids(redis_url)
    assert len(logged) >= 4
    assert logged == [f"large.{number}" for number in range(1, len(logged) + 1)]
    assert all(ids_heard(pod) == logged for pod in fleet.pods)
    assert receipt.id == "large"


@pytest.mark.parametrize("delivery", SECOND_PATHS)
async def test_a_conflict_of_ids_is_raised_and_never_waits(redis_url: str, fleet: Fleet, delivery: Delivery) -> None:
    async with Publisher(redis_url, delivery=delivery, fanout=fleet, fallback_after_seconds=30) as publisher:
        await publisher.publish(Keys("k"), id="order-7")
        with pytest.raises(IdempotencyConflict, match="order-7"):
            await publisher.publish(Keys("other"), id="order-7")
        assert publisher.retry_queue_length == 0
    if delivery == "redis-then-fanout":
        assert fleet.heard == [[], [], []]


@pytest.mark.parametrize("delivery", ["fanout", *SECOND_PATHS])
async def test_users_mistakes_raise_before_anybody_is_told(redis_url: str, fleet: Fleet, delivery: Delivery) -> None:
    publisher = Publisher(redis_url, delivery=delivery, fanout=fleet)
    with pytest.raises(InvalidSettings, match=r"use it within `async with`"):
        await publisher.publish(Keys("k"))
    async with publisher:
        with pytest.raises(InvalidTarget):
            await publisher.publish()
    assert fleet.heard == [[], [], []]


# Redis is away


async def test_without_a_second_path_nobody_hears_while_redis_is_away(own_server: EmbeddedServer, fleet: Fleet) -> None:
    async with Publisher(own_server.url, timeout_seconds=0.3) as publisher:
        await asyncio.to_thread(own_server.kill)
        with pytest.raises(LinkLost):
            await publisher.publish(Keys("k"))
        assert publisher.retry_queue_length == 0
    assert fleet.heard == [[], [], []]


@pytest.mark.parametrize("delivery", SECOND_PATHS)
async def test_while_redis_is_away_everybody_hears_by_http_and_it_is_logged_once_when_it_is_back(
    own_server: EmbeddedServer, fleet: Fleet, delivery: Delivery
) -> None:
    async with Publisher(own_server.url, delivery=delivery, fanout=fleet) as publisher:
        async with redis_away(own_server):
            receipts = [await publisher.publish(Keys(f"k{number}")) for number in range(3)]
            assert [(receipt.is_logged, receipt.pending) for receipt in receipts] == [(False, True)] * 3
            assert all(receipt.fanout is not None and receipt.fanout.succeeded == 3 for receipt in receipts)
            assert publisher.retry_queue_length == 3
        await until(lambda: publisher.retry_queue_length == 0)
        again = await publisher.publish(Keys("k1"), id=receipts[1].id)
    ids = [receipt.id for receipt in receipts]
    assert (again.is_repeat, sorted(await logged_ids(own_server.url))) == (True, sorted(ids))
    assert all(ids_heard(pod)[:3] == ids for pod in fleet.pods)


@pytest.mark.parametrize("delivery", SECOND_PATHS)
@pytest.mark.parametrize(
    ("broken", "mended", "said"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "OOM"),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "READONLY"),
    ],
)
async def test_a_redis_that_refuses_is_a_redis_that_is_away(
    own_server: EmbeddedServer,
    fleet: Fleet,
    delivery: Delivery,
    broken: tuple[str, ...],
    mended: tuple[str, ...],
    said: str,
) -> None:
    async with (
        redis_probe(own_server.url) as probe,
        Publisher(own_server.url, delivery=delivery, fanout=fleet, timeout_seconds=2.0) as publisher,
    ):
        await probe.call(*broken)
        receipt = await publisher.publish(Keys("k"))
        assert (receipt.is_logged, receipt.pending) == (False, True)
        fleet.is_complete = False
        with pytest.raises(NotDelivered, match=said):
            await publisher.publish(Keys("k2"))
        await probe.call(*mended)
        await until(lambda: publisher.retry_queue_length == 0)
    assert receipt.id in await logged_ids(own_server.url)


@pytest.mark.parametrize("delivery", SECOND_PATHS)
async def test_what_neither_path_delivers_raises_with_both_reasons_and_waits_all_the_same(
    own_server: EmbeddedServer, fleet: Fleet, delivery: Delivery
) -> None:
    await fleet.pods[0].stop()
    fleet.pods[1].status = 500
    async with Publisher(own_server.url, delivery=delivery, fanout=fleet, timeout_seconds=0.3) as publisher:
        async with redis_away(own_server):
            with pytest.raises(NotDelivered) as caught:
                await publisher.publish(Keys("k"), id="order-7")
            assert publisher.retry_queue_length == 1
        error = caught.value
        assert [path for path, _ in error.reasons] == ["redis", "fanout"]
        assert "reached 1 of 3 replicas of replicas:http; unreached: http://127.0.0.1:" in error.reasons[1][1]
        assert "(status 500)" in error.reasons[1][1]
        assert (error.is_pending, error.report and error.report.failed) == (True, 2)
        assert "waits in the retry queue" in str(error)
        assert "publish again with id='order-7', which is harmless" in str(error)
        receipt = await publisher.publish(Keys("k"), id="order-7")
        await until(lambda: publisher.retry_queue_length == 0)
    assert receipt.id == "order-7"
    assert await logged_ids(own_server.url) == ["order-7"]


@pytest.mark.parametrize(
    ("total", "failed", "is_complete", "problem", "said"),
    [
        (3, 0, True, None, "reached 3 of 3"),
        (3, 1, True, None, "reached 2 of 3"),
        (3, 0, False, None, "discovery may not have named every replica"),
        (0, 0, True, None, "found no replica of r:1"),
        (0, 0, True, "SERVFAIL", "called no replica of r:1: SERVFAIL"),
    ],
)
def test_a_fan_out_is_delivered_when_everybody_is_known_and_took_it(
    total: int, failed: int, is_complete: bool, problem: str | None, said: str
) -> None:
    report = FanoutReport(
        service="r:1",
        total=total,
        succeeded=total - failed,
        failed=failed,
        complete=is_complete,
        discovery="dns",
        elapsed_ms=1.0,
        outcomes=(),
        problem=problem,
    )
    assert report.is_delivered == (said == "reached 3 of 3")
    assert said in report.summary()


def test_a_summary_names_a_few_of_many_that_were_not_reached() -> None:
    outcomes = [
        AddressOutcome(
            address=f"http://10.0.0.{number}/", status_code=None, error="refused", latency_ms=None, attempts=1
        )
        for number in range(9)
    ]
    report = FanoutReport(
        service="r:1",
        total=9,
        succeeded=0,
        failed=9,
        complete=True,
        discovery="dns",
        elapsed_ms=1.0,
        outcomes=tuple(outcomes),
    )
    assert report.summary().count("refused") == 5
    assert report.summary().endswith("and 4 more")


async def test_a_teller_that_makes_a_mistake_does_not_keep_it_from_the_retry_queue(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    fleet.mistake = RuntimeError("a bug")
    async with Publisher(own_server.url, delivery="redis-then-fanout", fanout=fleet, timeout_seconds=0.3) as publisher:
        async with redis_away(own_server):
            with pytest.raises(NotDelivered, match="RuntimeError: a bug"):
                await publisher.publish(Keys("k"), id="order-7")
        await until(lambda: publisher.retry_queue_length == 0)
    assert await logged_ids(own_server.url) == ["order-7"]


# Redis is slow


async def test_a_redis_that_hangs_is_noticed_before_its_first_attempt_is_given_up(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(
            proxy.url, delivery="redis-then-fanout", fanout=fleet, timeout_seconds=3_600, fallback_after_seconds=0.01
        ) as publisher,
    ):
        await publisher.head()
        connections_when_heard: list[int] = []
        fleet.pods[0].on_heard = lambda: connections_when_heard.append(proxy.connections_accepted)
        proxy.black_hole()
        receipt = await publisher.publish(Keys("k"))
        # A second attempt would have been made over a second connection.
        assert connections_when_heard == [1]
        assert (receipt.is_logged, receipt.pending) == (False, True)
        proxy.heal()
        await until(lambda: publisher.retry_queue_length == 0)
    assert await logged_ids(own_server.url) == [receipt.id]


async def test_without_a_second_path_nobody_hears_while_redis_hangs(own_server: EmbeddedServer, fleet: Fleet) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(proxy.url, timeout_seconds=0.3) as publisher:
        await publisher.head()
        proxy.black_hole()
        with pytest.raises(LinkLost):
            await publisher.publish(Keys("k"))
    assert fleet.heard == [[], [], []]


@pytest.mark.parametrize("delivery", SECOND_PATHS)
async def test_what_a_frozen_redis_takes_when_it_thaws_is_logged_once(
    own_server: EmbeddedServer, fleet: Fleet, delivery: Delivery
) -> None:
    async with Publisher(own_server.url, delivery=delivery, fanout=fleet, fallback_after_seconds=0.01) as publisher:
        await publisher.head()
        own_server.pause()
        receipt = await publisher.publish(Keys("k"))
        assert receipt.pending
        own_server.resume()
        await until(lambda: publisher.retry_queue_length == 0)
    assert await logged_ids(own_server.url) == [receipt.id]


async def test_an_answer_that_was_lost_is_not_logged_twice(own_server: EmbeddedServer, fleet: Fleet) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, delivery="redis-then-fanout", fanout=fleet, fallback_after_seconds=0.01) as publisher,
    ):
        await publisher.head()
        proxy.black_hole("to_client")
        receipt = await publisher.publish(Keys("k"))
        await proxy.has_discarded(1)  # Redis has logged it, and nobody knows
        proxy.heal()
        await until(lambda: publisher.retry_queue_length == 0)
    assert receipt.pending
    assert await logged_ids(own_server.url) == [receipt.id]


async def test_a_fan_out_that_has_begun_is_heard_to_its_end_although_redis_has_answered(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    fleet.pods[2].may_answer.clear()
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, delivery="redis-then-fanout", fanout=fleet, fallback_after_seconds=0.01) as publisher,
    ):
        await publisher.head()
        proxy.stall("to_server")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await until(lambda: all(fleet.heard))
        proxy.heal()
        async with Publisher(own_server.url) as reader:
            while await reader.head() is None:
                pass
        assert not publishing.done()
        fleet.pods[2].may_answer.set()
        receipt = await publishing
        assert receipt.fanout is not None
        assert receipt.fanout.succeeded == 3
        await until(lambda: publisher.retry_queue_length == 0)
    assert await logged_ids(own_server.url) == [receipt.id]


async def never(pending: Pending, on_failure: Callable[[], None]) -> Receipt:
    await asyncio.Event().wait()
    raise AssertionError


async def still_away(pending: Pending) -> Receipt:
    raise LinkLost("still away")


def pending_of(*keys: str) -> Pending:
    return Pending(invalidation_of([Keys(*keys)]), 30.0)


async def test_a_redis_that_neither_answers_nor_fails_is_waited_for_only_so_long(fleet: Fleet) -> None:
    path = SecondPath(
        "redis-then-fanout", fleet, log=never, retry_queue=RetryQueue(still_away), fallback_after_seconds=0.01
    )
    receipt = await path.deliver(pending_of("k"))
    assert receipt.pending
    assert all(ids_heard(pod) == [receipt.id] for pod in fleet.pods)
    await path.close(0)


async def test_while_the_outbox_waits_for_redis_everybody_is_called_at_once(fleet: Fleet) -> None:
    retry_queue = RetryQueue(still_away)
    path = SecondPath("redis-then-fanout", fleet, log=never, retry_queue=retry_queue, fallback_after_seconds=3_600)
    waits_for_redis = asyncio.create_task(path.deliver(pending_of("first")))
    for _ in range(10):
        await asyncio.sleep(0)
    assert retry_queue.offer(pending_of("second")) is None
    receipt = await path.deliver(pending_of("third"))
    assert receipt.pending
    assert [[each.keys for each in pod.heard] for pod in fleet.pods] == [[("third",)]] * 3
    # Nothing was in the retry queue when this one began: it gives Redis its time.
    assert not waits_for_redis.done()
    waits_for_redis.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits_for_redis
    await path.close(0)


# Cancelled and closed


async def test_a_fan_out_is_not_left_half_done_by_a_caller_who_is_cancelled(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    for pod in fleet.pods:
        pod.may_answer.clear()
    large = Keys(*[f"{number:04}".ljust(1_000, "x") for number in range(200)])
    publisher = Publisher(own_server.url, delivery="redis-then-fanout", fanout=fleet, timeout_seconds=0.3)
    await publisher.__aenter__()
    async with redis_away(own_server):
        publishing = asyncio.create_task(publisher.publish(large, id="large"))
        await until(lambda: all(fleet.heard))
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
    closing = asyncio.create_task(publisher.close(last_attempt_seconds=30))
    for _ in range(100):
        await asyncio.sleep(0)
    assert (closing.done(), fleet.closed) == (False, 0)
    for pod in fleet.pods:
        pod.may_answer.set()
    await closing
    assert fleet.closed == 1
    parts = [f"large.{number}" for number in range(1, 5)]
    assert [ids_heard(pod) for pod in fleet.pods] == [parts] * 3
    assert await logged_ids(own_server.url) == parts


async def test_a_caller_who_is_cancelled_before_the_fan_out_tells_nobody(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, delivery="redis-then-fanout", fanout=fleet, fallback_after_seconds=60) as publisher,
    ):
        await publisher.head()
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert publisher.retry_queue_length == 0
    assert fleet.heard == [[], [], []]


async def test_a_publish_that_is_under_way_when_the_publisher_closes_goes_by_http(
    own_server: EmbeddedServer, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy:
        publisher = Publisher(proxy.url, delivery="redis-then-fanout", fanout=fleet, fallback_after_seconds=60)
        async with publisher:
            await publisher.head()
            proxy.black_hole("to_client")
            publishing = asyncio.create_task(publisher.publish(Keys("k")))
            await proxy.has_discarded(1)
            await publisher.close(last_attempt_seconds=0)
        receipt = await publishing
        assert receipt.pending
        assert all(ids_heard(pod) == [receipt.id] for pod in fleet.pods)
        assert "closed with 1 invalidations that Redis has not logged" in caplog.text


async def test_an_id_of_another_scope_keeps_nothing_that_waits_from_the_log(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    async with Publisher(own_server.url, source="prices") as prices:
        await prices.publish(Keys("logged before"), id="change-7")
        await prices.publish(Keys("a"), id="change-8")
        async with Publisher(own_server.url, source="desk", delivery="both", fanout=fleet) as publisher:
            # Frozen, and not killed: its receipts are still there afterwards.
            own_server.pause()
            try:
                for id, key, scope in (("change-7", "a", "one"), ("change-7", "b", "two"), ("change-8", "a", None)):
                    assert (await publisher.publish(Keys(key), id=id, scope=scope)).pending
            finally:
                own_server.resume()
            await until(lambda: publisher.retry_queue_length == 0)
            logged = [entry.invalidation for entry in await publisher.history() if entry.invalidation is not None]
    # The first may have been left to the last, which covers it.
    logged_here = {(each.id, each.keys) for each in logged if each.source == "desk"}
    assert logged_here >= {("change-7", ("b",)), ("change-8", ("a",))}


async def test_closing_while_redis_is_away_tells_what_is_lost(
    own_server: EmbeddedServer, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    async with redis_away(own_server):
        async with Publisher(own_server.url, delivery="redis-then-fanout", fanout=fleet) as publisher:
            await publisher.publish(Keys("k"), namespace="products")
            await publisher.publish(Everything(), namespace="users")
        assert publisher.retry_queue_length == 0
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "broadcache.publisher"
    assert "closed with 2 invalidations" in record.getMessage()
    assert "products, users" in record.getMessage()


async def test_closing_when_redis_is_back_logs_what_waited(own_server: EmbeddedServer, fleet: Fleet) -> None:
    # It never tries again by itself: the last attempt is the one that logs.
    publisher = Publisher(own_server.url, delivery="both", fanout=fleet, uniform=lambda: 1_000.0)
    await publisher.__aenter__()
    async with redis_away(own_server):
        receipts = [await publisher.publish(Keys(f"k{number}")) for number in range(250)]
    await publisher.close(last_attempt_seconds=30)
    assert sorted(await logged_ids(own_server.url)) == sorted(receipt.id for receipt in receipts)


async def test_a_publisher_with_a_second_path_can_be_closed_at_any_time_and_entered_again(
    redis_url: str, fleet: Fleet
) -> None:
    publisher = Publisher(redis_url, delivery="both", fanout=fleet, fallback_after_seconds=30)
    await publisher.close()
    for sequence in (1, 2):
        async with publisher:
            assert position_of(await publisher.publish(Keys("k"))).sequence == sequence
            await publisher.close()
            await publisher.close()
    assert (fleet.entered, fleet.closed) == (2, 2)


# The retry queue is bounded


async def test_a_full_outbox_becomes_coarser_and_what_it_logs_covers_all_of_it(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    async with Publisher(
        own_server.url, delivery="redis-then-fanout", fanout=fleet, retry_queue_names_max=10
    ) as publisher:
        async with redis_away(own_server):
            for number in range(15):
                assert (await publisher.publish(Keys(f"product:{number}"))).pending
            assert publisher.retry_queue_length <= 10
        await until(lambda: publisher.retry_queue_length == 0)
        logged = [entry.invalidation for entry in await publisher.history() if entry.invalidation is not None]
    for number in range(15):
        key = f"product:{number}"
        assert any(key in each.keys or any(map(key.startswith, each.prefixes)) for each in logged)
    assert any(each.prefixes == ("product:",) for each in logged)


async def test_more_namespaces_than_the_outbox_holds_are_refused_aloud(
    own_server: EmbeddedServer, fleet: Fleet
) -> None:
    async with Publisher(
        own_server.url, delivery="redis-then-fanout", fanout=fleet, retry_queue_names_max=1, timeout_seconds=0.3
    ) as publisher:
        async with redis_away(own_server):
            await publisher.publish(Keys("k"), namespace="one")
            with pytest.raises(NotDelivered, match="it is not tried again") as caught:
                await publisher.publish(Keys("k"), namespace="two")
        assert [path for path, _ in caught.value.reasons] == ["redis", "retry_queue"]
        assert not caught.value.is_pending
        await until(lambda: publisher.retry_queue_length == 0)


# By HTTP alone


async def test_a_fan_out_alone_needs_no_redis_and_logs_nothing(fleet: Fleet) -> None:
    async with Publisher(None, delivery="fanout", fanout=fleet) as publisher:
        receipt = await publisher.publish(Keys("k"), namespace="products")
        assert (receipt.position, receipt.pending, publisher.retry_queue_length) == (None, False, 0)
        assert all(ids_heard(pod) == [receipt.id] for pod in fleet.pods)
        for read in (publisher.head, publisher.history):
            with pytest.raises(InvalidSettings, match="this publisher has no log"):
                await read()


async def test_a_fan_out_alone_that_misses_somebody_is_not_delivered_and_not_tried_again(fleet: Fleet) -> None:
    fleet.pods[1].status = 503
    async with Publisher(None, delivery="fanout", fanout=fleet) as publisher:
        with pytest.raises(NotDelivered, match="it is not tried again") as caught:
            await publisher.publish(Keys("k"))
        assert [path for path, _ in caught.value.reasons] == ["fanout"]
        assert (caught.value.is_pending, publisher.retry_queue_length) == (False, 0)


# Settings


@pytest.mark.parametrize(
    ("url", "delivery", "has_fanout", "said"),
    [
        (None, "redis", False, "expected a url"),
        (None, "both", True, "expected a url"),
        (None, "redis-then-fanout", True, "expected a url"),
        ("redis://127.0.0.1", "redis", True, "expected no fanout"),
        ("redis://127.0.0.1", "both", False, "expected a fanout"),
        ("redis://127.0.0.1", "redis-then-fanout", False, "expected a fanout"),
        (None, "fanout", False, "expected a fanout"),
        ("redis://127.0.0.1", "http", True, "one of redis, fanout, redis-then-fanout, both, got 'http'"),
    ],
)
def test_a_delivery_and_what_it_needs_go_together(url: str | None, delivery: Any, has_fanout: bool, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        Publisher(url, delivery=delivery, fanout=Fleet([]) if has_fanout else None)


@pytest.mark.parametrize(
    "arguments",
    [{"fallback_after_seconds": -1}, {"fallback_after_seconds": float("nan")}, {"retry_queue_names_max": 0}],
)
def test_settings_of_the_second_path_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(arguments))):
        Publisher(None, delivery="fanout", fanout=Fleet([]), **arguments)


# The HTTP API


@asynccontextmanager
async def client_of(publisher: Publisher) -> AsyncIterator[httpx2.AsyncClient]:
    app = create_app(ApiSettings(), publisher=publisher)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://publisher", timeout=30) as client,
    ):
        yield client


async def test_the_api_says_which_path_reached_whom(own_server: EmbeddedServer, fleet: Fleet) -> None:
    publisher = Publisher(own_server.url, delivery="redis-then-fanout", fanout=fleet, timeout_seconds=0.5)
    async with redis_away(own_server), client_of(publisher) as client:
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        accepted = await client.post("/invalidations", json={"keys": ["k"]})
        assert accepted.status_code == 200
        answer = accepted.json()
        assert [answer[name] for name in ("epoch", "sequence", "receivers", "logged", "pending")] == [
            None, None, 0, False, True,
        ]  # fmt: skip
        assert (answer["fanout"]["service"], answer["fanout"]["succeeded"]) == ("replicas:http", 3)
        assert {outcome["status_code"] for outcome in answer["fanout"]["outcomes"]} == {200}
        # Whoever took it out of service now would close the second path too.
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "degraded"})


async def test_the_api_answers_503_with_the_reasons_of_both_paths(own_server: EmbeddedServer, fleet: Fleet) -> None:
    fleet.problem = "the service was not found"
    publisher = Publisher(own_server.url, delivery="redis-then-fanout", fanout=fleet, timeout_seconds=0.3)
    async with redis_away(own_server), client_of(publisher) as client:
        answer = await client.post("/invalidations", json={"keys": ["k"]})
        assert publisher.retry_queue_length == 1
    problem = answer.json()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert problem["type"] == "urn:broadcache:problem:not-delivered"
    assert [reason["path"] for reason in problem["reasons"]] == ["redis", "fanout"]
    assert "the service was not found" in problem["reasons"][1]["detail"]
    assert "it waits to be logged" in problem["detail"]


async def test_the_api_of_a_fan_out_alone_has_no_history(fleet: Fleet) -> None:
    async with client_of(Publisher(None, delivery="fanout", fanout=fleet)) as client:
        assert (await client.post("/invalidations", json={"keys": ["k"]})).json()["logged"] is False
        answer = await client.get("/invalidations")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:broadcache:problem:log-missing")
        assert (await client.get("/health/ready")).json() == {"status": "ready"}


def test_an_api_that_is_to_fan_out_and_cannot_says_so() -> None:
    with pytest.raises(InvalidSettings, match="BROADCACHE_FANOUT_SERVICE: expected service:port"):
        create_app(ApiSettings(delivery="both"))


@pytest.mark.parametrize("failure", [LinkLost("gone"), LogRefused("OOM")])
async def test_the_log_is_given_up_with_its_own_reason(fleet: Fleet, failure: Exception) -> None:
    async def fails(pending: Pending, on_failure: Callable[[], None]) -> Receipt:
        raise failure

    fleet.problem = "SERVFAIL"
    path = SecondPath("both", fleet, log=fails, retry_queue=RetryQueue(still_away), fallback_after_seconds=3_600)
    with pytest.raises(NotDelivered) as caught:
        await path.deliver(pending_of("k"))
    assert caught.value.reasons[0] == ("redis", str(failure))
    await path.close(0)

"""What closing waits for, and what the errors of a publish may claim."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

import pytest
from tests.publisher.publishing.test_delivery import never, pending_of
from tests.support.tcp_proxy import TcpProxy

from broadcache.publisher import Publisher
from broadcache.publisher.publishing.retry_queue import RetryQueue
from broadcache.publisher.publishing.second_path import SecondPath
from broadcache.shared import FanoutReport, Keys, LinkLost, NotDelivered
from broadcache.shared.errors import NotConnected
from broadcache.shared.transport.redis.embedded import EmbeddedServer

pytestmark = pytest.mark.anyio


class Stuck:
    """A sender of a user that never returns from `send`. Neither does its `close`, if `closes` is false."""

    def __init__(self, *, closes: bool = True, ends_when_cancelled: bool = True) -> None:
        self.sending = asyncio.Event()
        self.released = asyncio.Event()
        self.cancelled = 0
        self._closes = closes
        self._ends_when_cancelled = ends_when_cancelled

    async def __aenter__(self) -> Self:
        return self

    async def close(self) -> None:
        if not self._closes:
            await asyncio.Event().wait()

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        self.sending.set()
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if self._ends_when_cancelled:
                    raise
        raise AssertionError("released by the test")


def path_of(sender: Stuck, delivery: Any, tried: list[Any]) -> SecondPath:
    async def log_later(pending: Any) -> None:
        tried.append(pending)
        raise LinkLost("away")

    return SecondPath(
        delivery,
        sender,
        log=never,
        retry_queue=RetryQueue(log_later),
        fallback_after_seconds=0.01,
        fanout_seconds_max=0.05,
    )


@pytest.mark.parametrize("delivery", ["fanout", "redis-then-fanout", "both"])
async def test_a_sender_that_never_returns_does_not_keep_the_publisher_from_closing(
    delivery: str, caplog: pytest.LogCaptureFixture
) -> None:
    sender, tried = Stuck(), list[Any]()
    path = path_of(sender, delivery, tried)
    delivering = asyncio.create_task(path.deliver(pending_of("k")))
    await sender.sending.wait()
    await path.close(last_attempt_seconds=1)
    with pytest.raises(NotDelivered, match="the publisher closed, and the fan-out had not ended"):
        await delivering
    assert sender.cancelled == 1
    # With a log, what the sender did not deliver was tried once more before the publisher closed.
    assert bool(tried) == (delivery != "fanout")
    assert "`send` of an InvalidationSender must return in bounded time" in caplog.text


async def test_a_sender_that_ignores_its_cancellation_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    sender = Stuck(ends_when_cancelled=False)
    path = path_of(sender, "fanout", [])
    delivering = asyncio.create_task(path.deliver(pending_of("k")))
    await sender.sending.wait()
    await path.close(last_attempt_seconds=0)
    assert "1 fan-outs ignore their cancellation" in caplog.text
    sender.released.set()
    with pytest.raises(NotDelivered, match="released by the test"):
        await delivering


async def test_a_sender_that_does_not_close_does_not_keep_the_publisher_from_closing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = path_of(Stuck(closes=False), "both", [])
    await path.close(last_attempt_seconds=0)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "had not closed" in caplog.text


async def test_without_any_connection_the_error_says_that_nothing_was_logged(own_server: EmbeddedServer) -> None:
    own_server.kill()
    async with Publisher(own_server.url, timeout_seconds=0.3) as publisher:
        with pytest.raises(NotConnected, match="and nothing was logged") as raised:
            await publisher.publish(Keys("k"))
    assert "may have been logged" not in str(raised.value)


async def test_once_a_command_was_sent_the_error_says_that_it_may_have_been_logged(own_server: EmbeddedServer) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, timeout_seconds=2) as publisher,
    ):
        await publisher.head()
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)
        own_server.kill()  # all further attempts find no server: the first one counts
        with pytest.raises(LinkLost, match="may have been logged") as raised:
            await publishing
    assert not isinstance(raised.value, NotConnected)


async def test_a_proxy_that_accepts_and_never_answers_has_logged_nothing(own_server: EmbeddedServer) -> None:
    """The connection is open, and its first commands, which are not the publish, get no answer."""
    async with TcpProxy("127.0.0.1", own_server.port) as proxy:
        proxy.black_hole("to_client")
        async with Publisher(proxy.url, timeout_seconds=0.5) as publisher:
            with pytest.raises(NotConnected, match="and nothing was logged"):
                await publisher.publish(Keys("k"), id="once")
    async with Publisher(own_server.url) as publisher:
        assert await publisher.history() == []

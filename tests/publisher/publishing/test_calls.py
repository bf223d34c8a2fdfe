"""Calls to the log: which failures are retried over a new link, and when a call ends."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from broadcache.publisher.publishing.calls import Calls
from broadcache.shared import InvalidSettings, LinkLost, LogRefused
from broadcache.shared.errors import NotPrimary
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.link import Link

pytestmark = pytest.mark.anyio


class Work:
    """Raises these errors, one for each attempt, and then returns how many links it has used."""

    def __init__(self, *errors: Exception) -> None:
        self.links: list[Link] = []
        self._errors = list(errors)

    async def __call__(self, link: Link) -> int:
        self.links.append(link)
        assert await link.call("PING") == b"PONG"
        if self._errors:
            raise self._errors.pop(0)
        return len(set(self.links))


@asynccontextmanager
async def calls_to(
    url: str | None, *, timeout_seconds: float = 5.0, uniform: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[Calls]:
    address = None if url is None else RedisAddress(url)
    calls = Calls(address, timeout_seconds=timeout_seconds, uniform=uniform)
    calls.open()
    try:
        yield calls
    finally:
        await calls.close()


@pytest.mark.parametrize("error", [LinkLost("gone"), NotPrimary("READONLY")])
async def test_a_lost_link_and_a_server_that_is_no_primary_are_left_for_a_new_link(
    redis_url: str, error: Exception
) -> None:
    failures = 0

    def count_failure() -> None:
        nonlocal failures
        failures += 1

    work = Work(error)
    async with calls_to(redis_url) as calls:
        assert await calls.with_retries("default", work, count_failure) == 2
        assert failures == 1
        assert [link.is_open for link in work.links] == [False, True]


async def test_a_refusal_is_raised_at_once_and_the_link_is_kept(redis_url: str) -> None:
    work = Work(LogRefused("OOM"))
    async with calls_to(redis_url) as calls:
        with pytest.raises(LogRefused, match="OOM"):
            await calls.with_retries("default", work)
        assert await calls.with_retries("default", work) == 1


async def test_what_was_lost_before_it_was_refused_may_have_been_logged(redis_url: str) -> None:
    async with calls_to(redis_url) as calls:
        with pytest.raises(LinkLost, match="gone; besides: OOM"):
            await calls.with_retries("default", Work(LinkLost("gone"), LogRefused("OOM")))


async def test_when_the_time_is_up_what_was_lost_and_what_was_refused_are_both_named(redis_url: str) -> None:
    async with calls_to(redis_url, timeout_seconds=1.0, uniform=lambda: 1.0) as calls:
        with pytest.raises(LinkLost, match="gone; besides: READONLY"):
            await calls.with_retries("default", Work(LinkLost("gone"), *[NotPrimary("READONLY")] * 1_000))


async def test_once_does_not_retry(redis_url: str) -> None:
    work = Work(LinkLost("gone"))
    async with calls_to(redis_url) as calls:
        with pytest.raises(LinkLost, match="gone"):
            await calls.once("default", work)
        assert len(work.links) == 1
        assert not work.links[0].is_open


async def test_a_call_ends_with_its_attempt_when_retries_are_stopped_and_a_single_attempt_still_works(
    redis_url: str,
) -> None:
    async with calls_to(redis_url, timeout_seconds=3_600) as calls:
        call = asyncio.create_task(calls.with_retries("default", Work(LinkLost("gone")), calls.stop_retries))
        with pytest.raises(LinkLost, match="closed"):
            await call
        with pytest.raises(InvalidSettings, match=r"use it within `async with`"):
            await calls.with_retries("default", Work())
        assert await calls.once("default", Work()) == 1


async def test_calls_without_a_log_say_so() -> None:
    async with calls_to(None) as calls:
        for call in (calls.with_retries, calls.once):
            with pytest.raises(InvalidSettings, match="no log"):
                await call("default", Work())


async def test_an_outage_and_its_end_are_logged_once_each(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="broadcache.publisher")
    async with calls_to(redis_url) as calls:
        for _ in range(2):
            caplog.clear()
            await calls.with_retries("default", Work(*[LinkLost("gone")] * 3))
            began, ended = caplog.records
            assert (began.levelno, ended.levelno) == (logging.WARNING, logging.INFO)
            assert "does not answer as a primary" in began.getMessage()
            assert began.getMessage().endswith(": gone")
            assert "answers again after " in ended.getMessage()
            assert "3 failed attempts" in ended.getMessage()


async def test_a_refusal_is_logged_once_until_the_namespace_is_accepted(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="broadcache.publisher")
    async with calls_to(redis_url) as calls:
        for _ in range(3):
            with pytest.raises(LogRefused):
                await calls.with_retries("products", Work(LogRefused("NOPERM")))
            await calls.with_retries("users", Work())
        [refused] = caplog.records
        assert (refused.levelno, refused.getMessage().endswith("refuses calls: NOPERM")) == (logging.WARNING, True)
        await calls.with_retries("products", Work())
        assert "refuses no more calls" in caplog.records[-1].getMessage()
        assert len(caplog.records) == 2


async def test_a_link_that_cannot_be_opened_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with calls_to("redis://127.0.0.1:1", timeout_seconds=0.3) as calls:
        for _ in range(3):
            with pytest.raises(LinkLost):
                await calls.with_retries("default", Work())
    assert len([each for each in caplog.records if each.name.startswith("broadcache.publisher")]) == 1

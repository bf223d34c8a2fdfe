"""Loaders that wait for a read of their own key: each ends, also where the context says nothing about the loader."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.waiting import until, wait_until

from broadcache.subscriber import LocalCache
from broadcache.subscriber.cache.loading import loads as loads_module

pytestmark = pytest.mark.anyio

KEY = "product:42"
DEADLINE_SECONDS = 20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MIN", 0.05)
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MAX", 0.05)


def coherent_cache() -> LocalCache:
    cache = LocalCache({})
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


def read(cache: LocalCache) -> Any:
    return cache.get_or_load_sync(KEY, lambda: "inner")


def read_in_a_loop_of_its_own(cache: LocalCache) -> Any:
    async def load() -> str:
        return "inner"

    return asyncio.run(cache.get_or_load(KEY, load))


async def by_to_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def by_run_in_executor(work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def by_a_thread_of_its_own(work: Callable[[], Any]) -> Any:
    ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(ended.set_result, work()), daemon=True).start()
    return await ended


@pytest.mark.parametrize("reader", [read, read_in_a_loop_of_its_own])
@pytest.mark.parametrize("hop", [by_to_thread, by_run_in_executor, by_a_thread_of_its_own])
async def test_a_loader_that_reads_its_own_key_in_another_thread_ends(
    hop: Callable[[Callable[[], Any]], Awaitable[Any]], reader: Callable[[LocalCache], Any], impatient: None
) -> None:
    cache = coherent_cache()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await cache.get_or_load(KEY, lambda: hop(lambda: reader(cache))) == "inner"
        assert await cache.get_or_load(KEY, lambda: "unused") == "inner"


async def test_without_that_rule_it_waits_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the inner read still waits when everything else has come to rest."""
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MIN", DEADLINE_SECONDS)
    cache = coherent_cache()
    ended = threading.Event()

    def inner() -> Any:
        try:
            return read(cache)
        finally:
            ended.set()

    reading = asyncio.ensure_future(cache.get_or_load(KEY, lambda: by_run_in_executor(inner)))
    await until(lambda: cache.stats().shared_loads == 1, "the inner read")
    assert not await asyncio.to_thread(ended.wait, 0.5)
    reading.cancel()  # ends the load, and with it the wait: the inner read loads by itself
    await until(ended.is_set, "the end of the inner read")


async def test_a_loader_that_asks_another_task_ends(impatient: None) -> None:
    cache = coherent_cache()
    requests: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()

    async def serve() -> None:
        while True:
            request = await requests.get()
            request.set_result(await cache.get_or_load(KEY, lambda: "inner"))

    async def load() -> Any:
        request: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        requests.put_nowait(request)
        return await request

    server = asyncio.ensure_future(serve())
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await cache.get_or_load(KEY, load) == "inner"
    server.cancel()


def test_a_blocking_loader_that_hands_its_read_to_a_pool_ends(impatient: None) -> None:
    cache = coherent_cache()
    with ThreadPoolExecutor(1) as pool:
        outer = ThreadPoolExecutor(1).submit(
            cache.get_or_load_sync, KEY, lambda: pool.submit(read, cache).result(DEADLINE_SECONDS)
        )
        assert outer.result(DEADLINE_SECONDS) == "inner"


async def test_a_pool_whose_threads_all_wait_for_a_load_that_needs_one_of_them_goes_on(impatient: None) -> None:
    cache = coherent_cache()
    with ThreadPoolExecutor(2) as pool:
        loop = asyncio.get_running_loop()
        gate = asyncio.Event()

        async def load() -> Any:
            await gate.wait()
            return await loop.run_in_executor(pool, lambda: "loaded")

        first = asyncio.ensure_future(cache.get_or_load(KEY, load))
        await until(lambda: cache.stats().loads == 1)
        others = [loop.run_in_executor(pool, read, cache) for _ in range(2)]
        await until(lambda: cache.stats().shared_loads == 2)
        gate.set()
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert set(await asyncio.gather(*others)) <= {"inner", "loaded"}
            assert await first == "loaded"


async def test_callers_of_a_slow_load_begin_one_more_together_and_take_the_value_that_comes_first(
    impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Honest callers: a load that takes longer than their patience costs one more load, not one for each of them."""
    cache = coherent_cache()
    gate = asyncio.Event()

    async def slow() -> str:
        await gate.wait()
        return "slow"

    first = asyncio.ensure_future(cache.get_or_load(KEY, slow))
    await until(lambda: cache.stats().loads == 1)
    never = asyncio.Event()

    async def slower() -> str:
        await never.wait()
        return "slower"

    others = [asyncio.ensure_future(cache.get_or_load(KEY, slower)) for _ in range(20)]
    await until(lambda: cache.stats().shared_loads == 20 + 19, "the second load, and its callers")
    assert cache.stats().loads == 2
    gate.set()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await asyncio.gather(first, *others) == ["slow"] * 21
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "use asyncio.to_thread" in warning.getMessage()
    assert KEY not in warning.getMessage()


def test_threads_that_wait_for_a_slow_load_get_its_value() -> None:
    cache = coherent_cache()
    gate = threading.Event()

    def slow() -> str:
        gate.wait(DEADLINE_SECONDS)
        return "slow"

    with ThreadPoolExecutor(10) as pool:
        reads = [pool.submit(cache.get_or_load_sync, KEY, slow) for _ in range(10)]
        wait_until(lambda: cache.stats().shared_loads == 9, "the callers")
        gate.set()
        assert [each.result(DEADLINE_SECONDS) for each in reads] == ["slow"] * 10
    assert cache.stats().loads == 1

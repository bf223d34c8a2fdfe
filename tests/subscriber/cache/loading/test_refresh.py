"""Old entries: a hit is served, and loaded again in the background."""

import asyncio
import contextvars
import logging
import threading
from datetime import timedelta
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from tests.support.fake_clock import FakeClock
from tests.support.waiting import wait_until

from broadcache.shared import Everything, InvalidSettings, Keys, Prefixes, Tags, Target
from broadcache.subscriber import Loaded, LocalCache
from broadcache.subscriber.cache.loading import refresh as refresh_module

pytestmark = pytest.mark.anyio

KEY = "product:42"
TAG = "catalogue"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("product:"), Everything())
REFRESH_AFTER_SECONDS = 60

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


class Scene:
    """A cache that refreshes, and a source that answers when it is let go."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.cache: LocalCache = LocalCache(
            TTLCache(100, 300, timer=self.clock),
            clock=self.clock,
            max_staleness_seconds=10_000,
            refresh_after_seconds=REFRESH_AFTER_SECONDS,
            **options,
        )
        self.cache.confirm_coherent(self.clock())
        self.value: Any = "old"
        self.calls = 0
        self.contexts: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.sync_gate = threading.Event()
        self.sync_gate.set()

    def _read(self) -> Any:
        self.calls += 1
        self.contexts.append(request_id.get())
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    async def load(self) -> Any:
        value = self._read()
        await self.gate.wait()
        return value

    def load_sync(self) -> Any:
        value = self._read()
        assert self.sync_gate.wait(20)
        return value

    async def read(self) -> Any:
        return await self.cache.get_or_load(KEY, self.load, tags=(TAG,))

    def read_sync(self) -> Any:
        return self.cache.get_or_load_sync(KEY, self.load_sync, tags=(TAG,))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def wait(self, calls: int) -> None:
        wait_until(lambda: self.calls == calls and not self.cache.loads._running, "the refresh")


async def test_a_hit_that_is_old_is_served_and_refreshed_once() -> None:
    scene = Scene()
    assert await scene.read() == "old"
    scene.value = "new"
    scene.clock.now += REFRESH_AFTER_SECONDS - 1
    assert await scene.read() == "old"
    await scene.settle()
    assert scene.calls == 1
    scene.clock.now += 1
    scene.gate.clear()
    for _ in range(10):
        assert await scene.read() == "old"
        await scene.settle()
    assert scene.calls == 2
    scene.gate.set()
    await scene.settle()
    assert await scene.read() == "new"
    assert scene.calls == 2
    assert scene.cache.stats().loads == 2
    scene.cache.apply(Tags(TAG))
    assert KEY not in scene.cache


def test_a_blocking_hit_is_refreshed_in_a_thread_of_its_own() -> None:
    scene = Scene()
    assert scene.read_sync() == "old"
    scene.value = "new"
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.sync_gate.clear()
    assert [scene.read_sync() for _ in range(5)] == ["old"] * 5
    scene.sync_gate.set()
    scene.wait(calls=2)
    assert scene.read_sync() == "new"


async def test_the_lifetime_begins_anew() -> None:
    scene = Scene()
    for _ in range(10):
        assert await scene.read() == "old"
        await scene.settle()
        scene.clock.now += 100
    assert scene.cache.stats().misses == 1


async def test_a_refresh_does_not_run_in_the_context_of_its_caller() -> None:
    scene = Scene()
    request_id.set("first")
    await scene.read()
    scene.clock.now += REFRESH_AFTER_SECONDS
    await scene.read()
    await scene.settle()
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.read_sync()
    await asyncio.to_thread(scene.wait, 3)
    assert scene.contexts == ["first", "none", "none"]


@pytest.mark.parametrize("target", TARGETS)
async def test_a_refresh_stores_nothing_that_was_invalidated_meanwhile(target: Target) -> None:
    scene = Scene()
    await scene.read()
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.gate.clear()
    await scene.read()
    await scene.settle()
    scene.cache.apply(target)
    scene.value = "new"
    late = asyncio.ensure_future(scene.read())  # a miss, which joins no load that is void
    await scene.settle()
    scene.gate.set()
    assert await late == "new"
    await scene.settle()
    assert scene.cache.get(KEY) == "new"
    assert scene.cache.stats().voided_fills == 1


async def test_a_refresh_whose_value_brings_an_invalidated_tag_stores_nothing() -> None:
    scene = Scene()
    scene.value = Loaded("old", tags=("shop:7",))
    await scene.read()
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.gate.clear()
    await scene.read()
    await scene.settle()
    scene.cache.apply(Tags("shop:7"))
    assert KEY not in scene.cache
    late = asyncio.ensure_future(scene.read())
    await scene.settle()
    scene.value = "new"
    scene.gate.set()
    assert await late == "new"  # it joined the refresh, which read the source before the invalidation
    assert scene.cache.get(KEY) == "new"


async def test_a_refresh_goes_on_when_a_caller_that_joined_it_leaves() -> None:
    scene = Scene()
    await scene.read()
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.gate.clear()
    await scene.read()
    await scene.settle()
    scene.cache._entries.drop(KEY)  # evicted
    joined = asyncio.ensure_future(scene.read())
    await scene.settle()
    joined.cancel()
    await scene.settle()
    scene.gate.set()
    await scene.settle()
    assert scene.cache.get(KEY) == "old"
    assert scene.calls == 2


async def test_a_refresh_that_fails_leaves_the_value_and_is_tried_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene()
    await scene.read()
    scene.value = LookupError("secret")
    for attempt in range(3):
        scene.clock.now += REFRESH_AFTER_SECONDS
        for _ in range(3):
            assert await scene.read() == "old"
            await scene.settle()
        assert scene.calls == attempt + 2
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "a refresh failed with LookupError" in record.getMessage()
    assert "secret" not in record.getMessage()
    scene.clock.now += 300 - 3 * REFRESH_AFTER_SECONDS
    with pytest.raises(LookupError):
        await scene.read()


async def test_none_and_what_is_not_to_be_stored_drop_the_old_value() -> None:
    for value in (None, Loaded("new", store=False)):
        scene = Scene()
        await scene.read()
        scene.value = value
        scene.clock.now += REFRESH_AFTER_SECONDS
        assert await scene.read() == "old"
        await scene.settle()
        assert KEY not in scene.cache


async def test_an_entry_that_was_stored_by_hand_is_refreshed_after_its_first_hit() -> None:
    scene = Scene()
    scene.cache[KEY] = "by hand"
    for _ in range(2):
        assert await scene.read() == "by hand"
        scene.clock.now += REFRESH_AFTER_SECONDS
    await scene.settle()
    assert scene.calls == 1
    assert await scene.read() == "old"


async def test_many_keys_are_refreshed_with_one_query() -> None:
    scene = Scene()
    queries: list[list[str]] = []

    async def load(keys: list[str]) -> dict[str, int]:
        queries.append(keys)
        await scene.gate.wait()
        return dict.fromkeys(keys, len(queries))

    assert await scene.cache.get_or_load_many(["a", "b", "c"], load) == {"a": 1, "b": 1, "c": 1}
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.gate.clear()
    for _ in range(2):
        assert await scene.cache.get_or_load_many(["a", "b"], load) == {"a": 1, "b": 1}
        await scene.settle()
    scene.cache.apply(Keys("b"))
    scene.gate.set()
    await scene.settle()
    assert queries == [["a", "b", "c"], ["a", "b"]]
    assert dict(scene.cache.items()) == {"a": 2, "c": 1}
    scene.clock.now += REFRESH_AFTER_SECONDS
    assert scene.cache.get_or_load_many_sync(["a"], lambda keys: dict.fromkeys(keys, 3)) == {"a": 2}
    wait_until(lambda: scene.cache.get("a") == 3, "the refresh")


async def test_cached_functions_are_refreshed() -> None:
    scene = Scene()

    @scene.cache.cached("async:{n}")
    async def load(n: int) -> Any:
        return await scene.load()

    @scene.cache.cached("sync:{n}")
    def load_sync(n: int) -> Any:
        return scene.load_sync()

    assert (await load(1), load_sync(1)) == ("old", "old")
    scene.value = "new"
    scene.clock.now += REFRESH_AFTER_SECONDS
    assert (await load(1), load_sync(1)) == ("old", "old")
    await scene.settle()
    await asyncio.to_thread(scene.wait, 4)
    assert (await load(1), load_sync(1)) == ("new", "new")


def test_blocking_refreshes_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh_module, "_THREADS_MAX", 2)
    scene = Scene()
    keys = ["a", "b", "c"]

    def read() -> list[Any]:
        return [scene.cache.get_or_load_sync(key, scene.load_sync) for key in keys]

    read()
    scene.value = "new"
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.sync_gate.clear()
    assert read() == ["old"] * 3
    wait_until(lambda: scene.calls == 5, "two refreshes")
    assert read() == ["old"] * 3
    scene.sync_gate.set()
    scene.wait(calls=5)
    assert read() == ["new", "new", "old"]
    scene.wait(calls=6)
    assert read() == ["new"] * 3


def test_a_thread_that_cannot_start_is_no_error_of_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.read_sync()
    scene.clock.now += REFRESH_AFTER_SECONDS

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert scene.read_sync() == "old"
    assert not scene.cache.loads._running
    scene.clock.now += REFRESH_AFTER_SECONDS
    scene.read_sync()
    scene.wait(calls=2)


def test_the_ages_that_are_remembered_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh_module, "_REMEMBERED_MAX", 10)
    cache = LocalCache(LRUCache(1_000), refresh_after_seconds=60)
    cache.confirm_coherent(cache.clock() + 3_600)
    for number in range(1_000):
        cache.get_or_load_sync(f"p:{number}", lambda: 1)
        assert len(cache.loads._due) <= 10


@pytest.mark.parametrize("name", ["refresh_after_seconds", "load_timeout_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "x", timedelta(0)])
def test_durations_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidSettings, match=f"expected {name} to be"):
        LocalCache({}, **{name: value})
    LocalCache({}, **{name: timedelta(seconds=1)})  # type: ignore[arg-type]

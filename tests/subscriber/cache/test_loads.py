"""Shared loads: concurrent misses on one key wait for one call of the loader."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
from cachetools import LRUCache
from tests.support.fake_clock import FakeClock

from broadcache.shared import Everything, InvalidLoader, Keys, Prefixes, Tags, Target
from broadcache.subscriber import LoadToken, LocalCache
from broadcache.subscriber.cache.loading import loads as loads_module
from broadcache.subscriber.cache.loading.load import Load, within

pytestmark = pytest.mark.anyio

KEY = "product:42"
TAG = "catalogue"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("product:"), Everything())
DEADLINE_SECONDS = 20


def coherent_cache(**options: Any) -> LocalCache:
    cache = LocalCache({}, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


class Source:
    """A loader that reads `value` when it is called, and returns it when it is let go."""

    def __init__(self, value: Any = "value") -> None:
        self.value = value
        self.calls = 0
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def load(self) -> Any:
        self.calls += 1
        value = self.value
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(value, Exception):
            raise value
        return value


async def settled() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def in_thread(work: Callable[[], Any]) -> "concurrent.futures.Future[Any]":
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits)
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


async def answered(waiting: Awaitable[Any]) -> Any:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await waiting


# --- one load for all ------------------------------------------------------------------------------------------------


async def test_a_hundred_concurrent_misses_are_one_load() -> None:
    cache, source = coherent_cache(), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(100)]
    await settled()
    source.gate.set()
    assert await asyncio.gather(*callers) == ["value"] * 100
    assert source.calls == 1
    stats = cache.stats()
    assert (stats.loads, stats.shared_loads, stats.misses) == (1, 99, 100)
    assert await cache.get_or_load(KEY, source.load) == "value"
    assert source.calls == 1


class MinimalCache:
    """The four things that loads need of a cache, and nothing else."""

    max_staleness_seconds = 5.0

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}

    def begin_load(self, key: str) -> LoadToken:
        return LoadToken(key, 1, 0.0)

    def is_void(self, token: LoadToken, tags: Iterable[str] = ()) -> bool:
        return False

    def store(
        self, token: LoadToken, value: Any, *, tags: Iterable[str] = (), ttl_seconds: float | None = None
    ) -> bool:
        self.stored[token.key] = value
        return True


async def test_loads_need_four_things_of_a_cache() -> None:
    cache = MinimalCache()
    loads = loads_module.Loads(cache, threading.RLock(), cache.stored.get)
    assert await loads.load(KEY, lambda: "value", (), None) == "value"
    assert cache.stored == {KEY: "value"}
    assert loads.load_sync(KEY, lambda: "newer", (), None) == "value"
    assert (loads.started, loads.shared) == (1, 0)


async def test_misses_on_different_keys_do_not_wait_for_each_other() -> None:
    cache, slow = coherent_cache(), Source()
    waiting = asyncio.ensure_future(cache.get_or_load("slow", slow.load))
    await settled()
    assert await cache.get_or_load("fast", lambda: "at once") == "at once"
    slow.gate.set()
    assert await waiting == "value"


async def test_a_cancelled_caller_cancels_nobody_else() -> None:
    cache, source = coherent_cache(), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(3)]
    await settled()
    callers[0].cancel()  # the one that began the load
    await settled()
    source.gate.set()
    assert await asyncio.gather(*callers[1:]) == ["value", "value"]
    assert callers[0].cancelled()
    assert (source.calls, source.cancelled) == (1, 0)
    assert cache.get(KEY) == "value"


async def test_the_last_cancelled_caller_ends_the_load() -> None:
    cache, source = coherent_cache(), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(3)]
    await settled()
    for caller in callers:
        caller.cancel()
    await settled()
    assert all(caller.cancelled() for caller in callers)
    assert source.cancelled == 1
    assert await cache.get_or_load(KEY, lambda: "new") == "new"


async def test_an_exception_reaches_all_and_is_not_stored() -> None:
    cache, source = coherent_cache(), Source(LookupError("no such product"))
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(10)]
    await settled()
    source.gate.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no such product"] * 10
    assert source.calls == 1
    assert await cache.get_or_load(KEY, lambda: "there now") == "there now"


async def test_none_is_given_to_all_and_stored_only_with_a_negative_ttl() -> None:
    for options, loads in (({}, 2), ({"negative_ttl_seconds": 10}, 1)):
        cache, source = coherent_cache(**options), Source(None)
        source.gate.set()
        assert await cache.get_or_load(KEY, source.load) is None
        assert await cache.get_or_load(KEY, source.load) is None
        assert source.calls == loads


async def test_a_value_too_large_is_given_to_all_and_not_stored() -> None:
    cache = LocalCache(LRUCache(maxsize=3, getsizeof=len))
    cache.confirm_coherent(cache.clock() + 60)
    source = Source("too large")
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(3)]
    source.gate.set()
    assert await asyncio.gather(*callers) == ["too large"] * 3
    assert KEY not in cache
    assert cache.stats().refused_fills == 1


async def test_a_load_stores_its_tags_and_its_lifetime() -> None:
    clock = FakeClock()
    cache = coherent_cache(clock=clock)
    await cache.get_or_load(KEY, lambda: 1, tags=[TAG], ttl_seconds=10)
    clock.now += 10
    assert cache.get(KEY) is None
    await cache.get_or_load(KEY, lambda: 2, tags=[TAG], ttl_seconds=10)
    assert cache.get(KEY) == 2
    cache.apply(Tags(TAG))
    assert cache.get(KEY) is None


async def test_a_bypassed_cache_still_shares_loads() -> None:
    cache, source = LocalCache({}), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(10)]
    await settled()
    source.gate.set()
    assert await asyncio.gather(*callers) == ["value"] * 10
    assert source.calls == 1


async def test_the_first_callers_context_reaches_the_loader() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody's")
    cache = coherent_cache()

    async def load() -> str:
        return request.get()

    request.set("the first caller's")
    assert await cache.get_or_load("a", load) == "the first caller's"
    assert cache.get_or_load_sync("b", request.get) == "the first caller's"


# --- who may join ----------------------------------------------------------------------------------------------------


def orders() -> Iterator[tuple[str, ...]]:
    for order in itertools.permutations(("first", "invalidate", "finish", "second", "third")):
        if order.index("first") < order.index("finish"):
            yield order


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
async def test_no_order_of_readers_and_an_invalidation_gives_a_later_reader_the_old_value(target: Target) -> None:
    for order in orders():
        cache, source = coherent_cache(), Source("old")
        readers: dict[str, tuple[str, asyncio.Task[Any]]] = {}
        for step in order:
            match step:
                case "invalidate":
                    source.value = "new"
                    cache.apply(target)
                case "finish":
                    source.gate.set()
                case reader:
                    read = cache.get_or_load(KEY, source.load, tags=(TAG,))
                    readers[reader] = (source.value, asyncio.ensure_future(read))
            await settled()
        assert cache.get(KEY) in {None, "new"}, order
        for came_when, reading in readers.values():
            assert await answered(reading) in {came_when, "new"}, order
        # All that came before the invalidation shared one load, and so did all that came after.
        assert source.calls <= 2, order


async def test_a_caller_does_not_join_a_load_older_than_the_bound_on_staleness() -> None:
    clock = FakeClock()
    cache, source = coherent_cache(clock=clock, max_staleness_seconds=5), Source("old")
    first = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    clock.now += 4.9
    second = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    assert source.calls == 1
    clock.now += 0.1
    source.value = "new"
    third = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    assert source.calls == 2
    source.gate.set()
    assert [await first, await second, await third] == ["old", "old", "new"]


async def test_a_value_stored_between_the_miss_and_the_load_is_taken() -> None:
    cache = coherent_cache()

    def tags_that_take_their_time() -> Iterator[str]:
        cache.store(cache.begin_load(KEY), "another thread's")
        yield TAG

    assert await cache.get_or_load(KEY, lambda: "own", tags=tags_that_take_their_time()) == "another thread's"
    cache.clear()
    assert cache.get_or_load_sync(KEY, lambda: "own", tags=tags_that_take_their_time()) == "another thread's"
    assert cache.stats().loads == 0


async def test_a_caller_whose_joined_load_is_ended_by_others_loads_for_itself() -> None:
    cache = coherent_cache()
    begun = threading.Event()

    async def never() -> str:
        begun.set()
        await asyncio.Event().wait()
        return "never"

    other_loop_stop = threading.Event()

    async def other_loop() -> None:
        waiting = asyncio.ensure_future(cache.get_or_load(KEY, never))
        while not other_loop_stop.is_set():
            await asyncio.sleep(0)
        waiting.cancel()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    ended = in_thread(lambda: asyncio.run(other_loop()))
    await asyncio.to_thread(begun.wait, DEADLINE_SECONDS)
    here = asyncio.ensure_future(cache.get_or_load(KEY, lambda: "own"))
    in_other_thread = in_thread(lambda: cache.get_or_load_sync(KEY, lambda: "own"))
    while cache.stats().shared_loads < 2:
        await asyncio.sleep(0)
    other_loop_stop.set()
    assert await answered(here) == "own"
    assert await answered(asyncio.wrap_future(in_other_thread)) == "own"
    await answered(asyncio.wrap_future(ended))


async def test_a_load_whose_loop_was_closed_under_it_is_not_joined() -> None:
    cache = coherent_cache()

    def begin_and_close() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        task = loop.create_task(cache.get_or_load(KEY, asyncio.Event().wait))
        loop.run_until_complete(settled())
        loop.close()
        abandoned.append(task)

    abandoned: list[asyncio.Task[Any]] = []
    await asyncio.to_thread(begin_and_close)
    assert await answered(cache.get_or_load(KEY, lambda: "own")) == "own"
    while abandoned:
        abandoned.pop()._log_destroy_pending = False  # type: ignore[attr-defined]  # it is what the test is about
    # The caller ends where it is collected: in the loader of a load that it has nothing to do with.
    await answered(cache.get_or_load("other", gc.collect))


# --- threads ---------------------------------------------------------------------------------------------------------


async def test_callers_in_threads_share_the_load_of_the_event_loop() -> None:
    cache, source = coherent_cache(), Source()
    first = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    others = [in_thread(lambda: cache.get_or_load_sync(KEY, lambda: "own")) for _ in range(3)]
    while cache.stats().shared_loads < 3:
        await asyncio.sleep(0)
    source.gate.set()
    assert await first == "value"
    assert [await answered(asyncio.wrap_future(other)) for other in others] == ["value"] * 3


async def test_callers_in_the_event_loop_share_the_load_of_a_thread() -> None:
    cache = coherent_cache()
    begun, gate = threading.Event(), threading.Event()

    def load() -> str:
        begun.set()
        gate.wait(DEADLINE_SECONDS)
        return "value"

    first = in_thread(lambda: cache.get_or_load_sync(KEY, load))
    await asyncio.to_thread(begun.wait, DEADLINE_SECONDS)
    others = [asyncio.ensure_future(cache.get_or_load(KEY, lambda: "own")) for _ in range(3)]
    await settled()
    others[0].cancel()
    await settled()
    gate.set()
    assert await answered(asyncio.gather(*others[1:])) == ["value", "value"]
    assert await answered(asyncio.wrap_future(first)) == "value"
    assert cache.stats().loads == 1


async def test_an_exception_in_a_thread_reaches_all_who_wait_for_it() -> None:
    cache = coherent_cache()
    begun, gate = threading.Event(), threading.Event()

    def load() -> str:
        begun.set()
        gate.wait(DEADLINE_SECONDS)
        raise LookupError("no such product")

    first = in_thread(lambda: cache.get_or_load_sync(KEY, load))
    await asyncio.to_thread(begun.wait, DEADLINE_SECONDS)
    here = asyncio.ensure_future(cache.get_or_load(KEY, lambda: "own"))
    await settled()
    gate.set()
    for waiting in (here, asyncio.wrap_future(first)):
        with pytest.raises(LookupError, match="no such product"):
            await answered(waiting)
    assert KEY not in cache


async def test_a_caller_who_blocks_the_event_loop_does_not_wait_for_a_load_of_that_loop() -> None:
    cache, source = coherent_cache(), Source("the loop's")
    first = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    assert cache.get_or_load_sync(KEY, lambda: "own") == "own"
    source.gate.set()
    assert await first == "the loop's"


async def test_nor_for_a_thread_that_waits_for_that_loop() -> None:
    cache, source = coherent_cache(), Source("the loop's")
    first = asyncio.ensure_future(cache.get_or_load("inner", source.load))
    await settled()
    thread = in_thread(lambda: cache.get_or_load_sync("outer", lambda: cache.get_or_load_sync("inner", lambda: "own")))
    while not cache.stats().shared_loads:
        await asyncio.sleep(0)
    # Whoever waited for "outer" here would wait for the thread, which waits for this loop.
    assert cache.get_or_load_sync("outer", lambda: "own") == "own"
    source.gate.set()
    assert await first == "the loop's"
    assert await answered(asyncio.wrap_future(thread)) == "the loop's"


# --- loaders that need each other ------------------------------------------------------------------------------------


async def test_loaders_that_need_each_other_do_not_wait_for_ever() -> None:
    cache = coherent_cache()

    async def a() -> str:
        return "a" + await cache.get_or_load("b", b)

    async def b() -> str:
        return "b" + await cache.get_or_load("a", lambda: "(a)")

    assert await answered(cache.get_or_load("a", a)) == "ab(a)"


async def test_loaders_that_need_each_other_and_start_at_both_ends_do_not_wait_for_ever() -> None:
    cache, other_cache = coherent_cache(), coherent_cache()
    both_begun = asyncio.Barrier(2)

    async def a() -> str:
        await both_begun.wait()
        return "a" + await other_cache.get_or_load("b", lambda: "(b)")

    async def b() -> str:
        await both_begun.wait()
        return "b" + await cache.get_or_load("a", lambda: "(a)")

    both = asyncio.gather(cache.get_or_load("a", a), other_cache.get_or_load("b", b))
    assert await answered(both) in (["ab(a)", "b(a)"], ["a(b)", "ba(b)"])


async def test_a_loader_may_ask_for_its_own_key() -> None:
    cache = coherent_cache()
    assert await answered(cache.get_or_load("a", lambda: cache.get_or_load("a", lambda: "inner"))) == "inner"
    cache.clear()
    assert cache.get_or_load_sync("a", lambda: cache.get_or_load_sync("a", lambda: "inner")) == "inner"
    assert cache.get_or_load_sync("a", lambda: "outer") == "inner"


async def test_blocking_loaders_that_need_each_other_in_two_threads_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two caches, and so two locks: each thread looks whether it may wait before either has said that it does."""
    cache, other_cache = coherent_cache(), coherent_cache()
    both_begun = threading.Barrier(2)
    both_looked = threading.Barrier(2)
    look = Load.leads_to

    def look_together(self: Any, loads: Any) -> bool:
        found = look(self, loads)
        if loads and not found:
            with contextlib.suppress(threading.BrokenBarrierError):
                both_looked.wait(0.2)  # breaks when the two looks cannot meet, as they should not, and both go on
        return found

    def a() -> str:
        both_begun.wait(DEADLINE_SECONDS)
        return "a" + other_cache.get_or_load_sync("b", lambda: "(b)")

    def b() -> str:
        both_begun.wait(DEADLINE_SECONDS)
        return "b" + cache.get_or_load_sync("a", lambda: "(a)")

    monkeypatch.setattr(Load, "leads_to", look_together)
    one = in_thread(lambda: cache.get_or_load_sync("a", a))
    two = in_thread(lambda: other_cache.get_or_load_sync("b", b))
    both = asyncio.gather(asyncio.wrap_future(one), asyncio.wrap_future(two))
    assert await answered(both) in (["ab(a)", "b(a)"], ["a(b)", "ba(b)"])


async def test_a_loader_that_waits_twice_and_ends_one_wait_still_waits() -> None:
    cache = coherent_cache()
    second_wait_ended = asyncio.Event()

    async def a() -> str:
        waits = [asyncio.ensure_future(cache.get_or_load("b", b)) for _ in range(2)]
        await settled()
        waits[1].cancel()
        await settled()
        second_wait_ended.set()
        return "a" + await waits[0]

    async def b() -> str:
        await second_wait_ended.wait()
        return "b" + await cache.get_or_load("a", lambda: "(a)")

    # "b" is under way before "a" begins: its loader does not know that it serves "a", but for who waits for whom.
    beginning = asyncio.ensure_future(cache.get_or_load("b", b))
    await settled()
    assert await answered(cache.get_or_load("a", a)) == "ab(a)"
    assert await beginning == "b(a)"


async def test_tasks_that_loaders_leave_behind_do_not_pile_up_what_has_finished() -> None:
    cache = coherent_cache()
    depths: list[int] = []
    tasks: list[asyncio.Task[Any]] = []

    async def load_and_schedule_the_next(number: int) -> int:
        depths.append(len(within.get()))
        if number < 20:
            tasks.append(asyncio.ensure_future(refresh(number + 1)))
        return number

    async def refresh(number: int) -> None:
        await settled()
        await cache.get_or_load(f"k{number}", lambda: load_and_schedule_the_next(number))

    await refresh(0)
    while len(tasks) < 20 or not all(task.done() for task in tasks):
        await asyncio.sleep(0)
    assert max(depths) <= 2


# --- what does not fit together --------------------------------------------------------------------------------------


async def test_an_asynchronous_loader_is_refused_where_a_thread_waits_for_it() -> None:
    cache, source = coherent_cache(), Source()
    asynchronous: Callable[[], Any] = source.load
    with pytest.raises(InvalidLoader, match="got an asynchronous one; await get_or_load"):
        await asyncio.to_thread(cache.get_or_load_sync, KEY, asynchronous)
    assert KEY not in cache


async def test_a_caller_with_tags_that_the_load_lacks_loads_for_itself() -> None:
    cache, untagged, tagged = coherent_cache(), Source("untagged"), Source("tagged")
    callers = [
        asyncio.create_task(cache.get_or_load(KEY, untagged.load)),
        asyncio.create_task(cache.get_or_load(KEY, tagged.load, tags=(TAG,))),
        asyncio.create_task(cache.get_or_load(KEY, tagged.load, tags=(TAG,))),
    ]
    await settled()
    assert (untagged.calls, tagged.calls) == (1, 1)
    untagged.gate.set()
    tagged.gate.set()
    assert await asyncio.gather(*callers) == ["untagged", "tagged", "tagged"]
    cache.apply(Tags(TAG))
    assert KEY not in cache


async def test_a_loader_never_runs_under_the_caches_lock() -> None:
    cache = coherent_cache()

    def is_free_for_others() -> bool:
        return bool(in_thread(cache.stats).result(DEADLINE_SECONDS))

    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", factory))  # new in Python 3.12
    try:
        assert await cache.get_or_load(KEY, is_free_for_others)
    finally:
        loop.set_task_factory(factory)

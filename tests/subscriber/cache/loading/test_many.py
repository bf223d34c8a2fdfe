"""Several keys, one query."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.waiting import until, wait_until

from broadcache.shared import Everything, InvalidLoader, InvalidName, Keys, Prefixes, Tags, Target
from broadcache.subscriber import Loaded, LocalCache
from broadcache.subscriber.cache.loading import loads as loads_module
from broadcache.subscriber.cache.loading.loads import Loads

pytestmark = pytest.mark.anyio

A, B, C = "p:1", "p:2", "p:3"
TAG = "shop:7"


def coherent_cache(**options: Any) -> LocalCache:
    cache = LocalCache({}, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


class Source:
    """Rows by key, which are read when a load begins, and returned when it is let go."""

    def __init__(self, **rows: Any) -> None:
        self.rows: dict[str, Any] = {A: "a", B: "b", C: "c", **rows}
        self.queries: list[list[str]] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.sync_gate = threading.Event()

    def read(self, keys: list[str]) -> dict[str, Any]:
        self.queries.append(keys)
        return {key: self.rows[key] for key in keys if key in self.rows}

    async def load(self, keys: list[str]) -> dict[str, Any]:
        found = self.read(keys)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return found

    async def load_one(self) -> Any:
        return (await self.load([A]))[A]

    def load_sync(self, keys: list[str]) -> dict[str, Any]:
        found = self.read(keys)
        assert self.sync_gate.wait(20)
        return found


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def begun(work: Awaitable[Any]) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(work)


async def test_fifty_keys_are_one_query_and_then_none() -> None:
    cache, queries = coherent_cache(), list[list[str]]()
    keys = [f"p:{number}" for number in range(50)]

    async def load(missing: list[str]) -> dict[str, int]:
        queries.append(missing)
        return {key: int(key[2:]) for key in missing}

    for _ in range(2):
        assert await cache.get_or_load_many(keys, load) == {f"p:{number}": number for number in range(50)}
    assert queries == [keys]
    assert cache.stats().loads == 1
    assert cache.get_or_load_many_sync(["p:7", "p:99"], lambda missing: dict.fromkeys(missing, 0)) == {
        "p:7": 7,
        "p:99": 0,
    }


async def test_the_result_has_the_order_of_the_keys_and_no_key_that_the_loader_left_out() -> None:
    cache, source = coherent_cache(), Source()
    source.gate.set()
    assert await cache.get_or_load_many([B], source.load) == {B: "b"}
    result = await cache.get_or_load_many([C, "p:none", B, A, C], source.load)
    assert list(result.items()) == [(C, "c"), (B, "b"), (A, "a")]
    assert source.queries == [[B], [C, "p:none", A]]
    assert await cache.get_or_load_many([], source.load) == {}
    assert await cache.get_or_load_many({A: 1}.keys(), source.load) == {A: "a"}


async def test_a_plain_function_may_return_the_mapping_and_more_keys_than_asked() -> None:
    cache = coherent_cache()
    assert await cache.get_or_load_many([A], lambda keys: {A: 1, B: 2}) == {A: 1}
    assert B not in cache


def test_none_is_a_value_that_is_kept_only_with_a_lifetime_of_its_own() -> None:
    cache, calls = coherent_cache(negative_ttl_seconds=60), 0

    def load(keys: list[str]) -> Mapping[str, None]:
        nonlocal calls
        calls += 1
        return {A: None}

    assert cache.get_or_load_many_sync([A, B], load) == {A: None}
    assert cache.get_or_load_many_sync([A], load) == {A: None}
    assert calls == 1


async def test_each_value_may_have_tags_and_a_lifetime_of_its_own() -> None:
    cache = coherent_cache()
    await cache.get_or_load_many(
        [A, B, C], lambda keys: {A: Loaded(1, tags=("a",)), B: 2, C: Loaded(3, store=False)}, tags=("all",)
    )
    assert dict(cache.items()) == {A: 1, B: 2}
    cache.apply(Tags("a"))
    assert dict(cache.items()) == {B: 2}
    cache.apply(Tags("all"))
    assert dict(cache.items()) == {}


# --- shared with others ----------------------------------------------------------------------------------------------


async def test_callers_of_single_keys_and_of_many_share_their_loads() -> None:
    cache, source = coherent_cache(), Source()
    single = begun(cache.get_or_load(A, source.load_one))
    await settled()
    many = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    others = [begun(cache.get_or_load(B, lambda: "never")), begun(cache.get_or_load_many([B, C], source.load))]
    await settled()
    assert source.queries == [[A], [B], [C]]
    source.gate.set()
    assert await single == "a"
    assert await many == {A: "a", B: "b"}
    assert await asyncio.gather(*others) == ["b", {B: "b", C: "c"}]
    assert cache.stats().shared_loads == 3
    assert sorted(cache) == [A, B, C]


async def test_a_single_caller_loads_by_itself_what_the_loader_of_many_left_out() -> None:
    cache, source = coherent_cache(), Source()
    many = begun(cache.get_or_load_many([A, "p:none"], source.load))
    await settled()
    single = begun(cache.get_or_load("p:none", lambda: "found"))
    other = begun(cache.get_or_load_many(["p:none"], source.load))
    await settled()
    source.gate.set()
    assert await many == {A: "a"}
    assert await single == "found"
    assert await other == {}


def test_threads_share_single_keys() -> None:
    cache, source = coherent_cache(), Source()
    with ThreadPoolExecutor(3) as pool:
        many = pool.submit(cache.get_or_load_many_sync, [A, B], source.load_sync)
        wait_until(lambda: source.queries == [[A, B]], "the first query")
        single = pool.submit(cache.get_or_load_sync, A, lambda: "never")
        other = pool.submit(cache.get_or_load_many_sync, [B, C], source.load_sync)
        wait_until(lambda: source.queries == [[A, B], [C]], "the second query")
        wait_until(lambda: cache.stats().shared_loads == 2, "the callers that join")
        source.sync_gate.set()
        assert many.result(20) == {A: "a", B: "b"}
        assert single.result(20) == "a"
        assert other.result(20) == {B: "b", C: "c"}


async def test_an_event_loop_and_a_thread_share_single_keys() -> None:
    cache, source = coherent_cache(), Source()
    with ThreadPoolExecutor(2) as pool:
        here = begun(cache.get_or_load_many([A, B], source.load))
        await settled()
        there = pool.submit(cache.get_or_load_many_sync, [A, C], source.load_sync)
        while source.queries != [[A, B], [C]]:
            await asyncio.sleep(0.001)
        also_here = begun(cache.get_or_load_many([C, B], source.load))
        await settled()
        source.gate.set()
        source.sync_gate.set()
        assert await here == {A: "a", B: "b"}
        assert await also_here == {C: "c", B: "b"}
        assert await asyncio.wrap_future(there) == {A: "a", C: "c"}
    assert len(source.queries) == 2


async def test_an_error_reaches_each_caller_and_is_not_stored() -> None:
    cache, gate = coherent_cache(), asyncio.Event()

    async def fail(keys: list[str]) -> dict[str, str]:
        await gate.wait()
        raise LookupError(keys)

    many = begun(cache.get_or_load_many([A, B], fail))
    await settled()
    joined = [begun(cache.get_or_load(A, lambda: "never")), begun(cache.get_or_load_many([B], fail))]
    await settled()
    gate.set()
    errors = await asyncio.gather(many, *joined, return_exceptions=True)
    assert [type(error) for error in errors] == [LookupError] * 3
    assert len(set(map(id, errors))) == 3
    assert await cache.get_or_load(A, lambda: "again") == "again"


async def test_a_load_goes_on_while_a_caller_of_one_of_its_keys_waits_and_ends_with_the_last() -> None:
    cache, source = coherent_cache(), Source()
    many = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    single = begun(cache.get_or_load(A, lambda: "never"))
    await settled()
    many.cancel()
    await settled()
    assert source.cancelled == 0
    source.gate.set()
    assert await single == "a"
    assert cache.get(B) == "b"
    cache.clear()
    source.gate.clear()
    many = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    many.cancel()
    await settled()
    assert source.cancelled == 1
    assert await cache.get_or_load(A, lambda: "again") == "again"


async def test_a_caller_that_joined_a_cancelled_load_starts_over() -> None:
    cache, source = coherent_cache(), Source()
    single = begun(cache.get_or_load(A, source.load_one))
    await settled()
    many = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    load = cache.loads._running[A]
    assert load.task is not None
    load.task.cancel()
    await settled()
    source.gate.set()
    assert await many == {A: "a", B: "b"}
    assert source.queries == [[A], [B], [A]]
    with pytest.raises(asyncio.CancelledError):
        await single


async def test_a_caller_does_not_wait_for_ever_for_another_ones_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MIN", 0.05)
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MAX", 0.05)
    cache, hung, source = coherent_cache(), Source(), Source()
    hanging = begun(cache.get_or_load_many([A, B], hung.load))
    await settled()
    source.gate.set()
    assert await cache.get_or_load_many([A, B, C], source.load) == {A: "a", B: "b", C: "c"}
    assert source.queries == [[C], [A, B]]
    source.sync_gate.set()
    cache.clear()
    again = begun(cache.get_or_load_many([A, B], hung.load))
    await settled()
    assert await asyncio.to_thread(cache.get_or_load_many_sync, [A, B], source.load_sync) == {A: "a", B: "b"}
    hung.gate.set()
    assert await hanging == await again == {A: "a", B: "b"}


async def test_loaders_that_need_each_others_keys_do_not_wait_for_ever() -> None:
    cache = coherent_cache()

    async def inner(keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, "inner")

    async def load_a(keys: list[str]) -> dict[str, str]:
        await settled()
        needed = await cache.get_or_load_many([C], inner)
        return dict.fromkeys(keys, f"a of {needed[C]}")

    async def load_c(keys: list[str]) -> dict[str, str]:
        await settled()
        needed = await cache.get_or_load(B, lambda: "inner")
        return dict.fromkeys(keys, f"c of {needed}")

    async with asyncio.timeout(10):
        first, second = await asyncio.gather(
            cache.get_or_load_many([A, B], load_a), cache.get_or_load_many([C], load_c)
        )
    assert first[A] in ("a of inner", "a of c of inner")
    assert second[C] in ("c of inner", "c of a of inner")


def test_a_loader_that_reads_its_own_key_loads_by_itself() -> None:
    cache = coherent_cache()

    def load(keys: list[str]) -> dict[str, Any]:
        return {key: cache.get_or_load_sync(key, lambda: "inner") for key in keys}

    assert cache.get_or_load_many_sync([A, B], load) == {A: "inner", B: "inner"}


# --- the promise -----------------------------------------------------------------------------------------------------

VALUES = {A: "a", B: "b", C: "c"}
TARGETS: tuple[tuple[Target, set[str]], ...] = (
    (Keys(A), {A}),
    (Tags(TAG), {B}),
    (Tags("all"), {A, B, C}),
    (Prefixes("p:"), {A, B, C}),
    (Everything(), {A, B, C}),
)


@pytest.mark.parametrize(("target", "void"), TARGETS)
async def test_an_invalidation_during_the_load_keeps_its_keys_and_no_others_from_being_stored(
    target: Target, void: set[str]
) -> None:
    cache, source = coherent_cache(), Source(**{B: Loaded("b", tags=(TAG,))})
    many = begun(cache.get_or_load_many([A, B, C], source.load, tags=("all",)))
    await settled()
    cache.apply(target)
    late = [begun(cache.get_or_load(key, lambda: "new", tags=("all",))) for key in (A, B, C)]
    await settled()
    source.gate.set()
    assert await many == {A: "a", B: "b", C: "c"}
    assert await asyncio.gather(*late) == ["new" if key in void else value for key, value in VALUES.items()]
    assert dict(cache.items()) == {key: "new" if key in void else value for key, value in VALUES.items()}


async def late_many(target: Target) -> tuple[Any, Any]:
    cache, source = coherent_cache(), Source(**{B: Loaded("b", tags=(TAG,))})
    early = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    source.rows[B] = Loaded("new", tags=(TAG,))
    cache.apply(target)
    late = begun(cache.get_or_load_many([A, B], source.load))
    await settled()
    source.gate.set()
    return await early, await late


async def test_callers_of_many_that_came_after_the_invalidation_of_a_tag_load_that_key_again() -> None:
    assert await late_many(Tags(TAG)) == ({A: "a", B: "b"}, {A: "a", B: "new"})


async def test_without_this_rule_they_get_the_old_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_is_no_result", lambda *_, **__: False)
    assert (await late_many(Tags(TAG)))[1] == {A: "a", B: "b"}


def test_a_key_that_the_loader_leaves_out_drops_the_older_value() -> None:
    cache = coherent_cache()

    def load(keys: list[str]) -> dict[str, str]:
        assert cache.store(cache.begin_load(A), "older")
        return {}

    assert cache.get_or_load_many_sync([A], load) == {}
    assert A not in cache


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: tuple[tuple[Any, Callable[..., Any], type[Exception], str], ...] = (
    ("p:1", dict.fromkeys, InvalidName, r"expected several keys, got the string 'p:1'; write \['p:1'\]"),
    ([1], dict.fromkeys, InvalidName, "expected a string as key, got int"),
    ([A], list, InvalidLoader, "to return a mapping of keys to values, got list"),
)


@pytest.mark.parametrize(("keys", "loader", "error", "text"), MISTAKES)
async def test_mistakes_are_named(keys: Any, loader: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        await coherent_cache().get_or_load_many(keys, loader)
    with pytest.raises(error, match=text):
        coherent_cache().get_or_load_many_sync(keys, loader)


def test_an_asynchronous_loader_is_refused_in_a_blocking_call() -> None:
    cache, source = coherent_cache(), Source()
    with pytest.raises(InvalidLoader, match="got an asynchronous one"):
        cache.get_or_load_many_sync([A], source.load)  # type: ignore[arg-type]
    assert cache.get_or_load_many_sync([A], lambda keys: {A: 1}) == {A: 1}


async def test_a_load_of_another_caller_that_ended_meanwhile_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MIN", 0.05)
    monkeypatch.setattr(loads_module, "_PATIENCE_SECONDS_MAX", 0.05)
    cache, others, own = LocalCache({}), Source(), Source()  # bypassed: nothing is stored
    other = asyncio.create_task(cache.get_or_load_many([A], others.load))
    await until(lambda: others.queries)
    both = asyncio.create_task(cache.get_or_load_many([A, B], own.load))
    await until(lambda: own.queries)
    impatient_at = asyncio.get_running_loop().time() + 0.06
    others.gate.set()
    assert await other == {A: "a"}
    await until(lambda: asyncio.get_running_loop().time() > impatient_at)
    own.gate.set()
    assert await both == {A: "a", B: "b"}
    assert own.queries == [[B]]
    assert "waited" not in caplog.text

"""The decorator of methods of a CacheInvalidationMixin."""

import asyncio
import gc
import inspect
import threading
from typing import Any

import pytest
from cachetools import TTLCache
from tests.support.replicas import FAST
from tests.support.waiting import until

from broadcache.shared import InvalidSettings, Keys
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber, cached
from broadcache.testing import coherent as in_a_test

pytestmark = pytest.mark.anyio


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, url: str = "redis://127.0.0.1:1", **options: Any) -> None:
        super().__init__(url, cache=TTLCache(100, 300), **options)
        self.calls = 0

    @cached("product:{product_id}", tags=("shop:{shop}",), ttl_seconds=60)
    async def product(self, product_id: int, shop: str = "a") -> int:
        self.calls += 1
        return self.calls

    @cached(lambda product_id: f"price:{product_id}")
    def price(self, product_id: int) -> int:
        self.calls += 1
        return self.calls


class Discounted(Catalogue):
    async def product(self, product_id: int, shop: str = "a") -> int:  # type: ignore[override]
        return -await super().product(product_id, shop)


def coherent(catalogue: Catalogue) -> Catalogue:
    catalogue.cache.confirm_coherent(catalogue.cache.clock() + 3_600)
    return catalogue


def test_the_name_is_the_function_also_after_its_module_was_imported() -> None:
    import broadcache.subscriber.decorator

    assert callable(broadcache.subscriber.cached)
    assert not inspect.ismodule(broadcache.subscriber.cached)
    assert broadcache.subscriber.decorator.cached is broadcache.subscriber.cached


async def test_each_object_has_a_cache_of_its_own() -> None:
    catalogue, other = coherent(Catalogue()), coherent(Catalogue())
    assert await catalogue.product(1) == await catalogue.product(product_id=1, shop="b") == 1
    assert await other.product(1) == 1
    assert await Catalogue.product(catalogue, 2) == await catalogue.product(2) == 2
    assert catalogue.price(1) == catalogue.price(1) == Catalogue.price(catalogue, 1) == 3
    assert catalogue.product.key(1) == Catalogue.product.key(catalogue, 1) == "product:1"
    assert catalogue.price.key(7) == "price:7"
    assert catalogue.price.cache_info().hits == 4
    catalogue.price.cache_clear()
    assert catalogue.price(1) == 4
    assert catalogue.price.__wrapped__(1) == 5
    assert inspect.iscoroutinefunction(catalogue.product) is (inspect.iscoroutinefunction(Catalogue.product))
    assert asyncio.iscoroutinefunction(catalogue.product)


async def test_an_override_may_call_the_cached_method_of_its_base() -> None:
    catalogue = coherent(Discounted())
    for _ in range(2):
        assert await catalogue.product(1) == -1
    assert catalogue.calls == 1


def test_an_object_that_is_no_longer_used_is_collected() -> None:
    catalogue = coherent(Catalogue())
    catalogue.price(1)
    gc.collect()
    before = sum(isinstance(each, Catalogue) for each in gc.get_objects())
    del catalogue
    gc.collect()
    assert sum(isinstance(each, Catalogue) for each in gc.get_objects()) == before - 1


def test_a_class_that_allows_copies_takes_no_bound_method_along() -> None:
    class Copyable(Catalogue):
        def __getstate__(self) -> Any:
            return {}

    catalogue = coherent(Copyable())
    assert catalogue.price(1) == catalogue.price(1) == 1
    assert "price" not in vars(catalogue)
    assert coherent(plain := Catalogue()).price(1) == 1
    assert "price" in vars(plain)


def test_it_is_refused_elsewhere() -> None:
    class Other:
        @cached("n:{n}")
        def load(self, n: int) -> int:
            return n

    with pytest.raises(InvalidSettings, match="a method of a CacheInvalidationMixin, got a call with Other"):
        Other().load(1)

    @cached("n:{n}")
    def load(n: int) -> int:
        return n

    with pytest.raises(InvalidSettings, match=r"use the cache's own decorator: @cache\.cached"):
        load(1)


# --- on every replica ------------------------------------------------------------------------------------------------


async def test_an_invalidation_drops_its_key_only_on_every_replica(redis_url: str) -> None:
    async with Catalogue(redis_url, **FAST) as here, Catalogue(redis_url, **FAST) as there:
        for catalogue in (here, there):
            assert [await catalogue.product(n) for n in (4, 42)] == [1, 2]
            assert catalogue.price(4) == 3
        receipt = await here.product.invalidate(42, shop="b")
        assert receipt.receivers == 2
        position = receipt.position
        while there.subscriber.position("products") != position:
            await asyncio.sleep(0.01)
        for catalogue in (here, there):
            assert [await catalogue.product(n) for n in (4, 42)] == [1, 4]
            assert catalogue.price(4) == 3


def test_a_blocking_function_is_invalidated_without_an_event_loop(redis_url: str) -> None:
    caches = [LocalCache(TTLCache(100, 300)) for _ in range(2)]
    calls: list[int] = []

    def load(n: int) -> int:
        calls.append(n)
        return len(calls)

    with (
        Subscriber(redis_url, caches={"numbers": caches[0]}, **FAST),
        Subscriber(redis_url, caches={"numbers": caches[1]}, **FAST) as there,
    ):
        here, elsewhere = (cache.cached("n:{n}")(load) for cache in caches)
        assert (here(1), elsewhere(1), here(1), elsewhere(1)) == (1, 2, 1, 2)
        receipt = here.invalidate(1)
        assert here(1) == 3
        while there.position("numbers") != receipt.position:
            threading.Event().wait(0.01)
        assert elsewhere(1) == 4


async def test_a_blocking_function_is_not_invalidated_on_the_event_loop_of_its_subscriber(redis_url: str) -> None:
    async with Catalogue(redis_url, **FAST) as catalogue:
        catalogue.price(1)
        with pytest.raises(InvalidSettings, match="invalidate_sync would wait for ever"):
            catalogue.price.invalidate(1)
        await asyncio.to_thread(catalogue.price.invalidate, 1)
        await catalogue.invalidate(Keys(catalogue.price.key(1)))


async def test_the_subscriber_that_runs_is_the_one_that_publishes(redis_url: str) -> None:
    cache = LocalCache(TTLCache(100, 300))
    running = Subscriber(redis_url, caches={"a": cache}, **FAST)
    Subscriber(redis_url, caches={"b": cache}, **FAST)

    @cache.cached("n:{n}")
    async def load(n: int) -> int:
        return n

    async with running:
        receipt = await load.invalidate(1)
        assert running.position("a") == receipt.position


# --- a method that calls the one it overrides -------------------------------------------------------------------------


class Taxed(Catalogue):
    """Its method has the template of the method that it overrides, and calls that."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.taxing: asyncio.Event | None = None
        self.is_failing = False

    @cached("product:{product_id}")
    async def product(self, product_id: int, shop: str = "a") -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # of `self`
        net = await super().product(product_id, shop)
        if self.taxing is not None:
            await self.taxing.wait()
        if self.is_failing:
            raise LookupError("no tax rate")
        return net + 1_000

    @cached("price:{product_id}")
    def price(self, product_id: int) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # of `self`
        return super().price(product_id) + 1_000


async def test_a_caller_never_gets_what_the_overridden_method_returned() -> None:
    catalogue = Taxed()
    coherent(catalogue)
    catalogue.taxing = asyncio.Event()
    first = asyncio.create_task(catalogue.product(1))
    while not catalogue.calls:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.create_task(catalogue.product(1))
    await asyncio.sleep(0)
    catalogue.taxing.set()
    assert (await first, await second, await catalogue.product(1)) == (1_001, 1_001, 1_001)
    assert catalogue.price(1) == catalogue.price(1) == 1_002


async def test_what_the_overridden_method_returned_is_not_stored_when_the_other_fails() -> None:
    catalogue = Taxed()
    coherent(catalogue)
    catalogue.is_failing = True
    with pytest.raises(LookupError):
        await catalogue.product(1)
    catalogue.is_failing = False
    assert await catalogue.product(1) == 1_002


async def test_a_refresh_reads_the_source_and_not_the_entry_that_it_replaces() -> None:
    products: LocalCache[int] = LocalCache(TTLCache(100, 300), refresh_after_seconds=60)
    source = 100

    class Net:
        @products.cached("product:{product_id}")
        async def product(self, product_id: int) -> int:
            return source

        @products.cached("price:{product_id}")
        def price(self, product_id: int) -> int:
            return source

    class Gross(Net):
        @products.cached("product:{product_id}")
        async def product(self, product_id: int) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # of `self`
            return await super().product(product_id) + 1_000

        @products.cached("price:{product_id}")
        def price(self, product_id: int) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # of `self`
            return super().price(product_id) + 1_000

    async def read() -> int:
        return await products.get_or_load("own", lambda: products.get_or_load("own", lambda: source))

    def read_sync() -> int:
        return products.get_or_load_sync("own, too", lambda: products.get_or_load_sync("own, too", lambda: source))

    gross = Gross()
    with in_a_test(products) as clock:
        assert (await gross.product(1), gross.price(1), await read(), read_sync()) == (1_100, 1_100, 100, 100)
        source = 90
        clock.tick(61)
        assert (await gross.product(1), gross.price(1), await read(), read_sync()) == (1_100, 1_100, 100, 100)
        await until(lambda: sorted(products.values()) == [90, 90, 1_090, 1_090])


async def test_two_caches_may_have_one_key_in_layers() -> None:
    near: LocalCache[int] = LocalCache(TTLCache(100, 300))
    far: LocalCache[int] = LocalCache(TTLCache(100, 300))
    with in_a_test(near, far):
        assert await near.get_or_load("product:1", lambda: far.get_or_load("product:1", lambda: 1)) == 1
        assert (near["product:1"], far["product:1"]) == (1, 1)


async def test_several_keys_that_are_read_within_the_load_of_one_are_a_part_of_it() -> None:
    products: LocalCache[int] = LocalCache(TTLCache(100, 300), refresh_after_seconds=60)
    source = 100

    async def gross(product_id: str) -> int:
        found = await products.get_or_load_many([product_id, "c"], lambda keys: dict.fromkeys(keys, source))
        assert product_id not in products or products[product_id] > 1_000
        return found[product_id] + 1_000

    def gross_sync(product_id: str) -> int:
        found = products.get_or_load_many_sync([product_id, "d"], lambda keys: dict.fromkeys(keys, source))
        assert product_id not in products or products[product_id] > 1_000
        return found[product_id] + 1_000

    async def read() -> tuple[int, int]:
        return (
            await products.get_or_load("a", lambda: gross("a")),
            products.get_or_load_sync("b", lambda: gross_sync("b")),
        )

    with in_a_test(products) as clock:
        assert await read() == (1_100, 1_100)
        assert dict(products) == {"a": 1_100, "b": 1_100, "c": 100, "d": 100}
        source = 90
        clock.tick(61)
        assert await read() == (1_100, 1_100)
        await until(lambda: (products["a"], products["b"]) == (1_090, 1_090))

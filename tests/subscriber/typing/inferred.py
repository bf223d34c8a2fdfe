"""What mypy and pyright infer: checked by both, and not run."""

from collections.abc import Mapping
from functools import partial
from typing import Any, assert_type

from cachetools import TTLCache

from broadcache.shared import Receipt, key_of
from broadcache.subscriber import (
    CachedCoroutine,
    CachedFunction,
    CacheInfo,
    CacheInvalidationMixin,
    Loaded,
    LocalCache,
    cached,
)


class Product:
    name = "lamp"


class Source:
    async def product(self) -> Product:
        return Product()

    def product_sync(self) -> Product:
        return Product()

    async def rows(self, keys: list[str]) -> dict[str, Product]:
        return {key: Product() for key in keys}

    async def loaded_rows(self, keys: list[str]) -> Mapping[str, Loaded[Product]]:
        return {key: Loaded(Product()) for key in keys}

    def rows_sync(self, keys: list[str]) -> dict[str, Product | None]:
        return dict.fromkeys(keys)


async def by_id(product_id: int) -> Product:
    return Product()


def by_id_sync(product_id: int) -> Product:
    return Product()


async def found() -> Product | None:
    return None


async def loaded() -> Loaded[Product]:
    return Loaded(Product(), tags=("shop:7",), ttl_seconds=60, store=True)


def loaded_sync() -> Loaded[Product | None]:
    return Loaded(None)


def make_names(names: LocalCache) -> LocalCache[str]:
    return names


products: LocalCache[Product] = LocalCache(TTLCache(10_000, 300))
untyped = LocalCache(TTLCache(10_000, 300))
empty = LocalCache({})
source = Source()


async def values(mixin: CacheInvalidationMixin) -> None:
    assert_type(products.get("a"), Product | None)
    assert_type(products.get("a", Product()), Product)
    assert_type(products.get("a", 7), Product | int)
    assert_type(products["a"], Product)
    assert_type(products.pop("a"), Product)
    assert_type(products.pop("a", None), Product | None)
    assert_type(dict(products.items()), dict[str, Product])
    assert_type(products.popitem(), tuple[str, Product])
    products["a"] = Product()
    products.store(products.begin_load("a"), None, tags=["b"])
    assert_type(untyped["a"], Any)
    assert_type(empty["a"], Any)
    untyped["a"] = 7

    for cache in (products, untyped, mixin):
        assert_type(await cache.get_or_load("a", source.product), Product)
        assert_type(await cache.get_or_load("a", source.product_sync), Product)
        assert_type(await cache.get_or_load("a", lambda: by_id(1)), Product)
        assert_type(await cache.get_or_load("a", lambda: by_id_sync(1)), Product)
        assert_type(await cache.get_or_load("a", partial(by_id, 1)), Product)
        assert_type(await cache.get_or_load("a", partial(by_id_sync, 1)), Product)
        assert_type(await cache.get_or_load("a", found), Product | None)
        assert_type(await cache.get_or_load("a", loaded), Product)
        assert_type(await cache.get_or_load("a", loaded_sync), Product | None)
        assert_type(await cache.get_or_load("a", lambda: loaded()), Product)  # noqa: PLW0108
        assert_type(cache.get_or_load_sync("a", source.product_sync), Product)
        assert_type(cache.get_or_load_sync("a", lambda: by_id_sync(1)), Product)
        assert_type(cache.get_or_load_sync("a", partial(by_id_sync, 1)), Product)
        assert_type(cache.get_or_load_sync("a", loaded_sync), Product | None)
        assert_type(cache.get_or_load_sync("a", lambda: "text"), str)

    assert_type(await products.get_or_load_many(["a"], source.rows), dict[str, Product])
    assert_type(await products.get_or_load_many(("a",), source.loaded_rows), dict[str, Product])
    assert_type(await products.get_or_load_many({"a"}, lambda keys: source.rows(keys)), dict[str, Product])  # noqa: PLW0108
    assert_type(await products.get_or_load_many({"a": 1}, source.rows_sync), dict[str, Product | None])
    assert_type(products.get_or_load_many_sync(["a"], source.rows_sync), dict[str, Product | None])
    for tags in (("a",), ["a"], {"a"}, frozenset({"a"}), {"a": 1}.keys(), (tag for tag in "ab")):
        assert_type(products.get_or_load_sync("a", source.product_sync, tags=tags), Product)


@products.cached("product:{product_id}", tags=("shop:{shop}",), ttl_seconds=60)
async def product(product_id: int, shop: str = "main") -> Product:
    return Product()


@untyped.cached(lambda product_id: f"product:{product_id}")
def product_sync(product_id: int) -> Product | None:
    return None


@products.cached("loaded:{product_id}")
async def product_loaded(product_id: int) -> Loaded[Product]:
    return Loaded(Product())


@products.cached("loaded:{product_id}")
def product_loaded_sync(product_id: int) -> Loaded[Product]:
    return Loaded(Product())


class Catalogue(CacheInvalidationMixin):
    @cached("product:{product_id}")
    async def product(self, product_id: int) -> Product:
        return Product()

    @cached("price:{product_id}", typed=True)
    def price(self, product_id: int, *, cents: bool = False) -> Loaded[int]:
        return Loaded(7)

    @products.cached("name:{product_id}")
    def name(self, product_id: int) -> str:
        return ""


async def decorated(catalogue: Catalogue) -> None:
    assert_type(await product(42, shop="a"), Product)
    assert_type(await product.invalidate(42, shop="a"), Receipt)
    assert_type(product.key(42), str)
    assert_type(product.cache_info(), CacheInfo)
    assert_type(product_sync(42), Product | None)
    assert_type(product_sync.invalidate(42), Receipt)
    assert_type(await product_loaded(42), Product)
    assert_type(product_loaded_sync(42), Product)
    assert_type(await catalogue.product(42), Product)
    assert_type(await catalogue.product.invalidate(product_id=42), Receipt)
    assert_type(catalogue.price(42, cents=True), int)
    assert_type(catalogue.price.key(42), str)
    assert_type(catalogue.name(42), str)
    assert_type(Catalogue.name(catalogue, 42), str)
    assert_type(products.cached("{product_id}")(by_id_sync)(1), Product)
    assert_type(key_of("product:{id}", id=42), str)
    takes_a_coroutine_function(product)
    takes_a_function(product_sync)


def takes_a_coroutine_function(function: CachedCoroutine[..., Product]) -> None: ...


def takes_a_function(function: CachedFunction[..., Product | None]) -> None: ...


class Unannotated(CacheInvalidationMixin):
    def __init__(self) -> None:
        super().__init__("redis://", cache=TTLCache(10, 300), start_timeout_seconds=1, credentials=None)

    async def price(self, key: str) -> int:
        return await self.get_or_load(key, lambda: 7, tags=("catalogue",))

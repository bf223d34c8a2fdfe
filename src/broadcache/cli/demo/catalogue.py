"""The example service: a product catalogue whose source is an SQLite file, read through a local cache."""

import asyncio
import sqlite3
from collections.abc import Iterator, MutableMapping
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

from cachetools import TTLCache

from ...shared.errors import InvalidSettings
from ...subscriber import CacheInvalidationMixin

__all__ = ["Catalogue", "CatalogueSource", "NaiveCatalogue", "NoSuchProduct", "Product", "key_of", "new_cache"]

TTL_SECONDS: Final = 300.0
_LOCK_WAIT_SECONDS: Final = 10.0
_SEEDS: Final = (
    (1, "Moka pot", 2490),
    (2, "Hand grinder", 5900),
    (3, "Paper filters", 450),
    (4, "Gooseneck kettle", 7900),
    (5, "Milk jug", 1850),
    (42, "Towel", 1200),
)


class Product(NamedTuple):
    """A product; its price has exactly two decimals."""

    id: int
    name: str
    price: Decimal


class NoSuchProduct(LookupError):
    """The source has no product with this id."""

    def __init__(self, product_id: int) -> None:
        super().__init__(f"expected the id of a product in the source, got {product_id}")


class CatalogueSource:
    """The source of truth: products in an SQLite file that several processes share.

    The first process creates and fills the file if it is missing.
    Raises: InvalidSettings when the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with self._transaction() as connection:
                _create(connection)
        except sqlite3.Error as error:
            raise InvalidSettings(
                f"expected a writable SQLite file, or a path at which one can be created, got {path}: {error}"
            ) from error

    def product(self, product_id: int) -> Product:
        """Read one product. Blocks. Raises: NoSuchProduct."""
        with closing(self._connection()) as connection:
            return _product(connection, product_id)

    def set_price(self, product_id: int, price: Decimal) -> Product:
        """Write a price and return the product. Blocks. Raises: NoSuchProduct."""
        with self._transaction() as connection:
            connection.execute("UPDATE products SET price_cents = ? WHERE id = ?", (int(price * 100), product_id))
            return _product(connection, product_id)

    def _connection(self) -> sqlite3.Connection:
        # One for each use: a connection belongs to the thread that made it, and opening one costs a tenth of a ms.
        return sqlite3.connect(self._path, timeout=_LOCK_WAIT_SECONDS, isolation_level=None)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connection()) as connection:
            # IMMEDIATE: other processes cannot write between the reads and the writes of this transaction.
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                yield connection


def _create(connection: sqlite3.Connection) -> None:
    [is_filled] = connection.execute("PRAGMA user_version").fetchone()
    if not is_filled:
        connection.execute("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price_cents INTEGER)")
        connection.executemany("INSERT INTO products VALUES (?, ?, ?)", _SEEDS)
        connection.execute("PRAGMA user_version = 1")


def _product(connection: sqlite3.Connection, product_id: int) -> Product:
    row = connection.execute("SELECT id, name, price_cents FROM products WHERE id = ?", (product_id,)).fetchone()
    if row is None:
        raise NoSuchProduct(product_id)
    return Product(row[0], row[1], Decimal(row[2]).scaleb(-2))


def key_of(product_id: int) -> str:
    """Return the cache key of a product, for reads and invalidations."""
    return f"product:{product_id}"


def new_cache() -> TTLCache[str, Product]:
    """Return an empty cache with this service's size and TTL."""
    return TTLCache(maxsize=10_000, ttl=TTL_SECONDS)


class Catalogue(CacheInvalidationMixin):
    """Products read through a local cache that follows the invalidations of the namespace `products`."""

    namespace = "products"

    def __init__(
        self, source: CatalogueSource, redis_url: str, *, cache: MutableMapping[str, Any], replica_id: str
    ) -> None:
        super().__init__(redis_url, cache=cache, replica_id=replica_id)
        self._source = source

    async def product(self, product_id: int) -> Product:
        """Return a product, from the cache if that may be served. Raises: NoSuchProduct."""
        return await self.get_or_load(
            key_of(product_id),
            lambda: asyncio.to_thread(self._source.product, product_id),
            tags=("catalogue",),
        )

    async def set_price(self, product_id: int, price: Decimal) -> Product:
        """Write the source without an invalidation, which the demo publishes separately. Raises: NoSuchProduct.

        A real service would then call `await self.invalidate(Keys(key_of(product_id)))`.
        """
        return await asyncio.to_thread(self._source.set_price, product_id, price)


class NaiveCatalogue:
    """The negative control: the same cache without a subscription."""

    def __init__(self, source: CatalogueSource) -> None:
        self.cache: Final = new_cache()
        self._source = source

    async def product(self, product_id: int) -> Product:
        """Return a product, from the cache until its TTL ends. Raises: NoSuchProduct."""
        product = self.cache.get(key_of(product_id))
        if product is None:
            product = await asyncio.to_thread(self._source.product, product_id)
            self.cache[key_of(product_id)] = product
        return product

    async def set_price(self, product_id: int, price: Decimal) -> Product:
        """Write the source. Raises: NoSuchProduct."""
        return await asyncio.to_thread(self._source.set_price, product_id, price)

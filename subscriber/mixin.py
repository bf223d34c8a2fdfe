"""CacheInvalidationMixin: a cache and its subscriber for a class that serves one namespace."""

import os
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self, TypedDict, TypeVar, Unpack, final, overload

from ..shared.clock import Clock
from ..shared.errors import InvalidSettings
from ..shared.invalidation import DEFAULT_NAMESPACE, Target
from ..shared.process.copying import refuse_copy
from ..shared.process.extras import check_installed
from ..shared.receipt import Receipt
from ..shared.transport.redis.address import AddressRemap, Credentials
from .cache.checks import Names, Ttl
from .cache.followed_cache import WhenIncoherent
from .cache.loading.loaded import AsyncLoader, Loaded, Loader
from .cache.local_cache import LocalCache
from .endpoint.access import Access
from .following.state import State
from .subscriber import Subscriber

if TYPE_CHECKING:
    from fastapi import APIRouter

__all__ = ["CacheInvalidationMixin", "SubscriberOptions"]

T = TypeVar("T")


class SubscriberOptions(TypedDict, total=False):
    """What a mixin passes on to `Subscriber`, whose docstring explains each option."""

    replica_id: str | None
    echo_interval_seconds: float
    echo_timeout_seconds: float
    connect_timeout_seconds: float
    start_timeout_seconds: float
    backoff_seconds_max: float
    on_state: Callable[[State], None] | None
    clock: Clock
    uniform: Callable[[], float]
    credentials: Credentials
    address_remap: AddressRemap | None
    prefix: str | None


class _Parts(NamedTuple):
    cache: LocalCache
    subscriber: Subscriber
    access: Access


class CacheInvalidationMixin:
    """Gives a class a local cache that is kept coherent while the class runs.

    Set `namespace`, call `super().__init__`, read through `get_or_load`, and let FastAPI run it: `FastAPI(lifespan=
    catalogue.lifespan)`. Elsewhere use `async with`, or `start` and `stop`; without an event loop, `with`.

    Shape:  `redis_url` defaults to BROADCACHE_REDIS_URL. `cache` is an empty TTLCache, or a LocalCache with options of
            its own. `replica_token` is the token that POST /cache-invalidation requires: one token, or several between
            commas so that it can be rotated; it defaults to BROADCACHE_REPLICA_TOKEN. Without a token only callers on
            this machine may use it, or, with `allow_open` (BROADCACHE_REPLICA_ALLOW_OPEN), each client that reaches the
            route. `options` go to `Subscriber`.
    Raises: InvalidSettings, InvalidNamespace.
    """

    namespace: ClassVar[str] = DEFAULT_NAMESPACE

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        cache: MutableMapping[str, Any],
        max_staleness_seconds: float = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
        replica_token: str | None = None,
        allow_open: bool | None = None,
        **options: Unpack[SubscriberOptions],
    ) -> None:
        url = redis_url or os.environ.get("BROADCACHE_REDIS_URL")
        if not url:
            raise InvalidSettings("expected a redis_url, got none; pass one, or set BROADCACHE_REDIS_URL")
        if not isinstance(cache, LocalCache):
            cache = LocalCache(cache, max_staleness_seconds=max_staleness_seconds, when_incoherent=when_incoherent)
        subscriber = Subscriber(url, caches={self.namespace: cache}, **options)
        self.__parts = _Parts(cache, subscriber, Access.of(replica_token, allow_open=allow_open))

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied and pickled. A class that overrides this is responsible for what it leaves out."""
        refuse_copy(self)

    @final
    @property
    def cache(self) -> LocalCache:
        """The local cache."""
        return self.__parts.cache

    @final
    @property
    def subscriber(self) -> Subscriber:
        """The subscriber that keeps the cache coherent: its `state`, `position(...)` and `stats()`."""
        return self.__parts.subscriber

    @overload
    async def get_or_load(
        self, key: str, loader: AsyncLoader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(
        self, key: str, loader: AsyncLoader[T], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(
        self, key: str, loader: Loader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(self, key: str, loader: Loader[T], *, tags: Names = (), ttl_seconds: Ttl = None) -> T: ...
    @final
    async def get_or_load(self, key: str, loader: Loader[Any], *, tags: Names = (), ttl_seconds: Ttl = None) -> Any:
        """`LocalCache.get_or_load` of this object's cache."""
        return await self.cache.get_or_load(key, loader, tags=tags, ttl_seconds=ttl_seconds)

    @overload
    def get_or_load_sync(
        self, key: str, loader: Loader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    def get_or_load_sync(self, key: str, loader: Loader[T], *, tags: Names = (), ttl_seconds: Ttl = None) -> T: ...
    @final
    def get_or_load_sync(self, key: str, loader: Loader[Any], *, tags: Names = (), ttl_seconds: Ttl = None) -> Any:
        """`LocalCache.get_or_load_sync` of this object's cache."""
        return self.cache.get_or_load_sync(key, loader, tags=tags, ttl_seconds=ttl_seconds)

    @final
    async def invalidate(self, *targets: Target, reason: str = "", timeout_seconds: float = 5.0) -> Receipt:
        """`Subscriber.invalidate` for this object's namespace: drop here at once, then publish."""
        return await self.__parts.subscriber.invalidate(
            *targets, namespace=self.namespace, reason=reason, timeout_seconds=timeout_seconds
        )

    @final
    def invalidate_sync(self, *targets: Target, reason: str = "", timeout_seconds: float = 5.0) -> Receipt:
        """`Subscriber.invalidate_sync` for this object's namespace: `invalidate` from a thread that may block."""
        return self.__parts.subscriber.invalidate_sync(
            *targets, namespace=self.namespace, reason=reason, timeout_seconds=timeout_seconds
        )

    @final
    async def start(self) -> None:
        """Start the subscriber. Returns when the cache is coherent, or after `start_timeout_seconds`."""
        await self.__parts.subscriber.__aenter__()

    @final
    async def stop(self) -> None:
        """Stop the subscriber; the cache is bypassed from then on. Harmless when it is not running."""
        await self.__parts.subscriber.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        self.__parts.subscriber.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__parts.subscriber.__exit__(kind, error, trace)

    @final
    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Run as long as an ASGI application: `FastAPI(lifespan=catalogue.lifespan)`."""
        async with self:
            yield

    @final
    @property
    def router(self) -> "APIRouter":
        """The replica's HTTP side: `app.include_router(catalogue.router)`, or Starlette's `Mount`. Needs FastAPI.

        Include the router of each mixin of an application: their routes are then one, and answer for all of them.

        Shape: GET /health/live (200 while the process runs), GET /health/ready (200 while coherent, 503 otherwise),
               GET /cache-invalidation (state, position, staleness and counters), POST /cache-invalidation (drop the
               entries that the body names; needs the token or, if none is set, a caller on this machine).
               GET /metrics, for Prometheus, if prometheus_client is installed; a service that has a route of that path
               calls `metrics.register` instead.
        Raises: InvalidSettings when FastAPI is not installed.
        """
        check_installed("the router", "fastapi")
        from .endpoint.fastapi import router_of

        return router_of(self.__parts.subscriber, self.__parts.access)

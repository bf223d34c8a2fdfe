"""CacheInvalidationMixin: a cache and its subscriber for a class that serves one namespace."""

import os
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self, TypeVar, Unpack, final, overload

from ..shared.errors import InvalidSettings
from ..shared.invalidation import DEFAULT_NAMESPACE, Target
from ..shared.process.copying import refuse_copy
from ..shared.receipt import Receipt
from .cache.checks import Names, Ttl
from .cache.followed_cache import WhenIncoherent
from .cache.loading.loaded import AsyncLoader, Loaded, Loader
from .cache.local_cache import LocalCache
from .following.settings import SubscriberOptions
from .subscriber import Subscriber

if TYPE_CHECKING:
    from fastapi import APIRouter

__all__ = ["CacheInvalidationMixin"]

T = TypeVar("T")


class _Parts(NamedTuple):
    cache: LocalCache
    subscriber: Subscriber
    namespace: str
    is_shared: bool


class CacheInvalidationMixin:
    """Gives a class a local cache that is kept coherent while the class runs, or while a shared subscriber does.

    Set `namespace`, call `super().__init__`, read through `get_or_load`, and let FastAPI run it: `FastAPI(lifespan=
    catalogue.lifespan)`. Elsewhere use `async with`, or `start` and `stop`; without an event loop, `with`. In a process
    with several such classes, hand each of them the one `Subscriber`, and let FastAPI run that.

    `super().__init__()` of the other bases is called, without arguments. A base that needs some stands before this one
    in the list of bases, and its `__init__` is called by name.

    Shape:  `redis_url` defaults to BROADCACHE_REDIS_URL. `cache` is an empty TTLCache, or a LocalCache with options of
            its own. `options` go to `Subscriber`; of these `replica_token` and `allow_open` say who may use the route
            POST /cache-invalidation. With a shared subscriber, which takes these options itself, `cache` is added to
            it; without `cache`, this object uses the first that the subscriber has for its `namespace`.
    Raises: InvalidSettings, InvalidNamespace.
    """

    namespace: ClassVar[str] = DEFAULT_NAMESPACE

    @overload
    def __init__(
        self,
        redis_url: str | None = None,
        *,
        cache: MutableMapping[str, Any],
        max_staleness_seconds: float = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
        **options: Unpack[SubscriberOptions],
    ) -> None: ...
    @overload
    def __init__(
        self,
        subscriber: Subscriber,
        /,
        *,
        cache: MutableMapping[str, Any] | None = None,
        max_staleness_seconds: float = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
    ) -> None: ...
    def __init__(
        self,
        redis_url: str | Subscriber | None = None,
        *,
        cache: MutableMapping[str, Any] | None = None,
        max_staleness_seconds: float = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
        **options: Unpack[SubscriberOptions],
    ) -> None:
        super().__init__()
        namespace = self.namespace
        if cache is not None and not isinstance(cache, LocalCache):
            cache = LocalCache(cache, max_staleness_seconds=max_staleness_seconds, when_incoherent=when_incoherent)
        if isinstance(redis_url, Subscriber):
            self.__parts = _shared_parts(redis_url, cache, namespace, options)
            return
        url = redis_url or os.environ.get("BROADCACHE_REDIS_URL")
        if not url:
            raise InvalidSettings("expected a redis_url, got none; pass one, or set BROADCACHE_REDIS_URL")
        if cache is None:
            raise InvalidSettings("expected a cache, got none; pass one: cache=TTLCache(maxsize=10_000, ttl=300)")
        subscriber = Subscriber(url, caches={namespace: cache}, **options)
        self.__parts = _Parts(cache, subscriber, namespace, is_shared=False)

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
        return await self.__parts.cache.get_or_load(key, loader, tags=tags, ttl_seconds=ttl_seconds)

    @overload
    def get_or_load_sync(
        self, key: str, loader: Loader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    def get_or_load_sync(self, key: str, loader: Loader[T], *, tags: Names = (), ttl_seconds: Ttl = None) -> T: ...
    @final
    def get_or_load_sync(self, key: str, loader: Loader[Any], *, tags: Names = (), ttl_seconds: Ttl = None) -> Any:
        """`LocalCache.get_or_load_sync` of this object's cache."""
        return self.__parts.cache.get_or_load_sync(key, loader, tags=tags, ttl_seconds=ttl_seconds)

    @final
    async def invalidate(self, *targets: Target, reason: str = "", timeout_seconds: float = 5.0) -> Receipt:
        """`Subscriber.invalidate` for this object's namespace: drop here at once, then publish."""
        return await self.__parts.subscriber.invalidate(
            *targets, namespace=self.__parts.namespace, reason=reason, timeout_seconds=timeout_seconds
        )

    @final
    def invalidate_sync(self, *targets: Target, reason: str = "", timeout_seconds: float = 5.0) -> Receipt:
        """`Subscriber.invalidate_sync` for this object's namespace: `invalidate` from a thread that may block."""
        return self.__parts.subscriber.invalidate_sync(
            *targets, namespace=self.__parts.namespace, reason=reason, timeout_seconds=timeout_seconds
        )

    @final
    async def start(self) -> None:
        """Start the subscriber. Returns when the cache is coherent, or after `start_timeout_seconds`.

        A shared subscriber is not started, but must run. Raises: InvalidSettings.
        """
        await self.__start()

    @final
    async def stop(self) -> None:
        """Stop the subscriber; the cache is bypassed from then on. Harmless when it is not running.

        A shared subscriber is not stopped.
        """
        await self.__stop()

    async def __aenter__(self) -> Self:
        await self.__start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.__stop()

    def __enter__(self) -> Self:
        if self.__parts.is_shared:
            self.__check_runs()
        else:
            self.__parts.subscriber.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.__parts.is_shared:
            self.__parts.subscriber.__exit__(kind, error, trace)

    # Not by way of `start` and `stop`: a class may have methods of these names.

    async def __start(self) -> None:
        if self.__parts.is_shared:
            self.__check_runs()
        else:
            await self.__parts.subscriber.__aenter__()

    async def __stop(self) -> None:
        if not self.__parts.is_shared:
            await self.__parts.subscriber.close()

    def __check_runs(self) -> None:
        if self.__parts.subscriber.state == "closed":
            raise InvalidSettings(
                f"expected the shared subscriber of this {type(self).__name__} to run, got one that does not: start "
                "the subscriber itself, e.g. FastAPI(lifespan=subscriber.lifespan); this object need not be started"
            )

    @final
    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Run as long as an ASGI application: `FastAPI(lifespan=catalogue.lifespan)`."""
        await self.__start()
        try:
            yield
        finally:
            await self.__stop()

    @final
    @property
    def router(self) -> "APIRouter":
        """`Subscriber.router` of this object's subscriber: `app.include_router(catalogue.router)`. Needs FastAPI.

        Include the router of each mixin of an application: their routes are then one, and answer for all of them. A
        shared subscriber's is included once.

        Raises: InvalidSettings when FastAPI is not installed.
        """
        return self.__parts.subscriber.router


def _shared_parts(
    subscriber: Subscriber, cache: LocalCache | None, namespace: str, options: SubscriberOptions
) -> _Parts:
    if options:
        raise InvalidSettings(
            f"expected no {', '.join(options)} beside a shared subscriber, got some: pass them to the Subscriber, "
            "which they are for"
        )
    if cache is not None:
        subscriber.add(namespace, cache)
    elif (cache := subscriber.caches_by_namespace.get(namespace)) is None:
        raise InvalidSettings(
            f"expected a cache for the namespace {namespace!r}, got a subscriber of "
            f"{', '.join(subscriber.caches_by_namespace) or 'none'}; pass cache=TTLCache(…), or name one in its caches"
        )
    return _Parts(cache, subscriber, namespace, is_shared=True)

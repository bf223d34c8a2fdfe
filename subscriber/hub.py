"""The subscriber as the hub of a process: its settings, its lifespan, its routes, and what its caches publish."""

import asyncio
import inspect
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

from ..shared.errors import InvalidSettings
from ..shared.invalidation import Invalidation, Position, Target
from ..shared.process.closing import Closing
from ..shared.process.extras import check_installed
from ..shared.process.settings import VARIABLE_PREFIX
from ..shared.receipt import Receipt
from ..shared.telemetry.tracing import publishing
from ..shared.transport.redis.url import read_url
from .cache.local_cache import LocalCache
from .endpoint.access import Access
from .endpoint.replica_token import TOKEN_VARIABLE, replica_allow_open
from .following.applied import check_may_wait_for, published, published_sync
from .following.follower import Follower
from .following.sequencer import Sequencer
from .following.settings import SubscriberOptions, options_from
from .roster import Roster

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.routing import BaseRoute

__all__ = ["Caches", "Hub"]

App = TypeVar("App")
Yielded = TypeVar("Yielded")

Caches = Mapping[str, LocalCache | Sequence[LocalCache]]


class Hub(Closing):
    """What a service uses of its one subscriber, beside its caches. `Subscriber` adds how it runs."""

    _access: Access
    _loop: asyncio.AbstractEventLoop | None
    _roster: Roster
    # Takes the place of the link in tests: `broadcache.testing.coherent`.
    _stand_in: Callable[[Invalidation], Receipt] | None = None
    # Ends the stage of a block that ended while this ran.
    _unstage: Callable[[], None] | None = None

    @classmethod
    def from_env(
        cls,
        *,
        caches: Caches | None = None,
        environ: Mapping[str, str] | None = None,
        **options: Unpack[SubscriberOptions],
    ) -> Self:
        """Make the subscriber of a process from its environment: `Subscriber.from_env(caches={"products": products})`.

        Shape:  BROADCACHE_REDIS_URL is required. BROADCACHE_ECHO_INTERVAL_SECONDS, _ECHO_TIMEOUT_SECONDS,
                _CONNECT_TIMEOUT_SECONDS, _START_TIMEOUT_SECONDS and _BACKOFF_SECONDS_MAX are the arguments of these
                names; BROADCACHE_REPLICA_TOKEN and BROADCACHE_REPLICA_ALLOW_OPEN are who may POST to the router. An
                argument has precedence. An empty variable counts as unset. `environ` takes the place of the process's
                environment, for BROADCACHE_PREFIX too.
        Raises: InvalidSettings, InvalidNamespace.
        """
        url, read = options_from(os.environ if environ is None else environ, options)
        if environ is not None:  # of the process's own, the subscriber itself reads these
            read |= _read_elsewhere(url, environ, options)
        make = cast("Callable[..., Self]", cls)
        return make(url, caches=caches, **read)

    # --- its caches ---------------------------------------------------------------------------------------------------

    @property
    def caches(self) -> tuple[LocalCache, ...]:
        """The followed caches."""
        return self._roster.caches

    @property
    def caches_by_namespace(self) -> dict[str, LocalCache]:
        """The followed caches by namespace; if a namespace has several, the first."""
        return {namespace: sequencer.caches[0] for namespace, sequencer in self.sequencers.items()}

    @property
    def sequencers(self) -> Mapping[str, Sequencer]:
        """Position, counters, lag and caches of each namespace, as they are now. Read only."""
        return self._roster.sequencers.copy()

    def measure_lag(self) -> None:
        """From now on, measure how late each invalidation is applied: for metrics.

        It costs a third of a microsecond per invalidation, so it is off by default.
        """
        self._roster.measure_lag()

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here; None before the first.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        return self._roster.sequencer(namespace).position

    def stage(
        self, new_follower: Callable[..., Follower], publish: Callable[[Invalidation], Receipt]
    ) -> Callable[[], None]:
        """Run, when entered, on followers of another kind, and publish by `publish`, until the result is called.

        For `broadcache.testing`. Raises: InvalidSettings when running.
        """
        if self.is_running:
            raise InvalidSettings(
                "expected a subscriber that is not running, got one that is: enter the block first, and let the "
                "application start within it"
            )
        self._leave_stage()
        publish_before = self._stand_in

        def restore() -> None:
            self._stand_in = publish_before
            if self.is_running:
                self._unstage = restore_roster
                raise InvalidSettings(
                    "expected a subscriber that has ended, got one that is running at the end of its block: close it, "
                    "or leave the application that runs it, within the block"
                )
            restore_roster()

        self._stand_in = publish
        try:
            restore_roster = self._roster.stage(new_follower, self.replica_id)
        except BaseException:
            self._stand_in = publish_before
            raise
        return restore

    def _leave_stage(self) -> None:
        """Follow as before a block that ended while this ran, as it no longer does."""
        if (unstage := self._unstage) is not None:
            self._unstage = None
            unstage()

    @contextmanager
    def publishing_by(self, publish: Callable[[Invalidation], Receipt]) -> Iterator[None]:
        """Publish by `publish`, unless it runs, or publishes by another function already. For `broadcache.testing`."""
        if self.is_running or self._stand_in is not None:
            yield
            return
        self._stand_in = publish
        try:
            yield
        finally:
            self._stand_in = None

    # --- in a service -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Run as long as an ASGI application: `FastAPI(lifespan=subscriber.lifespan)`."""
        async with self:
            yield

    def lifespan_with(
        self, lifespan: Callable[[App], AbstractAsyncContextManager[Yielded]]
    ) -> Callable[[App], AbstractAsyncContextManager[Yielded]]:
        """Return a lifespan that runs the subscriber around yours: `FastAPI(lifespan=subscriber.lifespan_with(mine))`.

        Yours begins when the caches are coherent, and ends before the subscriber does: at both ends it may read them
        and invalidate. What it yields, the state of the application, is passed on.

        Raises: InvalidSettings when `lifespan` is no function that returns an asynchronous context manager.
        """
        given: object = lifespan
        if not callable(given) or inspect.isasyncgenfunction(given) or inspect.iscoroutinefunction(given):
            raise InvalidSettings(
                "expected a function that returns an asynchronous context manager, got "
                f"{getattr(given, '__qualname__', given)!r:.100}; put @contextlib.asynccontextmanager above it"
            )

        @asynccontextmanager
        async def both(app: App) -> AsyncIterator[Yielded]:
            async with self, lifespan(app) as yielded:
                yield yielded

        return both

    @property
    def router(self) -> "APIRouter":
        """The replica's HTTP side: `app.include_router(subscriber.router)`. Needs FastAPI.

        Include it once. The routers of several subscribers of an application are one: they answer for all of them.

        Shape: GET /health/live (200 while the process runs), GET /health/ready (200 while coherent, 503 otherwise),
               GET /cache-invalidation (state, position, staleness and counters), POST /cache-invalidation (drop the
               entries that the body names; needs the token or, if none is set, a caller on this machine).
               GET /metrics, for Prometheus, if prometheus_client is installed; a service that has a route of that path
               calls `metrics.register` instead.
        Raises: InvalidSettings when FastAPI is not installed.
        """
        check_installed("the router", "fastapi")
        from .endpoint.fastapi import router_of

        return router_of(self._served(), self._access)

    @property
    def routes(self) -> "list[BaseRoute]":
        """The same for Starlette: `Starlette(routes=[*mine, *subscriber.routes], lifespan=subscriber.lifespan)`.

        They match every path, and answer 404 to those that they lack: put them last. Needs FastAPI.
        """
        check_installed("the routes", "fastapi")
        from .endpoint.fastapi import routes_of

        return routes_of(self._served(), self._access)

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Whether it has been entered, and has not ended, in this process."""

    @property
    @abstractmethod
    def replica_id(self) -> str:
        """The id of this replica."""

    @abstractmethod
    def _served(self) -> Any:
        """Return this subscriber, as its routes need it."""

    # --- invalidations of this replica's own --------------------------------------------------------------------------

    async def invalidate(
        self, *targets: Target, namespace: str, reason: str = "", timeout_seconds: float = 5.0
    ) -> Receipt:
        """Drop `targets` here at once, then publish them over the subscriber's own link for all other replicas.

        The message is applied again when it arrives here, before this returns. May be awaited on any event loop.

        Raises: LinkLost when it was not, or may not have been, published within `timeout_seconds`; NotConnected, a
                LinkLost, at once when not running. This replica has dropped its entries even so. LogRefused,
                InvalidTarget, InvalidSettings.
        """
        with publishing(self._dropped_here(targets, namespace, reason)) as traced:
            if self._stand_in is not None:
                return self._stand_in(traced)
            return await published(self._home(), self._roster.publish(traced, timeout_seconds), timeout_seconds)

    def invalidate_sync(
        self, *targets: Target, namespace: str, reason: str = "", timeout_seconds: float = 5.0
    ) -> Receipt:
        """Do what `invalidate` does, from a thread that may block. The subscriber must run in another thread.

        Raises: as `invalidate`; InvalidSettings, before anything is dropped, on the subscriber's own event loop.
        """
        check_may_wait_for(self._loop)
        with publishing(self._dropped_here(targets, namespace, reason)) as traced:
            if self._stand_in is not None:
                return self._stand_in(traced)
            return published_sync(self._home(), self._roster.publish(traced, timeout_seconds), timeout_seconds)

    @abstractmethod
    def _dropped_here(self, targets: Sequence[Target], namespace: str, reason: str) -> Invalidation:
        """Return the invalidation of `targets`, after this replica has applied it. May be called from any thread."""

    @abstractmethod
    def _home(self) -> asyncio.AbstractEventLoop | None:
        """Return the event loop that the subscriber runs on; None when it is not running."""


def _read_elsewhere(url: str, environ: Mapping[str, str], options: SubscriberOptions) -> SubscriberOptions:
    """Return who may POST, and what begins all names in Redis, of an environment that is not the process's own."""
    read = SubscriberOptions(allow_open=replica_allow_open(allow_open=options.get("allow_open"), environ=environ))
    if (token := environ.get(TOKEN_VARIABLE)) and not options.get("replica_token"):
        read["replica_token"] = token
    if options.get("prefix") is None and read_url(url).prefix is None:  # that of the URL has precedence
        read["prefix"] = environ.get(f"{VARIABLE_PREFIX}PREFIX", "").strip()
    return read

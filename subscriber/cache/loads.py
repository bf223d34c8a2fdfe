"""Shared loads: concurrent misses of one key wait for one call of the loader."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Protocol

from ...shared.errors import InvalidLoader
from ...shared.process.forks import keep_inherited
from ...shared.process.loops import is_cancelled, is_in_event_loop
from .token import LoadToken

__all__ = ["Fillable", "Loads"]

Loader = Callable[[], Any]

_MISSING: Final = object()


class Fillable(Protocol):
    """A cache that loads can fill: the four things they need of it."""

    @property
    def max_staleness_seconds(self) -> float:
        """How old a load may be for another caller to join it."""
        ...

    def begin_load(self, key: str) -> LoadToken:
        """Return a token, before the source is read."""
        ...

    def is_void(self, token: LoadToken, tags: Iterable[str] = ()) -> bool:
        """Whether an invalidation since the token was made concerns the load."""
        ...

    def store(
        self, token: LoadToken, value: Any, *, tags: Iterable[str] = (), ttl_seconds: float | None = None
    ) -> bool:
        """Store the source's value, unless the load is void."""
        ...


class _Load:
    """One running call of a loader."""

    __slots__ = (
        "is_finished",
        "loop",
        "outcome",
        "tags",
        "task",
        "thread_id",
        "token",
        "ttl_seconds",
        "waiters",
        "waits_for",
    )

    def __init__(self, token: LoadToken, tags: tuple[str, ...], ttl_seconds: float | None) -> None:
        self.token = token
        self.tags = tags
        self.ttl_seconds = ttl_seconds
        self.thread_id = threading.get_ident()
        # An asynchronous load runs as a task of its own, so that no caller's cancellation reaches it.
        self.task: asyncio.Task[Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        # Made when the first caller waits from outside the load's event loop.
        self.outcome: Future[Any] | None = None
        self.is_finished = False
        self.waiters = 0
        # A list: a loader may wait twice for one load, and end one of the waits.
        self.waits_for: list[_Load] = []

    def leads_to(self, loads: "tuple[_Load, ...]") -> bool:
        """Whether this load waits, directly or through other loads, for one of `loads`."""
        seen: set[_Load] = set()
        ahead: list[_Load] = [self]
        while ahead:
            load = ahead.pop()
            if load in loads:
                return True
            if load not in seen:
                seen.add(load)
                ahead.extend(load.waits_for)
        return False


# The loads whose loaders this code runs in, the outermost first. A loader that needs a key whose load waits for that
# loader itself would wait for ever; it calls a loader of its own instead.
_within: ContextVar[tuple[_Load, ...]] = ContextVar("broadcache_loads", default=())
# Held from the check for circular waits until the new wait is recorded. One lock for all caches: their loaders may need
# each other's keys. Always acquired after a cache's own lock.
_waits_lock = threading.Lock()


def _renew_waits_lock() -> None:
    global _waits_lock  # noqa: PLW0603  (one for all caches; another thread may have held it when this process forked)
    _waits_lock = threading.Lock()


class Loads:
    """The loads under way in one cache. Shares the cache's lock.

    Shape:  `reread` repeats a read that has just missed, under the lock: it is given a key and a default.
    """

    def __init__(
        self, cache: Fillable, lock: AbstractContextManager[bool], reread: Callable[[str, object], Any]
    ) -> None:
        self._cache = cache
        self._lock = lock
        self._reread = reread
        self._running: dict[str, _Load] = {}
        self.started: int = 0
        self.shared: int = 0

    def start_over(self, lock: AbstractContextManager[bool]) -> None:
        """Forget the loads under way, and share another lock: in a forked child, the parent's loads never end."""
        _renew_waits_lock()
        self._lock = lock
        keep_inherited(self._running)
        self._running = {}
        self.started = self.shared = 0

    async def load(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """Join the load of `key`, or start one, and return its value."""
        loop = asyncio.get_running_loop()
        within = _within.get()
        while True:
            with self._lock:
                joined = self._join(key, tags, blocks_thread=False)
                if joined is None:
                    if (value := self._reread(key, _MISSING)) is not _MISSING:
                        return value
                    load = self._begin(key, tags, ttl_seconds)
                    load.loop = loop
                    # Not loop.create_task: an eager task factory would run the loader at once, under the lock.
                    load.task = asyncio.Task(self._run(load, loader), loop=loop, name=f"broadcache load {key:.100}")
                    load.task.add_done_callback(partial(self._finish_task, load))
                else:
                    load = joined
                load.waiters += 1
                waiting = asyncio.shield(
                    load.task if load.task and load.loop is loop else asyncio.wrap_future(_outcome_of(load))
                )
            try:
                return await waiting
            except asyncio.CancelledError:
                self._abandon(load)
                if joined is None or not load.is_finished or is_cancelled():
                    raise
                # Another caller's load was cancelled, e.g. with its event loop. This caller starts over.
            finally:
                _stop_waiting(within, load)

    def load_sync(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """The same, from a thread that may block."""
        within = _within.get()
        while True:
            with self._lock:
                load = self._join(key, tags, blocks_thread=True)
                if load is None:
                    if (value := self._reread(key, _MISSING)) is not _MISSING:
                        return value
                    load = self._begin(key, tags, ttl_seconds)
                    outcome = None
                else:
                    outcome = _outcome_of(load)
                load.waiters += 1
            try:
                return self._run_sync(load, loader) if outcome is None else outcome.result()
            except CancelledError:
                if outcome is None:
                    raise
            finally:
                _stop_waiting(within, load)

    def _join(self, key: str, tags: tuple[str, ...], *, blocks_thread: bool) -> _Load | None:
        """Return the load of `key`, with a new caller recorded as waiting for it; None if it has none to join."""
        load = self._running.get(key)
        if load is None or not self._is_joinable(load, tags, blocks_thread=blocks_thread):
            return None
        within = _within.get()
        with _waits_lock:
            if load.leads_to(within):
                return None
            if within:
                within[-1].waits_for.append(load)
        self.shared += 1
        return load

    def _is_joinable(self, load: _Load, tags: tuple[str, ...], *, blocks_thread: bool) -> bool:
        if tags != load.tags and not set(tags) <= set(load.tags):
            return False  # an invalidation of the missing tags would not find its value
        if load.task is not None and load.task.done():
            return False
        if load.loop is not None and load.loop.is_closed():
            return False
        age_seconds = self._cache.begin_load(load.token.key).began_at - load.token.began_at
        if age_seconds >= self._cache.max_staleness_seconds or self._cache.is_void(load.token, load.tags):
            return False
        # A thread that runs an event loop must not block: the load may need this same loop.
        return not blocks_thread or (load.thread_id != threading.get_ident() and not is_in_event_loop())

    def _begin(self, key: str, tags: tuple[str, ...], ttl_seconds: float | None) -> _Load:
        load = _Load(self._cache.begin_load(key), tags, ttl_seconds)
        self._running[key] = load
        self.started += 1
        if within := _within.get():
            within[-1].waits_for.append(load)
        return load

    async def _run(self, load: _Load, loader: Loader) -> Any:
        _within.set(_within_also(load))
        value = loader()
        if inspect.isawaitable(value):
            value = await value
        self._cache.store(load.token, value, tags=load.tags, ttl_seconds=load.ttl_seconds)
        return value

    def _run_sync(self, load: _Load, loader: Loader) -> Any:
        within = _within.set(_within_also(load))
        try:
            value = loader()
            if inspect.iscoroutine(value):
                value.close()
                raise InvalidLoader(
                    f"expected a loader that returns a value for {load.token.key!r:.100}, got an asynchronous one; "
                    "await get_or_load(...) instead"
                )
            self._cache.store(load.token, value, tags=load.tags, ttl_seconds=load.ttl_seconds)
        except BaseException as error:
            self._finish(load, error=error)
            raise
        finally:
            _within.reset(within)
        self._finish(load, value)
        return value

    def _finish_task(self, load: _Load, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self._finish(load, error=CancelledError())
        elif (error := task.exception()) is not None:
            self._finish(load, error=error)
        else:
            self._finish(load, task.result())

    def _finish(self, load: _Load, value: Any = None, *, error: BaseException | None = None) -> None:
        with self._lock:
            load.is_finished = True
            if self._running.get(load.token.key) is load:
                del self._running[load.token.key]
            outcome = load.outcome
        if outcome is None or not outcome.set_running_or_notify_cancel():
            return
        if error is None:
            outcome.set_result(value)
        else:
            outcome.set_exception(error)

    def _abandon(self, load: _Load) -> None:
        """Record that a waiting caller was cancelled. If it was the last one, cancel the load."""
        with self._lock:
            load.waiters -= 1
            if load.waiters or load.task is None or load.loop is None or load.task.done():
                return
            if self._running.get(load.token.key) is load:
                del self._running[load.token.key]
        load.loop.call_soon_threadsafe(load.task.cancel)


def _outcome_of(load: _Load) -> "Future[Any]":
    if load.outcome is None:
        load.outcome = Future()
    return load.outcome


def _within_also(load: _Load) -> tuple[_Load, ...]:
    # Tasks that a loader leaves behind inherit its context; finished loads would pile up there.
    return (*(outer for outer in _within.get() if not outer.is_finished), load)


def _stop_waiting(within: tuple[_Load, ...], load: _Load) -> None:
    """Record that the loader in which this wait began, if any, no longer waits for `load`.

    Not the loader in which it ends: a caller whose event loop was closed is collected later, inside unrelated code.
    """
    if within:
        within[-1].waits_for.remove(load)

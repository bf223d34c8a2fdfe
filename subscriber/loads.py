"""Shared loads: concurrent misses on one key wait for one call of the loader."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .local_cache import LoadToken, LocalCache

__all__ = ["Loads"]

Loader = Callable[[], Any]


class _Load:
    """One call of a loader that is under way."""

    __slots__ = ("loop", "outcome", "tags", "task", "thread_id", "token", "ttl_seconds", "waiters", "waits_for")

    def __init__(self, token: "LoadToken", tags: tuple[str, ...], ttl_seconds: float | None) -> None:
        self.token = token
        self.tags = tags
        self.ttl_seconds = ttl_seconds
        self.thread_id = threading.get_ident()
        # An asynchronous load runs as a task of its own, so that no caller's cancellation reaches it.
        self.task: asyncio.Task[Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        # Made when somebody waits from outside the load's event loop.
        self.outcome: Future[Any] | None = None
        self.waiters = 0
        self.waits_for: set[_Load] = set()

    def leads_to(self, loads: "tuple[_Load, ...]") -> bool:
        """Whether this load waits, over any number of others, for one of `loads`."""
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


# The loads in whose loaders this code runs, the outermost first. A loader that needs a key whose load waits for this
# very loader would wait for ever; it loads for itself instead.
_within: ContextVar[tuple[_Load, ...]] = ContextVar("broadcache_loads", default=())


class Loads:
    """The loads under way in one cache. Shares the cache's lock."""

    def __init__(self, cache: "LocalCache", lock: AbstractContextManager[bool]) -> None:
        self._cache = cache
        self._lock = lock
        self._running: dict[str, _Load] = {}
        self.started = 0
        self.shared = 0

    async def load(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """Join the load of `key`, or start one, and return its value."""
        loop = asyncio.get_running_loop()
        with self._lock:
            load = self._joinable(key, blocks_thread=False)
            if load is None:
                load = self._begin(key, tags, ttl_seconds)
                load.loop = loop
                load.task = loop.create_task(self._run(load, loader), name=f"broadcache load {key:.100}")
                load.task.add_done_callback(partial(self._finish_task, load))
            load.waiters += 1
            waiting = asyncio.shield(
                load.task if load.task and load.loop is loop else asyncio.wrap_future(_outcome_of(load))
            )
            parent = _wait(load)
        try:
            return await waiting
        except asyncio.CancelledError:
            self._abandon(load)
            raise
        finally:
            _stop_waiting(parent, load)

    def load_sync(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """The same from a thread that may block."""
        with self._lock:
            joined = self._joinable(key, blocks_thread=True)
            load = joined or self._begin(key, tags, ttl_seconds)
            load.waiters += 1
            outcome = _outcome_of(load) if joined else None
            parent = _wait(load)
        try:
            return self._run_sync(load, loader) if outcome is None else outcome.result()
        finally:
            _stop_waiting(parent, load)

    def _joinable(self, key: str, *, blocks_thread: bool) -> _Load | None:
        """Return the load of `key` that a caller who comes now may wait for."""
        load = self._running.get(key)
        if load is None or (load.task is not None and load.task.done()):
            return None
        age_seconds = self._cache.begin_load(key).began_at - load.token.began_at
        if age_seconds >= self._cache.max_staleness_seconds or self._cache.is_void(load.token, load.tags):
            return None
        if blocks_thread and load.thread_id == threading.get_ident():
            return None
        if load.leads_to(_within.get()):
            return None
        self.shared += 1
        return load

    def _begin(self, key: str, tags: tuple[str, ...], ttl_seconds: float | None) -> _Load:
        load = _Load(self._cache.begin_load(key), tags, ttl_seconds)
        self._running[key] = load
        self.started += 1
        return load

    async def _run(self, load: _Load, loader: Loader) -> Any:
        _within.set((*_within.get(), load))
        value = loader()
        if inspect.isawaitable(value):
            value = await value
        self._cache.store(load.token, value, tags=load.tags, ttl_seconds=load.ttl_seconds)
        return value

    def _run_sync(self, load: _Load, loader: Loader) -> Any:
        within = _within.set((*_within.get(), load))
        try:
            value = loader()
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
        elif error := task.exception():
            self._finish(load, error=error)
        else:
            self._finish(load, task.result())

    def _finish(self, load: _Load, value: Any = None, *, error: BaseException | None = None) -> None:
        with self._lock:
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
        """One waiter was cancelled. When it was the last one, nobody wants the value: end the load."""
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


def _wait(load: _Load) -> _Load | None:
    """Note that the loader this runs in, if any, waits for `load`."""
    within = _within.get()
    if not within:
        return None
    within[-1].waits_for.add(load)
    return within[-1]


def _stop_waiting(parent: _Load | None, load: _Load) -> None:
    if parent is not None:
        parent.waits_for.discard(load)

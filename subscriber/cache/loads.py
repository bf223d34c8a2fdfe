"""Shared loads: concurrent misses of one key wait for one call of the loader."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Container, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Protocol

from ...shared.errors import InvalidLoader
from ...shared.process.forks import keep_inherited
from ...shared.process.loops import is_cancelled, is_in_event_loop
from .loading.failure import Failure
from .token import LoadToken

__all__ = ["Fillable", "Loads"]

Loader = Callable[[], Any]

_log = logging.getLogger("broadcache.subscriber")

_MISSING: Final = object()
_CANCELLED: Final = object()
"""The result of a load that was cancelled. Its callers start over."""
_PATIENCE_SECONDS_MIN: Final = 1.0
_PATIENCE_SECONDS_MAX: Final = 30.0


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
        self._has_warned = False

    def start_over(self, lock: AbstractContextManager[bool]) -> None:
        """Forget the loads under way, and share another lock: in a forked child, the parent's loads never end."""
        _renew_waits_lock()
        self._lock = lock
        keep_inherited(self._running)
        self._running = {}
        self.started = self.shared = 0
        self._has_warned = False

    async def load(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """Join the load of `key`, or start one, and return its value."""
        loop = asyncio.get_running_loop()
        within = _within.get()
        waits: list[_Load] = []
        own: _Load | None = None
        try:
            while True:
                if own is None:
                    with self._lock:
                        load = self._join(key, tags, waits, blocks_thread=False)
                        if load is None:
                            if (value := self._reread(key, _MISSING)) is not _MISSING:
                                return value
                            load = own = self._begin_task(key, loader, tags, ttl_seconds)
                        elif load.loop is not loop:
                            _outcome_of(load)
                        load.waiters += 1
                        waits.append(load)
                load, result = await _first_result(waits, loop, None if own else self._patience_seconds)
                if load is None:
                    self._warn_of_long_wait()
                elif result is _CANCELLED:
                    if load is own or is_cancelled():
                        raise asyncio.CancelledError
                    # Another caller's load was cancelled, e.g. with its event loop. This caller starts over.
                    waits.remove(load)
                    self._leave(within, load)
                elif isinstance(result, Failure):
                    raise result.error if load is own else result.of_joined_caller()
                else:
                    return result
        finally:
            for load in waits:
                self._leave(within, load)

    def load_sync(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """Join the load of `key`, or start one, and return its value. The calling thread blocks until then."""
        within = _within.get()
        waits: list[_Load] = []
        try:
            while True:
                with self._lock:
                    load = self._join(key, tags, waits, blocks_thread=True)
                    if is_own := load is None:
                        if (value := self._reread(key, _MISSING)) is not _MISSING:
                            return value
                        load = self._begin(key, tags, ttl_seconds)
                    else:
                        _outcome_of(load)
                    load.waiters += 1
                    waits.append(load)
                if is_own:
                    return self._run_sync(load, loader)
                outcomes = {_outcome_of(load): load for load in waits}
                done, _ = wait(outcomes, self._patience_seconds, FIRST_COMPLETED)
                if not done:
                    self._warn_of_long_wait()
                    continue
                outcome = done.pop()
                result = outcome.result()
                if result is _CANCELLED:
                    waits.remove(outcomes[outcome])
                    self._leave(within, outcomes[outcome])
                elif isinstance(result, Failure):
                    raise result.of_joined_caller()
                else:
                    return result
        finally:
            for load in waits:
                self._leave(within, load)

    @property
    def _patience_seconds(self) -> float:
        """How long a caller waits for another one's load before it loads by itself.

        The load's loader may wait for this very caller: `_within` shows that only where the context is inherited, and a
        pool of threads that all wait for a loader, which needs a thread of this pool, is another such circle.
        """
        return min(max(_PATIENCE_SECONDS_MIN, self._cache.max_staleness_seconds), _PATIENCE_SECONDS_MAX)

    def _warn_of_long_wait(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a read has waited %g s for another caller's load of its key, and loads by itself now. Either the "
                "source is slow, or the loader waits for this read: it reads its own key in a thread or task that "
                "does not inherit its context, as with loop.run_in_executor; use asyncio.to_thread, or run "
                "contextvars.copy_context().run there. This is logged once per cache",
                self._patience_seconds,
            )

    def _join(self, key: str, tags: tuple[str, ...], waits: Container[_Load], *, blocks_thread: bool) -> _Load | None:
        """Return the load of `key`, with a new caller recorded as waiting for it; None if it has none to join.

        Shape:  `waits` has the loads that this caller waits for already.
        """
        load = self._running.get(key)
        if load is None or load in waits or not self._is_joinable(load, tags, blocks_thread=blocks_thread):
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

    def _begin_task(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> _Load:
        load = self._begin(key, tags, ttl_seconds)
        load.loop = asyncio.get_running_loop()
        # Not loop.create_task: an eager task factory would run the loader at once, under the lock.
        load.task = asyncio.Task(self._run(load, loader), loop=load.loop, name=f"broadcache load {key:.100}")
        load.task.add_done_callback(partial(self._finish_task, load))
        return load

    async def _run(self, load: _Load, loader: Loader) -> Any:
        _within.set(_within_also(load))
        try:
            value = loader()
            if inspect.isawaitable(value):
                value = await value
            self._cache.store(load.token, value, tags=load.tags, ttl_seconds=load.ttl_seconds)
        except Exception as error:  # noqa: BLE001  (raised by each caller)
            return Failure(error)
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
            self._finish(load, _CANCELLED if isinstance(error, CancelledError) else Failure(error))
            raise
        finally:
            _within.reset(within)
        self._finish(load, value)
        return value

    def _finish_task(self, load: _Load, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self._finish(load, _CANCELLED)
        elif (error := task.exception()) is not None:  # not an Exception: those are results
            self._finish(load, Failure(error))
        else:
            self._finish(load, task.result())

    def _finish(self, load: _Load, result: Any) -> None:
        """End a load with its value, a Failure, or `_CANCELLED`."""
        with self._lock:
            load.is_finished = True
            if self._running.get(load.token.key) is load:
                del self._running[load.token.key]
            outcome = load.outcome
        if outcome is not None and outcome.set_running_or_notify_cancel():
            outcome.set_result(result)  # a failure too: one exception raised in several threads would mix their traces

    def _leave(self, within: tuple[_Load, ...], load: _Load) -> None:
        """Record that a caller no longer waits for `load`. If it was the last one, cancel the load."""
        if not load.is_finished:
            self._abandon(load)
        _stop_waiting(within, load)

    def _abandon(self, load: _Load) -> None:
        """Record that a caller left a running load."""
        with self._lock:
            load.waiters -= 1
            if load.waiters or load.task is None or load.loop is None or load.task.done():
                return
            if self._running.get(load.token.key) is load:
                del self._running[load.token.key]
        with suppress(RuntimeError):  # the loop was closed, which ends the load too
            load.loop.call_soon_threadsafe(load.task.cancel)


def _outcome_of(load: _Load) -> "Future[Any]":
    if load.outcome is None:
        load.outcome = Future()
    return load.outcome


async def _first_result(
    loads: Iterable[_Load], loop: asyncio.AbstractEventLoop, seconds: float | None
) -> tuple[_Load | None, Any]:
    """Wait until one of `loads` has ended; return it and its result, or None after that many seconds.

    Shape:  the result is a value, a Failure, or `_CANCELLED`. An `asyncio.CancelledError` is the caller's own.
    """
    first: asyncio.Future[tuple[_Load | None, Any]] = loop.create_future()
    for load in loads:
        ended = load.task if load.task and load.loop is loop else asyncio.wrap_future(_outcome_of(load))
        ended.add_done_callback(partial(_settle, first, load))
    timer = None if seconds is None else loop.call_later(seconds, _settle, first, None, None)
    try:
        return await first
    finally:
        if timer is not None:
            timer.cancel()


def _settle(
    first: "asyncio.Future[tuple[_Load | None, Any]]", load: _Load | None, ended: "asyncio.Future[Any] | None"
) -> None:
    if first.done():
        return
    if ended is None:
        first.set_result((load, None))
    elif ended.cancelled():
        first.set_result((load, _CANCELLED))
    elif (error := ended.exception()) is not None:
        first.set_exception(error)
    else:
        first.set_result((load, ended.result()))


def _within_also(load: _Load) -> tuple[_Load, ...]:
    # Tasks that a loader leaves behind inherit its context; finished loads would pile up there.
    return (*(outer for outer in _within.get() if not outer.is_finished), load)


def _stop_waiting(within: tuple[_Load, ...], load: _Load) -> None:
    """Record that the loader in which this wait began, if any, no longer waits for `load`.

    Not the loader in which it ends: a caller whose event loop was closed is collected later, inside unrelated code.
    """
    if within:
        within[-1].waits_for.remove(load)

"""Shared loads: concurrent misses of one key wait for one call of the loader."""

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from contextlib import AbstractContextManager, suppress
from contextvars import Context
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, Self

from ....shared.errors import InvalidLoader, InvalidSettings
from ....shared.process.forks import keep_inherited
from ....shared.process.loops import is_cancelled, is_in_event_loop
from ..checks import Names, Ttl, checked_tags, checked_ttl, seconds_of
from ..token import LoadToken
from .failure import Failure
from .load import ABSENT, CANCELLED, Load, first_result, stop_waiting, within, within_also
from .loaded import Loaded

__all__ = ["Fillable", "LoadOptions", "Loads", "value_of"]

Loader = Callable[[], Any]

_log = logging.getLogger("broadcache.subscriber")

_MISSING: Final = object()
_PATIENCE_SECONDS_MIN: Final = 1.0
_PATIENCE_SECONDS_MAX: Final = 30.0


class LoadOptions(NamedTuple):
    """How a cache loads, in seconds; None: no limit, and no refresh. With `finishes`, a load that was left goes on."""

    finishes: bool = False
    timeout_seconds: float | None = None
    refresh_after_seconds: float | None = None

    @classmethod
    def checked(cls, finishes: bool, timeout_seconds: Ttl, refresh_after_seconds: Ttl) -> Self:  # noqa: FBT001
        """Return checked options. Raises: InvalidSettings."""
        return cls(
            finishes=bool(finishes),
            timeout_seconds=_positive(timeout_seconds, "load_timeout_seconds"),
            refresh_after_seconds=_positive(refresh_after_seconds, "refresh_after_seconds"),
        )


def _positive(duration: Ttl, name: str) -> float | None:
    if duration is None:
        return None
    seconds = seconds_of(duration, name)
    if not 0 < seconds < math.inf:
        raise InvalidSettings(f"expected {name} to be None or a positive number of seconds, got {duration!r}")
    return seconds


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

    def store(self, token: LoadToken, value: Any, *, tags: Names = (), ttl_seconds: float | None = None) -> bool:
        """Store the source's value, unless the load is void."""
        ...


# Held from the check for circular waits until the new wait is recorded. One lock for all caches: their loaders may need
# each other's keys. Always acquired after a cache's own lock.
_waits_lock = threading.Lock()


def _renew_waits_lock() -> None:
    global _waits_lock  # noqa: PLW0603  (one for all caches; another thread may have held it when this process forked)
    _waits_lock = threading.Lock()


class Loads:
    """The loads under way in one cache, of one key each. Shares the cache's lock.

    Shape:  `reread` repeats a read that has just missed, under the lock: it is given a key and a default. `discard`,
            under the lock too, drops an entry whose source has no value that may be stored.
    """

    def __init__(
        self,
        cache: Fillable,
        lock: AbstractContextManager[bool],
        reread: Callable[[str, object], Any],
        discard: Callable[[str], object] = str,
        options: LoadOptions = LoadOptions(),  # noqa: B008  (immutable)
    ) -> None:
        self._cache = cache
        self._lock = lock
        self._reread = reread
        self._discard = discard
        self._options = options
        self._running: dict[str, Load] = {}
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
        if within.get() and self.is_within(key):
            return value_of(await self._called(loader))
        return await self._shared(key, loader, tags, ttl_seconds)

    async def _shared(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        loop = asyncio.get_running_loop()
        outer = within.get()
        waits: dict[Load, bool] = {}
        own: Load | None = None
        may_be_late = True
        try:
            while True:
                if own is None:
                    with self._lock:
                        load = self._join(key, tags, waits, blocks_thread=False, may_be_late=may_be_late)
                        if load is None:
                            if (value := self._reread(key, _MISSING)) is not _MISSING:
                                return value
                            load = own = self._begin_task(key, loader, tags, ttl_seconds)
                            waits[load] = False
                        elif load.loop is not loop:
                            load.awaited_outcome()
                        load.waiters += 1
                load, result = await first_result(waits, loop, None if own else self._patience_seconds)
                if load is None:
                    self._warn_of_long_wait()
                elif result is CANCELLED and (load is own or is_cancelled()):
                    raise asyncio.CancelledError
                elif self._is_no_result(load, result, is_late=waits[load]):
                    may_be_late = False
                    del waits[load]
                    self._leave(outer, load)
                elif isinstance(result, Failure):
                    raise result.error if load is own else result.of_joined_caller()
                else:
                    return result
        finally:
            for load in waits:
                self._leave(outer, load)

    def load_sync(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Any:
        """Join the load of `key`, or start one, and return its value. The calling thread blocks until then."""
        outer = within.get()
        if outer and self.is_within(key):
            return value_of(self._called_sync(loader, key))
        waits: dict[Load, bool] = {}
        may_be_late = True
        try:
            while True:
                with self._lock:
                    load = self._join(key, tags, waits, blocks_thread=True, may_be_late=may_be_late)
                    if is_own := load is None:
                        if (value := self._reread(key, _MISSING)) is not _MISSING:
                            return value
                        load = self._begin(key, tags, ttl_seconds)
                        waits[load] = False
                    else:
                        load.awaited_outcome()
                    load.waiters += 1
                if is_own:
                    return self._run_sync(load, loader)
                load, result = self._first_result_sync(waits, self._patience_seconds)
                if load is None:
                    self._warn_of_long_wait()
                elif self._is_no_result(load, result, is_late=waits[load]):
                    may_be_late = False
                    del waits[load]
                    self._leave(outer, load)
                elif isinstance(result, Failure):
                    raise result.of_joined_caller()
                else:
                    return result
        finally:
            for load in waits:
                self._leave(outer, load)

    def is_within(self, key: str) -> bool:
        """Whether this code runs in the loader of `key`, as a method that calls the one it overrides.

        What it reads of its own key is only a part of the value: it comes from the source, and is not stored or shared.
        """
        return any(each.owner is self and each.token.key == key and not each.is_finished for each in within.get())

    @staticmethod
    def _first_result_sync(waits: Iterable[Load], seconds: float) -> tuple[Load | None, Any]:
        outcomes = {load.awaited_outcome(): load for load in waits}
        done, _ = wait(outcomes, seconds, FIRST_COMPLETED)
        return (outcomes[ended := done.pop()], ended.result()) if done else (None, None)

    def _is_no_result(self, load: Load, result: Any, *, is_late: bool) -> bool:
        """Whether a caller of `load` has to start over.

        The load was cancelled, e.g. with its event loop; or it was one of several keys, and the loader left this one
        out; or a tag that came with the value may have been invalidated before the caller arrived, which could not know
        it. A caller is late if anything was invalidated between the load's start and its own arrival.
        """
        if result is CANCELLED or result is ABSENT:
            return True
        return is_late and bool(load.loaded_tags) and self._cache.is_void(load.token, load.loaded_tags)

    @property
    def _patience_seconds(self) -> float:
        """How long a caller waits for another one's load before it loads by itself.

        The load's loader may wait for this very caller: `within` shows that only where the context is inherited, and a
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

    def _join(
        self,
        key: str,
        tags: tuple[str, ...],
        waits: dict[Load, bool],
        *,
        blocks_thread: bool,
        may_be_late: bool,
    ) -> Load | None:
        """Return the load of `key`, with a new caller recorded as waiting for it; None if it has none to join.

        Shape:  `waits` has the loads that this caller waits for already, and whether it came late to each.
        """
        load = self._running.get(key)
        if load is None or load in waits or not self._is_joinable(load, tags, blocks_thread=blocks_thread):
            return None
        is_late = self._cache.begin_load(key).stamp != load.token.stamp
        if is_late and not may_be_late:
            return None
        outer = within.get()
        with _waits_lock:
            if load.leads_to(outer):
                return None
            if outer:
                outer[-1].waits_for.append(load)
        self.shared += 1
        waits[load] = is_late
        return load

    def _is_joinable(self, load: Load, tags: tuple[str, ...], *, blocks_thread: bool) -> bool:
        if tags != load.tags and not set(tags) <= set(load.tags):
            return False  # an invalidation of the missing tags would not find its value
        root = load.root
        if root.task is not None and root.task.done():
            return False
        if root.loop is not None and root.loop.is_closed():
            return False
        age_seconds = self._cache.begin_load(load.token.key).began_at - load.token.began_at
        if age_seconds >= self._cache.max_staleness_seconds or self._cache.is_void(load.token, load.tags):
            return False
        # A thread that runs an event loop must not block: the load may need this same loop.
        return not blocks_thread or (load.thread_id != threading.get_ident() and not is_in_event_loop())

    def _begin(self, key: str, tags: tuple[str, ...], ttl_seconds: float | None) -> Load:
        load = Load(self._cache.begin_load(key), tags, ttl_seconds)
        load.owner = self
        self._running[key] = load
        self._count_as_begun(load)
        return load

    def _count_as_begun(self, load: Load) -> None:
        self._count(load)
        if outer := within.get():
            outer[-1].waits_for.append(load)

    def _count(self, load: Load) -> None:
        load.is_kept = self._options.finishes
        self.started += 1

    def _begin_task(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> Load:
        load = self._begin(key, tags, ttl_seconds)
        self._run_as_task(load, self._run(load, loader), self._finish_task)
        return load

    @staticmethod
    def _run_as_task(
        load: Load,
        work: Coroutine[Any, Any, Any],
        on_done: Callable[[Load, asyncio.Task[Any]], None],
        context: Context | None = None,
    ) -> None:
        load.loop = asyncio.get_running_loop()
        # Not loop.create_task: an eager task factory would run the loader at once, under the lock.
        name = f"broadcache load {load.token.key:.100}"
        load.task = asyncio.Task(work, loop=load.loop, name=name, context=context)
        load.task.add_done_callback(partial(on_done, load))

    async def _run(self, load: Load, loader: Loader) -> Any:
        within.set(within_also(load))
        try:
            return self._fill(load, await self._called(loader))
        except Exception as error:  # noqa: BLE001  (raised by each caller)
            return Failure(error)

    async def _called(self, loader: Loader) -> Any:
        """Return the result of a loader. Raises: TimeoutError when it takes too long; what the loader raises."""
        seconds = self._options.timeout_seconds
        if seconds is None:
            value = loader()
            return await value if inspect.isawaitable(value) else value
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                value = loader()
                return await value if inspect.isawaitable(value) else value
        except TimeoutError as error:
            if error.args or not limit.expired():
                raise  # the loader's own
            raise TimeoutError(
                f"a load was cancelled because it took longer than load_timeout_seconds={seconds:g}: expected a faster "
                "source, or a longer limit"
            ) from None

    def _run_sync(self, load: Load, loader: Loader) -> Any:
        outer = within.set(within_also(load))
        try:
            value = self._fill(load, self._called_sync(loader, load.token.key))
        except BaseException as error:
            self._finish(load, CANCELLED if isinstance(error, CancelledError) else Failure(error))
            raise
        finally:
            within.reset(outer)
        self._finish(load, value)
        return value

    @staticmethod
    def _called_sync(loader: Loader, what: str) -> Any:
        value = loader()
        if inspect.iscoroutine(value):
            value.close()
            raise InvalidLoader(
                f"expected a loader that returns a value for {what!r:.100}, got an asynchronous one; "
                "await get_or_load(...) instead"
            )
        return value

    def _fill(self, load: Load, value: Any) -> Any:
        """Store what a loader has returned, if it may be; return the value."""
        if not issubclass(type(value), Loaded):  # not isinstance, which may run the value's own code
            if self._cache.store(load.token, value, tags=load.tags, ttl_seconds=load.ttl_seconds):
                self._note_store(load.token)
            return value
        load.loaded_tags = checked_tags(value.tags)
        if value.store:
            ttl_seconds = load.ttl_seconds if value.ttl_seconds is None else checked_ttl(value.ttl_seconds)
            if self._cache.store(load.token, value.value, tags=load.tags + load.loaded_tags, ttl_seconds=ttl_seconds):
                self._note_store(load.token)
        else:
            self._drop_older(load)
        return value.value

    def _note_store(self, token: LoadToken) -> None:
        """Note when a load began whose value was stored."""

    def _drop_older(self, load: Load) -> None:
        """Drop the entry that is older than the load, because its source has nothing to be stored."""
        with self._lock:
            if not self._cache.is_void(load.token, load.tags):
                self._discard(load.token.key)

    def _finish_task(self, load: Load, task: asyncio.Task[Any]) -> None:
        self._finish(load, self._result_of(task))

    @staticmethod
    def _result_of(task: asyncio.Task[Any]) -> Any:
        if task.cancelled():
            return CANCELLED
        error = task.exception()
        return task.result() if error is None else Failure(error)  # not an Exception: those are results

    def _finish(self, load: Load, result: Any) -> None:
        """End a load with its value, a Failure, `CANCELLED` or `ABSENT`."""
        with self._lock:
            load.is_finished = True
            if self._running.get(load.token.key) is load:
                del self._running[load.token.key]
            outcome = load.outcome
        if outcome is not None and outcome.set_running_or_notify_cancel():
            outcome.set_result(result)  # a failure too: one exception raised in several threads would mix their traces

    def _leave(self, outer: tuple[Load, ...], load: Load) -> None:
        """Record that a caller no longer waits for `load`. If it was the last one, cancel the load."""
        if not load.is_finished:
            self._abandon(load)
        stop_waiting(outer, load)

    def _abandon(self, load: Load) -> None:
        """Record that a caller left a running load."""
        root = load.root
        with self._lock:
            load.waiters -= 1
            if root.is_kept or root.is_awaited or root.task is None or root.loop is None or root.task.done():
                return
            for each in (root, *root.parts):
                if self._running.get(each.token.key) is each:
                    del self._running[each.token.key]
        with suppress(RuntimeError):  # the loop was closed, which ends the load too
            root.loop.call_soon_threadsafe(root.task.cancel)


def value_of(loaded: Any) -> Any:
    """Return the value of what a loader has returned."""
    return loaded.value if issubclass(type(loaded), Loaded) else loaded

"""Refreshes: a hit that is old is served, and its value is loaded again in the background."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any, Final

from ..token import LoadToken
from .failure import Failure
from .load import CANCELLED, Load
from .loads import Loader
from .many import LoadsOfMany, ManyLoader

__all__ = ["RefreshedLoads"]

_log = logging.getLogger("broadcache.subscriber")

_THREADS_MAX: Final = 8
"""How many blocking loaders of one cache refresh at the same time. Beyond that, a later hit tries again."""
_REMEMBERED_MAX: Final = 65_536
"""How many ages of entries are remembered."""


class RefreshedLoads(LoadsOfMany):
    """Loads, and refreshes of entries that are older than `options.refresh_after_seconds`.

    A refresh is a load like any other: its token voids it when an invalidation concerns it. It runs in an empty
    context, because it outlives the caller that began it, and nothing cancels it but its event loop. At most one for
    each key begins in that time, also if it fails: the old value is then served until its lifetime ends.
    """

    _due: dict[str, float]
    _threads: int = 0
    _has_refresh_failed: bool = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.refreshes: Final = self._options.refresh_after_seconds is not None
        self._refresh_after_seconds = self._options.refresh_after_seconds or 0.0
        self._due = {}

    def start_over(self, lock: Any) -> None:
        """Forget all loads and refreshes, in a forked child."""
        super().start_over(lock)
        self._due, self._threads, self._has_refresh_failed = {}, 0, False

    def due(self, keys: Iterable[str]) -> list[str]:
        """Return those of `keys`, all hits, that are to be refreshed now. Each is returned once."""
        with self._lock:
            return [key for key in keys if self._is_due(key)]

    def _is_due(self, key: str) -> bool:
        now = self._cache.begin_load(key).began_at
        due_at = self._due.get(key)
        if due_at is None:  # not stored by a load, or forgotten: its age counts from now
            self._set_due(key, now)
            return False
        if now < due_at or key in self._running:
            return False
        self._set_due(key, now)
        return True

    def _note_store(self, token: LoadToken) -> None:
        if self.refreshes:
            with self._lock:
                self._set_due(token.key, token.began_at)

    def _set_due(self, key: str, began_at: float) -> None:
        due = self._due
        due.pop(key, None)
        due[key] = began_at + self._refresh_after_seconds
        if len(due) > _REMEMBERED_MAX:
            for old in list(due)[: _REMEMBERED_MAX // 2]:  # the ages of these entries count from their next hit
                del due[old]

    def refresh(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> None:
        """Begin a refresh on the running event loop. `due` has returned the key."""
        with self._lock:
            load = self._begun([key], tags, ttl_seconds)
            self._run_as_task(load, self._run(load, loader), self._finish_refresh, Context())

    def refresh_many(
        self, keys: list[str], loader: ManyLoader, tags: tuple[str, ...], ttl_seconds: float | None
    ) -> None:
        """Begin one refresh of several keys on the running event loop."""
        with self._lock:
            batch = self._begun(keys, tags, ttl_seconds, is_many=True)
            self._run_as_task(batch, self._run_many(batch, loader), self._finish_refresh, Context())

    def refresh_sync(self, key: str, loader: Loader, tags: tuple[str, ...], ttl_seconds: float | None) -> None:
        """Begin a refresh in a thread of its own."""
        self._in_thread([key], tags, ttl_seconds, lambda load: self._run_sync(load, loader), is_many=False)

    def refresh_many_sync(
        self, keys: list[str], loader: ManyLoader, tags: tuple[str, ...], ttl_seconds: float | None
    ) -> None:
        """Begin one refresh of several keys in a thread of its own."""
        self._in_thread(keys, tags, ttl_seconds, lambda batch: self._run_many_sync(batch, loader), is_many=True)

    def _begun(
        self, keys: list[str], tags: tuple[str, ...], ttl_seconds: float | None, *, is_many: bool = False
    ) -> Load:
        if is_many:
            load = self.begin_many(keys, tags, ttl_seconds)
        else:
            load = self._running[keys[0]] = Load(self._cache.begin_load(keys[0]), tags, ttl_seconds)
            load.owner = self
        self._count(load)
        load.is_kept = True
        return load

    def _in_thread(
        self,
        keys: list[str],
        tags: tuple[str, ...],
        ttl_seconds: float | None,
        run: Callable[[Load], object],
        *,
        is_many: bool,
    ) -> None:
        with self._lock:
            if self._threads >= _THREADS_MAX:
                for key in keys:
                    self._due.pop(key, None)
                    self._due[key] = self._cache.begin_load(key).began_at
                return
            self._threads += 1
            load = self._begun(keys, tags, ttl_seconds, is_many=is_many)
            load.thread_id = 0  # a caller in this thread may wait for it
        # An empty context: a thread may inherit that of the caller.
        work = Context().run
        thread = threading.Thread(target=work, args=(self._refresh, load, run), name="broadcache refresh", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter ends
            with self._lock:
                self._threads -= 1
            self._end(load, CANCELLED)
            self._report(error)

    def _refresh(self, load: Load, run: Callable[[Load], object]) -> None:
        try:
            run(load)
        except Exception as error:  # noqa: BLE001  (of the loader)
            self._report(error)
        else:
            self._has_refresh_failed = False
        finally:
            with self._lock:
                self._threads -= 1

    def _end(self, load: Load, result: Any) -> None:
        if load.parts:
            self._finish_many(load, result)
        else:
            self._finish(load, result)

    def _finish_refresh(self, load: Load, task: asyncio.Task[Any]) -> None:
        result = self._result_of(task)
        self._end(load, result)
        if isinstance(result, Failure):
            self._report(result.error)
        elif result is not CANCELLED:
            self._has_refresh_failed = False

    def _report(self, error: BaseException) -> None:
        if not self._has_refresh_failed:
            self._has_refresh_failed = True
            _log.warning(
                "a refresh failed with %s: the old value is served until its lifetime ends, and is refreshed again in "
                "%g s at the earliest. This is logged once until a refresh succeeds",
                type(error).__qualname__,
                self._refresh_after_seconds,
                exc_info=error,
            )

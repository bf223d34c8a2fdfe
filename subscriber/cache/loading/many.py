"""One load for several keys: a query for those that are missing, which callers of single keys share."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextvars import Context
from typing import Any, Final

from ....shared.errors import InvalidLoader
from ....shared.process.loops import is_cancelled
from .failure import Failure
from .load import ABSENT, CANCELLED, Load, first_result, within, within_also
from .loads import Loads, value_of

__all__ = ["LoadsOfMany", "ManyLoader"]

ManyLoader = Callable[[list[str]], Any]

_MISSING: Final = object()


class _Share:
    """What one caller waits for: a load of its own for some keys, and other callers' loads of others."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.own: Load | None = None
        self.waits: dict[Load, bool] = {}

    def others(self) -> list[Load]:
        """The loads of other callers."""
        return [load for load in self.waits if load is not self.own]


class LoadsOfMany(Loads):
    """Loads of several keys, beside those of one.

    A caller begins one load for all keys that no other caller loads, and joins the loads of the others. Each key is a
    `Load` of its own, with a token of its own: it can be joined, and voided, like any other.
    """

    async def load_many(
        self, keys: list[str], loader: ManyLoader, tags: tuple[str, ...], ttl_seconds: float | None
    ) -> dict[str, Any]:
        """Return the values of those `keys` that their loaders returned."""
        loop = asyncio.get_running_loop()
        outer = within.get()
        found: dict[str, Any] = {}
        is_first = True
        while keys:
            share = self._share(keys, tags, ttl_seconds, loader=loader, may_join=is_first)
            again: list[str] = []
            try:
                patient_until = loop.time() + self._patience_seconds
                if share.own is not None:
                    _, result = await first_result([share.own], loop, None)
                    if result is CANCELLED:
                        raise asyncio.CancelledError
                    share.found.update(_checked(result, is_own=True))
                for load in share.others():
                    ended: Load | None = load
                    outcome = load.awaited_outcome()
                    if outcome.done():  # while this waited for its own
                        result = outcome.result()
                    else:
                        ended, result = await first_result([load], loop, patient_until - loop.time())
                    self._take(share, load, ended, result, again)
                    if result is CANCELLED and is_cancelled():
                        raise asyncio.CancelledError
            finally:
                for load in share.waits:
                    self._leave(outer, load)
            found.update(share.found)
            keys, is_first = again, False
        return found

    def load_many_sync(
        self, keys: list[str], loader: ManyLoader, tags: tuple[str, ...], ttl_seconds: float | None
    ) -> dict[str, Any]:
        """Do the same, and block the calling thread."""
        outer = within.get()
        found: dict[str, Any] = {}
        is_first = True
        while keys:
            share = self._share(keys, tags, ttl_seconds, loader=None, may_join=is_first)
            again: list[str] = []
            try:
                if share.own is not None:
                    share.found.update(self._run_many_sync(share.own, loader))
                seconds = self._patience_seconds
                for load in share.others():
                    ended, result = self._first_result_sync([load], seconds)
                    seconds = seconds if ended else 0.0
                    self._take(share, load, ended, result, again)
            finally:
                for load in share.waits:
                    self._leave(outer, load)
            found.update(share.found)
            keys, is_first = again, False
        return found

    def begin_many(self, keys: list[str], tags: tuple[str, ...], ttl_seconds: float | None) -> Load:
        """Begin a load of several keys, whose loader is not called yet. Under the lock."""
        batch = Load(self._cache.begin_load(keys[0]), tags, ttl_seconds)
        batch.parts = tuple(Load(self._cache.begin_load(key), tags, ttl_seconds, batch) for key in keys)
        own = [part for part in batch.parts if not self.is_within(part.token.key)]
        for each in (batch, *own):
            each.owner = self
        self._running.update({part.token.key: part for part in own})
        return batch

    def _share(
        self,
        keys: list[str],
        tags: tuple[str, ...],
        ttl_seconds: float | None,
        *,
        loader: ManyLoader | None,
        may_join: bool,
    ) -> _Share:
        """Join the loads of some keys, and begin one for the others: as a task, with `loader`, or for this thread.

        A caller that starts over joins none: it is to end after this round.
        """
        blocks_thread = loader is None
        share = _Share()
        own: list[str] = []
        with self._lock:
            for key in keys:
                load = None
                if self.is_within(key):
                    own.append(key)
                    continue
                if may_join:
                    load = self._join(key, tags, share.waits, blocks_thread=blocks_thread, may_be_late=True)
                if load is not None:
                    load.awaited_outcome()
                    load.waiters += 1
                elif (value := self._reread(key, _MISSING)) is not _MISSING:
                    share.found[key] = value
                else:
                    own.append(key)
            if own:
                share.own = self.begin_many(own, tags, ttl_seconds)
                self._count_as_begun(share.own)
                share.own.waiters += 1
                share.waits[share.own] = False
                if loader is not None:
                    self._run_many_as_task(share.own, loader)
        return share

    def _take(self, share: _Share, load: Load, ended: Load | None, result: Any, again: list[str]) -> None:
        """Take the result of another caller's load; None as `ended`: it has not ended in time."""
        if ended is None:
            self._warn_of_long_wait()
            again.append(load.token.key)
        elif result is not ABSENT and self._is_no_result(load, result, is_late=share.waits[load]):
            again.append(load.token.key)
        elif result is not ABSENT:
            share.found[load.token.key] = _checked(result, is_own=False)

    def _run_many_as_task(self, batch: Load, loader: ManyLoader, context: Context | None = None) -> None:
        self._run_as_task(batch, self._run_many(batch, loader), self._finish_many_task, context)

    async def _run_many(self, batch: Load, loader: ManyLoader) -> Any:
        within.set(within_also(*batch.parts, batch))
        try:
            return self._fill_many(batch, await self._called(lambda: loader(_keys_of(batch))))
        except Exception as error:  # noqa: BLE001  (raised by each caller)
            return Failure(error)

    def _run_many_sync(self, batch: Load, loader: ManyLoader) -> dict[str, Any]:
        outer = within.set(within_also(*batch.parts, batch))
        try:
            keys = _keys_of(batch)
            found = self._fill_many(batch, self._called_sync(lambda: loader(keys), keys[0]))
        except BaseException as error:
            self._finish_many(batch, CANCELLED if isinstance(error, CancelledError) else Failure(error))
            raise
        finally:
            within.reset(outer)
        self._finish_many(batch, found)
        return found

    def _fill_many(self, batch: Load, loaded: Any) -> dict[str, Any]:
        """Store what the loader has returned, and drop the older values of keys that it left out."""
        if not isinstance(loaded, Mapping):
            raise InvalidLoader(
                "expected a loader of several keys to return a mapping of keys to values, got "
                f"{type(loaded).__name__}; leave out the keys that have no value"
            )
        found: dict[str, Any] = {}
        for part in batch.parts:
            value = loaded.get(part.token.key, _MISSING)
            if value is _MISSING:
                if part.owner is not None:
                    self._drop_older(part)
            elif part.owner is None:  # read by the load of this key
                found[part.token.key] = value_of(value)
            else:
                found[part.token.key] = self._fill(part, value)
        return found

    def _finish_many_task(self, batch: Load, task: asyncio.Task[Any]) -> None:
        self._finish_many(batch, self._result_of(task))

    def _finish_many(self, batch: Load, result: Any) -> None:
        with self._lock:
            batch.is_finished = True
        for part in batch.parts:
            self._finish(part, result.get(part.token.key, ABSENT) if isinstance(result, dict) else result)


def _keys_of(batch: Load) -> list[str]:
    return [part.token.key for part in batch.parts]


def _checked(result: Any, *, is_own: bool) -> Any:
    """Return a result; raise a failure."""
    if isinstance(result, Failure):
        raise result.error if is_own else result.of_joined_caller()
    return result

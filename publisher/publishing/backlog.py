"""What waits to be logged: bounded, without what something newer covers, and coarser rather than less when full."""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Final, NamedTuple

import msgspec

from ...shared.invalidation import (
    REQUEST_NAMES_MAX,
    Everything,
    Invalidation,
    Prefixes,
    Target,
    invalidation_of,
    new_id,
)
from ...shared.transport.redis.link import Link
from .coverage import Coverage

__all__ = ["Backlog", "Pending"]

_SEPARATORS: Final = ":/."
"""Where a key may be cut, so that those that begin alike become one prefix."""
_WIDENED: Final = "widened: the retry queue of the publisher was full"


class Pending(NamedTuple):
    """An invalidation that is still to be logged.

    Shape: `ask_first` asks Redis something right before it is logged, over the same link. `scope` is whose id it is:
           the source's when None. `stands_for_others` when others were left to it: if the log had this id already,
           from before, it has not logged what they stood for, and it takes a new id.
    Units: `receipt_seconds` is how long the log remembers its id.
    """

    invalidation: Invalidation
    receipt_seconds: float
    ask_first: Callable[[Link], Awaitable[None]] | None = None
    scope: str | None = None
    stands_for_others: bool = False


class Backlog:
    """Holds at most `names_max` names, over all namespaces; Everything() counts as one.

    Invalidations commute, so no order is kept. What an older one drops is left to a newer one that covers it, never
    the other way round: the older one may be in the log already, before the newer one was asked for.

    Shape: `names_count` is how many names it holds; `source` is told as the publisher of what was widened.
    """

    def __init__(self, *, names_max: int, source: str) -> None:
        self.names_max: Final = names_max
        self.names_count = 0
        self._source = source
        self._pending: dict[int, Pending] = {}
        self._namespaces: dict[str, _Waiting] = {}
        self._last_ticket = 0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def namespaces(self) -> list[str]:
        """The namespaces that something waits for."""
        return sorted(self._namespaces)

    def add(self, pending: Pending) -> bool:
        """Hold it, and widen what is held when it becomes too much.

        Return whether it is held: not when as many namespaces wait as names may be held, each with Everything().
        """
        namespace = pending.invalidation.namespace
        if len(self._namespaces.keys() | {namespace}) > self.names_max:
            return False
        self._insert(self._in_place_of_covered(pending))
        if self.names_count > self.names_max:
            self._widen()
        return True

    def first(self, count: int) -> list[tuple[int, Pending]]:
        """Return up to `count` of them, each with its ticket."""
        return list(islice(self._pending.items(), count))

    def remove(self, ticket: int) -> None:
        """Forget this one, if it is still held: it has been logged."""
        pending = self._pending.pop(ticket, None)
        if pending is None:
            return
        namespace = pending.invalidation.namespace
        waiting = self._namespaces[namespace]
        waiting.remove(ticket, pending.invalidation)
        self.names_count -= _names_count_of(pending.invalidation)
        if not waiting.tickets:
            del self._namespaces[namespace]

    def postpone(self, ticket: int) -> None:
        """Put this one behind all others, if it is still held: it could not be logged, and others perhaps can."""
        pending = self._pending.pop(ticket, None)
        if pending is not None:
            self._pending[ticket] = pending

    def rename(self, ticket: int) -> None:
        """Give this one another id, if it is still held: its own was used before."""
        pending = self._pending.get(ticket)
        if pending is not None:
            renamed = msgspec.structs.replace(pending.invalidation, id=new_id())
            self._pending[ticket] = pending._replace(invalidation=renamed, stands_for_others=False)

    def clear(self) -> None:
        """Forget all of it."""
        self._pending.clear()
        self._namespaces.clear()
        self.names_count = 0

    def _insert(self, pending: Pending) -> None:
        invalidation = pending.invalidation
        self._last_ticket += 1
        self._pending[self._last_ticket] = pending
        self._namespaces.setdefault(invalidation.namespace, _Waiting()).add(self._last_ticket, invalidation)
        self.names_count += _names_count_of(invalidation)

    def _in_place_of_covered(self, newer: Pending) -> Pending:
        """Drop what `newer` covers, and return it as what is held instead."""
        waiting = self._namespaces.get(newer.invalidation.namespace)
        if waiting is None:
            return newer
        coverage = Coverage.of(newer.invalidation)
        for ticket in waiting.candidates(newer.invalidation):
            older = self._pending[ticket]
            if coverage.covers(older.invalidation):
                self.remove(ticket)
                is_same = (older.scope, older.invalidation.id) == (newer.scope, newer.invalidation.id)
                if older.stands_for_others or not is_same:
                    newer = newer._replace(stands_for_others=True)
        return newer

    def _widen(self) -> None:
        """Make it coarser until half of it is free, so that it is not done for each invalidation anew."""
        while self.names_count > max(1, self.names_max // 2):
            namespace, largest = max(self._namespaces.items(), key=lambda named: named[1].names_count)
            if largest.names_count == 1:
                return
            if not self._widen_to_stems(namespace):
                self._widen_to_everything(namespace)

    def _widen_to_stems(self, namespace: str) -> bool:
        """Make one prefix of names that begin alike up to a separator. Return whether there were any."""
        held = self._held_of(namespace)
        whole = [pending.invalidation for pending in held.values()]
        names = chain.from_iterable((*each.keys, *each.prefixes) for each in whole)
        counts = Counter(stem for name in names if (stem := _stem_of(name)))
        coverage = Coverage(prefixes=[stem for stem, count in counts.items() if count > 1])
        stems = coverage.prefixes
        for start in range(0, len(stems), REQUEST_NAMES_MAX):
            self._insert(self._widened(Prefixes(*stems[start : start + REQUEST_NAMES_MAX]), held.values()))
        for ticket, pending in held.items() if stems else ():
            rest = _less(pending, coverage)
            if rest is not pending:
                self.remove(ticket)
                if rest is not None:
                    self._insert(rest)
        return bool(stems)

    def _widen_to_everything(self, namespace: str) -> None:
        held = self._held_of(namespace)
        self._insert(self._widened(Everything(), held.values()))
        for ticket in held:
            self.remove(ticket)

    def _held_of(self, namespace: str) -> dict[int, Pending]:
        return {ticket: self._pending[ticket] for ticket in self._namespaces[namespace].tickets}

    def _widened(self, target: Target, held: Collection[Pending]) -> Pending:
        """Return what takes the place of some of these. It has a new id: no replica has heard it."""
        namespace = next(iter(held)).invalidation.namespace
        widened = invalidation_of([target], namespace=namespace, reason=_WIDENED, source=self._source)
        return Pending(widened, max(pending.receipt_seconds for pending in held))


class _Waiting:
    """What waits for one namespace, by the names in it."""

    def __init__(self) -> None:
        self.tickets: dict[int, None] = {}
        self.names_count = 0
        self._by_name: dict[tuple[str, str], set[int]] = {}

    def add(self, ticket: int, invalidation: Invalidation) -> None:
        self.tickets[ticket] = None
        self.names_count += _names_count_of(invalidation)
        for name in _names_of(invalidation):
            self._by_name.setdefault(name, set()).add(ticket)

    def remove(self, ticket: int, invalidation: Invalidation) -> None:
        del self.tickets[ticket]
        self.names_count -= _names_count_of(invalidation)
        for name in _names_of(invalidation):
            tickets = self._by_name[name]
            tickets.discard(ticket)
            if not tickets:
                del self._by_name[name]

    def candidates(self, newer: Invalidation) -> list[int]:
        """Return those that `newer` may cover. Without prefixes it covers none that shares no name with it."""
        if newer.everything or newer.prefixes:
            return list(self.tickets)
        return list(set(chain.from_iterable(self._by_name.get(name, ()) for name in _names_of(newer))))


def _names_of(invalidation: Invalidation) -> Iterator[tuple[str, str]]:
    for kind in ("keys", "tags", "prefixes"):
        for name in getattr(invalidation, kind):
            yield kind, name


def _names_count_of(invalidation: Invalidation) -> int:
    return len(invalidation.keys) + len(invalidation.tags) + len(invalidation.prefixes) + invalidation.everything


def _stem_of(name: str) -> str:
    """Return `name` up to its last separator, without one that it ends in; nothing when it has none."""
    end = max(map(name[:-1].rfind, _SEPARATORS))
    return name[: end + 1]


def _less(pending: Pending, coverage: Coverage) -> Pending | None:
    """Return what `coverage` leaves of it, with an id of its own if that is less than before; None for nothing."""
    whole = pending.invalidation
    keys = _outside(whole.keys, coverage.covers_key)
    prefixes = _outside(whole.prefixes, coverage.covers_prefix)
    if len(keys) == len(whole.keys) and len(prefixes) == len(whole.prefixes):
        return pending
    if not keys and not prefixes and not whole.tags:
        return None
    return pending._replace(invalidation=msgspec.structs.replace(whole, id=new_id(), keys=keys, prefixes=prefixes))


def _outside(names: Sequence[str], is_covered: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(name for name in names if not is_covered(name))

"""A bounded queue of unlogged invalidations: newer ones replace those they cover; when full, it widens, never drops."""

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
"""Where keys with a common beginning may be cut, to replace them by one prefix."""
_WIDENED: Final = "widened: the retry queue of the publisher was full"


class Pending(NamedTuple):
    """An invalidation that is still to be logged.

    Shape: `before_append` is called right before it is logged, with the same link. `scope` is the scope of its id, the
           invalidation's source when None. `stands_for_others` is whether it has replaced others that it covers: if the
           log has its id from an earlier publish, the others are not logged with it, and it needs a new id.
    Units: `receipt_seconds` is how long the log remembers its id.
    """

    invalidation: Invalidation
    receipt_seconds: float
    before_append: Callable[[Link], Awaitable[None]] | None = None
    scope: str | None = None
    stands_for_others: bool = False


class Backlog:
    """Holds at most `names_max` names, over all namespaces; Everything() counts as one.

    Invalidations commute, so no order is kept. A newer one replaces older ones that it covers, never the other way
    round: the older one may be in the log already, from before the newer one was published.

    Shape: `names_count` is how many names it holds; `source` is the source of widened invalidations.
    """

    def __init__(self, *, names_max: int, source: str) -> None:
        self.names_max: Final = names_max
        self.names_count: int = 0
        self._source = source
        self._pending: dict[int, Pending] = {}
        self._namespaces: dict[str, _Waiting] = {}
        self._last_ticket = 0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def namespaces(self) -> list[str]:
        """The namespaces of the held invalidations, sorted."""
        return sorted(self._namespaces)

    def add(self, pending: Pending) -> bool:
        """Add an invalidation; widen held ones when there are too many names.

        Return whether it was added. It is not when `names_max` other namespaces are held, each with Everything().
        """
        namespace = pending.invalidation.namespace
        if len(self._namespaces.keys() | {namespace}) > self.names_max:
            return False
        self._insert(self._replace_covered(pending))
        if self.names_count > self.names_max:
            self._widen()
        return True

    def first(self, count: int) -> list[tuple[int, Pending]]:
        """Return up to `count` invalidations, each with its ticket."""
        return list(islice(self._pending.items(), count))

    def remove(self, ticket: int) -> None:
        """Remove an invalidation that has been logged, if it is still held."""
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
        """Move an invalidation that could not be logged behind all others, if it is still held."""
        pending = self._pending.pop(ticket, None)
        if pending is not None:
            self._pending[ticket] = pending

    def rename(self, ticket: int) -> None:
        """Give an invalidation whose id was used before a new id, if it is still held."""
        pending = self._pending.get(ticket)
        if pending is not None:
            renamed = msgspec.structs.replace(pending.invalidation, id=new_id())
            self._pending[ticket] = pending._replace(invalidation=renamed, stands_for_others=False)

    def clear(self) -> None:
        """Remove all invalidations."""
        self._pending.clear()
        self._namespaces.clear()
        self.names_count = 0

    def _insert(self, pending: Pending) -> None:
        invalidation = pending.invalidation
        self._last_ticket += 1
        self._pending[self._last_ticket] = pending
        self._namespaces.setdefault(invalidation.namespace, _Waiting()).add(self._last_ticket, invalidation)
        self.names_count += _names_count_of(invalidation)

    def _replace_covered(self, newer: Pending) -> Pending:
        """Remove what `newer` covers, and return the invalidation to hold instead."""
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
        """Widen the largest namespaces until half of the names are free, so that the next adds need not widen again."""
        while self.names_count > max(1, self.names_max // 2):
            namespace, largest = max(self._namespaces.items(), key=lambda named: named[1].names_count)
            if largest.names_count == 1:
                return
            if not self._widen_to_stems(namespace):
                self._widen_to_everything(namespace)

    def _widen_to_stems(self, namespace: str) -> bool:
        """Replace names with a common beginning, up to a separator, by a prefix. Return whether there were any."""
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
        """Return an invalidation of `target` to replace some of `held`. Its id is new: no replica has received it."""
        namespace = next(iter(held)).invalidation.namespace
        widened = invalidation_of([target], namespace=namespace, reason=_WIDENED, source=self._source)
        return Pending(widened, max(pending.receipt_seconds for pending in held))


class _Waiting:
    """The held invalidations of one namespace, indexed by name."""

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
        """Return the tickets that `newer` may cover. Without prefixes, it covers none that shares no name with it."""
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
    """Return `name` up to and with its last separator, not counting a final one; "" when it has none."""
    end = max(map(name[:-1].rfind, _SEPARATORS))
    return name[: end + 1]


def _less(pending: Pending, coverage: Coverage) -> Pending | None:
    """Return what `coverage` does not cover of it, with a new id; itself if that is all, None if it is nothing."""
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

"""A log in memory, in place of Redis: positions, receipts, and delivery to those who follow."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ..shared.errors import IdempotencyConflict
from ..shared.invalidation import Anchor, Invalidation, Position, new_id
from ..shared.receipt import Receipt
from ..shared.wire import encode, parts_of

__all__ = ["MemoryLog", "Reader"]


class Reader(NamedTuple):
    """Who reads the log: whether it follows a namespace, and what it is called with: a frame, and what is in it."""

    follows: Callable[[str], bool]
    deliver: Callable[[bytes, Invalidation], None]


class MemoryLog:
    """What the log's script does in Redis, for one process. May be used from any thread.

    Shape:  each of `records` receives every invalidation once, with its position; each of `readers` is called with the
            frames of what it follows, in the order of the log. What it publishes meanwhile is delivered after that.
    """

    def __init__(self) -> None:
        self.records: list[list[Invalidation]] = []
        self.readers: list[Reader] = []
        self._lock = threading.RLock()
        self._positions: dict[str, Position] = {}
        self._receipts: dict[tuple[str, str, str], tuple[Any, Receipt]] = {}
        self._undelivered: deque[tuple[Invalidation, bytes]] = deque()
        self._is_delivering = False

    def head(self, namespace: str) -> Anchor:
        """Return the position of the newest invalidation of a namespace, whose epoch begins with the first question."""
        with self._lock:
            epoch, sequence = self._positions.setdefault(namespace, Position(new_id(), 0))
        return Anchor(epoch, sequence, None if sequence else "")

    def append(self, invalidation: Invalidation, scope: str | None = None) -> Receipt:
        """Log and deliver an invalidation. A repeat of its id in its scope is neither.

        Raises: IdempotencyConflict when the id was used for other targets.
        """
        namespace = invalidation.namespace
        key = (namespace, invalidation.source if scope is None else scope, invalidation.id)
        targets = (invalidation.keys, invalidation.tags, invalidation.prefixes, invalidation.everything)
        with self._lock:
            if key in self._receipts:
                earlier, receipt = self._receipts[key]
                if earlier != targets:
                    raise IdempotencyConflict(
                        f"the id {invalidation.id!r} was used before for other targets; "
                        "use a new id, or repeat the first request unchanged"
                    )
                return receipt._replace(is_repeat=True)
            epoch, sequence, _ = self.head(namespace)
            for part in parts_of(invalidation):
                sequence += 1
                numbered = msgspec.structs.replace(part, epoch=epoch, seq=sequence)
                self._undelivered.append((numbered, encode(numbered)))
            position = self._positions[namespace] = Position(epoch, sequence)
            receipt = Receipt(invalidation.id, namespace, position, len(self._readers_of(namespace)))
            self._receipts[key] = (targets, receipt)
            for record in self.records:
                record.append(msgspec.structs.replace(invalidation, epoch=epoch, seq=sequence))
            self._deliver()
        return receipt

    def _deliver(self) -> None:
        if self._is_delivering:
            return
        self._is_delivering = True
        try:
            while self._undelivered:
                invalidation, frame = self._undelivered.popleft()
                for reader in self._readers_of(invalidation.namespace):
                    reader.deliver(frame, invalidation)
        finally:
            self._is_delivering = False

    def _readers_of(self, namespace: str) -> list[Reader]:
        return [each for each in self.readers if each.follows(namespace)]

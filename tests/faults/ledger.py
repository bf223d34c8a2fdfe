"""The ledger: the source's versions, and when each was accepted as out of date; in memory that all processes share.

What the oracle compares
------------------------
The promise: a read served locally at time t never returns a value whose invalidation was accepted before t − bound.

The source holds one version per key. A change is, in this order:

1. the writer puts version n + 1 into the source;
2. it publishes the invalidation of the key, and again with the same id until the publish returns a receipt;
3. it reads the clock and notes that time as `superseded_at` of version n.

A value in a cache is the version that its loader found in the source. So a read breaks the promise if, and only if, it
was served from the cache and `superseded_at[value] < t - bound`. One look suffices: changes of one key never overlap,
hence `superseded_at` grows with the version, and the version after the served one is the first that counts against it.

On which side it errs
---------------------
- An invalidation is accepted when the log's script has run. The time noted is later: the receipt has travelled back,
  and a publish that had to be repeated is noted when it succeeded. The oracle accuses late, and never wrongly.
- t is read just before each single read. The lease is checked within the read, a moment later; a process that is
  stopped in between is judged by the earlier time. Again it never accuses wrongly; it may miss one read per stop.
- A value loaded after step 1 and before step 3 is the new version already. One loaded before step 1 is the old one.
- What a loader has just returned is not judged, as it was not served from the cache; as soon as it is, it is.

Confirmations are judged too
----------------------------
A confirmation that is complete says that every replica has applied the invalidation. So whatever the bound is, no
replica may serve version n after a publish of its invalidation has returned with a complete confirmation. That time is
noted as `confirmed_at` of version n.

All times are CLOCK_MONOTONIC, which on Linux is one clock for all processes. It is not the clock that broadcache reads
(CLOCK_BOOTTIME there); the two differ only by the time a machine was suspended.
"""

import mmap
import time
from pathlib import Path
from typing import Final, Self

NAMESPACE: Final = "products"
KEYS: Final = 600
VERSIONS_MAX: Final = 4_096
_NUMBER_BYTES: Final = 8
_VERSIONS: Final = KEYS * VERSIONS_MAX
_SIZE_BYTES: Final = (1 + KEYS + 2 * _VERSIONS) * _NUMBER_BYTES


class Ledger:
    """One file, mapped by the writer, which alone changes it, and by each replica.

    Shape: a *version* is unique over all keys: `key number * VERSIONS_MAX + n`. `source[key number]` is the current
           version of a key; `superseded_at[version]` is when the next one was accepted, inf until then, and
           `confirmed_at[version]` is when all replicas were said to have applied that, inf unless they were.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            # Numbers are eight bytes at multiples of eight: each is read and written in one go.
            numbers = memoryview(mmap.mmap(file.fileno(), _SIZE_BYTES))
        first, second = _NUMBER_BYTES, (1 + KEYS) * _NUMBER_BYTES
        third = second + _VERSIONS * _NUMBER_BYTES
        self._accepted: Final = numbers[:first].cast("q")
        self.source: Final = numbers[first:second].cast("q")
        self.superseded_at: Final = numbers[second:third].cast("d")
        self.confirmed_at: Final = numbers[third:].cast("d")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the file, with version 0 of every key in the source. The file is sparse."""
        with path.open("wb") as file:
            file.truncate(_SIZE_BYTES)
        ledger = cls(path)
        for number in range(KEYS):
            ledger._put(number, number * VERSIONS_MAX)
        return ledger

    @property
    def accepted(self) -> int:
        """How many changes have been accepted."""
        return self._accepted[0]

    def change(self, number: int) -> int:
        """Put the next version of a key into the source; return the version it follows."""
        version = self.source[number]
        if (version + 1) % VERSIONS_MAX == 0:
            raise OverflowError(f"expected at most {VERSIONS_MAX} versions of a key: make the run shorter")
        self._put(number, version + 1)
        return version

    def accept(self, version: int, *, is_confirmed: bool = False) -> None:
        """Note that the publish has returned which invalidates this version, and whether all replicas confirmed it."""
        self.superseded_at[version] = now = time.monotonic()
        if is_confirmed:
            self.confirmed_at[version] = now
        self._accepted[0] += 1

    def _put(self, number: int, version: int) -> None:
        self.superseded_at[version] = self.confirmed_at[version] = float("inf")
        self.source[number] = version


def key_of(number: int) -> str:
    """The name of a key. No key's name is the beginning of another's."""
    return f"product:{number:04d}"


def tag_of(number: int) -> str:
    """The tag that this key alone carries."""
    return f"page:{number:04d}"


def change_id_of(version: int) -> str:
    """The id of the invalidation that supersedes this version: a forger can foresee it."""
    return f"change-{version}"

"""What the processes of a stage say to each other: one JSON document per line."""

from typing import Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["ours", "naive", "clearing"]


class ReplicaSettings(msgspec.Struct, frozen=True):
    """How a replica is started.

    `has_raising_mapping`: our replica has a second cache beside the first, whose mapping raises at random.
    """

    kind: Kind
    url: str
    ledger_path: str
    bound_seconds: float
    load_seconds_max: float
    seed: int
    has_raising_mapping: bool = False


class WriterSettings(msgspec.Struct, frozen=True):
    """How the writer is started."""

    url: str
    ledger_path: str
    changes_per_second: float
    seed: int


class ForgerSettings(msgspec.Struct, frozen=True):
    """How the forger is started: it publishes at `url`, as a user with +publish alone, and knows what `view_url` shows.

    `kinds`: see tests/faults/forger.py.
    """

    url: str
    view_url: str
    kinds: list[str]
    seed: int


class Command(msgspec.Struct, frozen=True):
    """What a child is told to do, and how much of it.

    `report`: nothing more. `heal`: count recovery from that time on (CLOCK_MONOTONIC, in seconds). `block`: hold the
    event loop for so many seconds. `wall`: put the wall clock that much forward. `kill_and_write`: kill subscriptions,
    and change so many keys before they can be back. `pause`: make no change until `go`, except those of a `burst`:
    change so many keys, `spacing_seconds` apart, over a link that was opened after `pause`; done when all are accepted.
    `post`: post invalidations with the ids that the next change of so many keys will have. `invalidate`: publish so
    many invalidations of the replica's own, of keys that are in no ledger.
    """

    do: Literal["report", "heal", "block", "wall", "kill_and_write", "pause", "go", "burst", "post", "invalidate"]
    amount: float = 0.0
    spacing_seconds: float = 0.0


class BrokenRead(msgspec.Struct, frozen=True):
    """One read that broke the promise. Times are CLOCK_MONOTONIC, in seconds."""

    at: float
    key: int
    served_version: int
    superseded_at: float
    source_version: int
    state: str


class Report(msgspec.Struct, frozen=True):
    """What a child has counted since it started. A writer has nothing to count.

    `checked`: reads that were served locally. `cached`: how many keys the last round of reads was served locally.
    `misconfirmed`: reads that were served locally after a confirmation said that every replica had dropped the value.
    """

    reads: int = 0
    checked: int = 0
    cached: int = 0
    broken: int = 0
    misconfirmed: int = 0
    longest_seconds: float = 0.0
    first_broken: list[BrokenRead] = []
    is_coherent: bool = True
    recovered_seconds: float = 0.0
    bypassed: int = 0
    replayed: int = 0
    gaps: int = 0
    echoes: int = 0
    subscriptions: int = 0
    clears: dict[str, int] = {}

"""What the processes of a stage say to each other: one JSON document per line."""

from typing import Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["ours", "naive", "clearing"]


class ReplicaSettings(msgspec.Struct, frozen=True):
    """How a replica is started."""

    kind: Kind
    url: str
    ledger_path: str
    bound_seconds: float
    load_seconds_max: float
    seed: int


class WriterSettings(msgspec.Struct, frozen=True):
    """How the writer is started."""

    url: str
    ledger_path: str
    changes_per_second: float
    seed: int


class Command(msgspec.Struct, frozen=True):
    """What a child is told to do, and how much of it.

    `report`: nothing more. `heal`: count recovery from that time on (CLOCK_MONOTONIC, in seconds). `block`: hold the
    event loop for so many seconds. `wall`: put the wall clock that much forward. `kill_and_write`: kill subscriptions,
    and change so many keys before they can be back. `pause`: make no change until `go`.
    """

    do: Literal["report", "heal", "block", "wall", "kill_and_write", "pause", "go"]
    amount: float = 0.0


class BrokenRead(msgspec.Struct, frozen=True):
    """One read that broke the promise. Times are CLOCK_MONOTONIC, in seconds."""

    at: float
    key: int
    served_version: int
    superseded_at: float
    source_version: int
    state: str


class Report(msgspec.Struct, frozen=True):
    """What a child has counted since it started. A writer has nothing to count."""

    checked: int = 0
    broken: int = 0
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

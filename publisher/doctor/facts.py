"""The facts that the checks judge: of a server, a namespace, its replicas, and the fan-out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...shared.invalidation import Position
from ...shared.presence import Presence, ReplicaPresence
from ...shared.transport.redis.names import Naming
from .rights import Right

__all__ = ["DeliveryFacts", "FanoutFacts", "LogFacts", "NamespaceFacts", "ServerFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What one server reports about itself.

    Shape:  `hello` and `info` as the server sends them, name to value; `settings` are those of CONFIG GET. Either of
            the latter is empty if this user may not read it; `refusals` says why.
    Units:  `round_trips_ms` are of PING, one after the other. `clock_ahead_ms` is how far the server's wall clock is
            ahead of this machine's, exact to half of the shortest round trip.
    """

    label: str
    is_sentinel: bool = False
    is_cluster: bool = False
    hello: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[str] = ()
    round_trips_ms: Sequence[float] = ()
    clock_ahead_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    """How far back a log reaches.

    Shape:  `length` 0 with a head means that the log is lost. Sequences and times are those of its first and its last
            entry; a time is None if the entry has none.
    Units:  `*_sent_at_ms` are Unix clocks of the publishers.
    """

    length: int
    first_sequence: int = 0
    last_sequence: int = 0
    first_sent_at_ms: int | None = None
    last_sent_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFacts:
    """The results of probes that the doctor publishes to itself.

    Shape:  `refusal` if this user may not publish or subscribe; `lost` counts probes that never arrived.
    Units:  `latencies_ms` from before PUBLISH to receipt, one probe after the other.
    """

    latencies_ms: Sequence[float] = ()
    lost: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceFacts:
    """The facts of one namespace.

    Shape:  `naming` forms the names of its keys; `older_replicas` are registered by an older version, with other names,
            in the same database. `older_refusal` says why these cannot be read.
            `head` was read before the replicas were. `log` is None if it cannot be read; `log_refusal` says why.
            `replicas` are the registered ones, each with its presence; `without_presence` are registered and have none.
            `silent` are those whose registration has ended without that they left. `shared_ids` are the registered
            replicas whose id another process may have too. `registry_doubt` is why the registry may not list every
            replica. `subscribers` counts the connections that
            are subscribed to the channel: replicas and followers; None if not known. `replicas_refusal` says why the
            registry cannot be read; `may_read_replicas` is False if this user lacks the right. `missing` are the rights
            that `user` lacks.
    Units:  `read_at` is when the replicas were read, in Unix seconds.
    """

    namespace: str
    naming: Naming = field(default_factory=Naming)
    older_replicas: Sequence[str] = ()
    older_refusal: str = ""
    head: Position | None = None
    log: LogFacts | None = None
    log_refusal: str = ""
    replicas: Sequence[Presence] = ()
    without_presence: Sequence[str] = ()
    silent: Sequence[ReplicaPresence] = ()
    shared_ids: Sequence[str] = ()
    registry_doubt: str = ""
    subscribers: int | None = None
    replicas_refusal: str = ""
    may_read_replicas: bool = True
    user: str = ""
    checked: Sequence[Right] = ()
    missing: Sequence[Right] = ()
    read_at: float = 0.0
    delivery: DeliveryFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutFacts:
    """The result of looking up a service of the fan-out.

    Shape:  `error` says why there are no addresses, `doubts` why replicas may be missing among them.
    """

    service: str
    addresses: Sequence[str] = ()
    doubts: Sequence[str] = ()
    error: str = ""

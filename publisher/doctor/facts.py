"""What can be known of a server, a namespace and its replicas, before anybody judges it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...shared.invalidation import Position
from .rights import Right

__all__ = ["DeliveryFacts", "FanoutFacts", "LogFacts", "NamespaceFacts", "PresenceFacts", "ServerFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What one server says of itself.

    Shape:  `hello` and `info` as the server has them, name to value; `settings` are those of CONFIG GET. Either of the
            latter is empty when this user may not ask, and `refusals` say so.
    Units:  `round_trips_ms` are of PING, one after the other. `clock_ahead_ms` is the server's wall clock before ours;
            it is right up to half of the shortest round trip.
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

    Shape:  `length` 0 with a head means that the log is gone. Sequences and times are those of its first and its last
            entry; a time is None when the entry does not tell it.
    Units:  `*_sent_at_ms` are Unix clocks of those who published.
    """

    length: int
    first_sequence: int = 0
    last_sequence: int = 0
    first_sent_at_ms: int | None = None
    last_sent_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceFacts:
    """What a replica says of itself and one namespace, as far as it could be read.

    Shape:  `position` is None before it knows anything of the log.
    """

    replica: str
    state: str
    position: Position | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFacts:
    """What became of probes that were published to ourselves.

    Shape:  `refusal` when this user may not; `lost` counts probes that never came.
    Units:  `latencies_ms` from before PUBLISH to receipt, one probe after the other.
    """

    latencies_ms: Sequence[float] = ()
    lost: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceFacts:
    """What is known of one namespace.

    Shape:  `head` was read before the replicas were. `log` is None, and `log_refusal` says why, when it cannot be read.
            `replicas` are those that live; `has_seen_all` is False when there were too many keys to look at all, and
            `replicas_refusal` says why nobody could look. `missing` are the rights that `user` lacks.
    """

    namespace: str
    head: Position | None = None
    log: LogFacts | None = None
    log_refusal: str = ""
    replicas: Sequence[PresenceFacts] = ()
    has_seen_all: bool = True
    replicas_refusal: str = ""
    user: str = ""
    checked: Sequence[Right] = ()
    missing: Sequence[Right] = ()
    delivery: DeliveryFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutFacts:
    """What became of looking up a service.

    Shape:  `error` says why there are no addresses, `doubts` why there may be more.
    """

    service: str
    addresses: Sequence[str] = ()
    doubts: Sequence[str] = ()
    error: str = ""

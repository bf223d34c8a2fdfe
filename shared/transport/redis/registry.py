"""The registry: which replicas follow a namespace, and the presence that each published with its last echo."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from ...clock import Clock, monotonic
from ...invalidation import Position
from ...presence import Presence, ReplicaPresence, presence_of
from .link import Link, Refused
from .log import IS_SHARED, SERVES_NOTHING, Script, head, run_script
from .names import names_of
from .refusals import refused

__all__ = [
    "Registries",
    "Registry",
    "ReplicaCounts",
    "SilentReplica",
    "as_of_now",
    "forget",
    "presences",
    "registered",
    "replicas_of",
    "withdraw",
]

# A member of the registry that is not a replica: ids of replicas have no spaces.
_SINCE = re.compile(rb" since=(\d{1,16})")
_FORGOTTEN: Final = b" forgotten"
_SILENT_MS_MAX: Final = 86_400_000
"""How long a silent replica is remembered."""
_NAMED_MAX: Final = 5

_WITHDRAW: Final = Script.read("withdraw.lua")
_FORGET: Final = Script.read("forget.lua")


class SilentReplica(NamedTuple):
    """A replica whose registration has ended without that it left.

    Shape:  `may_serve` is false if it said that it then serves nothing from its caches.
    """

    ended_ms_ago: int
    may_serve: bool


class ReplicaCounts(NamedTuple):
    """How many replicas are registered, silent without serving anything, and silent and may serve."""

    registered: int
    silent: int
    silent_serving: int


class Registry(NamedTuple):
    """The replicas that are registered for a namespace, and whether the list is complete.

    Shape:  `left_ms` has, for each replica by name, in how many milliseconds its registration ends. `age_ms` is how
            long the registry has existed; None when it has no record of that. `lease_ms` is the longest lifetime that
            any replica's registration has had; None when the head has no record of that. `silent` are the replicas
            whose registration has ended within a day. `shared` are the registered replicas whose id another process
            may have too. `forgotten_ms` is for how long the registry lacks silent replicas that may serve from their
            caches: there were too many. `born_at_ms` is when it was created, on the server's clock. `serving` are the
            listed replicas that may serve from their caches beyond their registration. `lost` are those that were
            listed before the registry was lost, and have not come back.
    """

    namespace: str
    is_there: bool
    left_ms: dict[str, int]
    age_ms: int | None
    lease_ms: int | None
    silent: Mapping[str, SilentReplica] = {}
    shared: Sequence[str] = ()
    forgotten_ms: int = 0
    born_at_ms: int | None = None
    serving: Collection[str] = ()
    lost: Sequence[str] = ()

    @property
    def expected(self) -> list[str]:
        """The replicas that may serve from their caches: the registered ones, and silent ones."""
        return [*self.left_ms, *(replica for replica, each in self.silent.items() if each.may_serve)]

    @property
    def counts(self) -> ReplicaCounts:
        """How many replicas it lists."""
        serving = sum(each.may_serve for each in self.silent.values())
        return ReplicaCounts(len(self.left_ms), len(self.silent) - serving, serving)

    @property
    def doubt(self) -> str | None:
        """Why the word of every expected replica proves nothing about another process; None when it does."""
        return self.doubt_of_list or self.doubt_of_lost or self.doubt_of_ids

    @property
    def doubt_of_ids(self) -> str | None:
        """Why the word of a registered replica may be that of one of several processes; None when it is not."""
        if not self.shared:
            return None
        return (
            f"more than one process may have the replica id {_named(self.shared)} in {self.namespace!r}: the word of "
            "one proves nothing about the other; after a restart without a clean shutdown, confirm again when the "
            "lease has ended, or forget the id if its caches may serve while incoherent; otherwise leave `replica_id` "
            "out, or give each process its own"
        )

    @property
    def doubt_of_lost(self) -> str | None:
        """Why a replica that a lost registry listed may still serve from its caches; None when none can."""
        if not self.lost:
            return None
        return (
            f"the registry of {self.namespace!r} was lost, and {_named(self.lost)} has not registered again: it may "
            "serve old values, since its caches may serve while incoherent; expected it to come back: end it if it is "
            "cut off, and then have this publisher forget it, by forget_replica or DELETE /replicas/ID"
        )

    @property
    def doubt_of_list(self) -> str | None:
        """Why an unlisted replica may still serve from its caches; None when none can."""
        name, lease_ms = f"the registry of {self.namespace!r}", self.lease_ms
        if not self.is_there:
            lease = "the longest lease of its replicas" if lease_ms is None else f"{lease_ms / 1_000:g} s"
            return (
                f"{name} is missing: no replica has followed this namespace within a day, or the registry was lost and "
                f"a replica that it does not list may serve old values; expected a registry older than {lease}: "
                "confirm again that long after a replica has registered"
            )
        if self.age_ms is None:
            return (
                f"{name} has no creation time, so replicas of an older version created it: a replica that was lost "
                "from it may serve old values; upgrade every replica, then restart one of them"
            )
        if lease_ms is None:
            return (
                f"the head of {self.namespace!r} does not have the longest lease of the replicas: a replica that the "
                "registry does not list may serve old values; expected replicas to write `lease_ms` with each echo: "
                "upgrade them, and grant them the right to HSET"
            )
        if self.age_ms < lease_ms:
            left_seconds = (lease_ms - self.age_ms) / 1_000
            return (
                f"{name} has existed for only {max(0, self.age_ms) / 1_000:.1f} s: it is new or was lost, and a "
                f"replica that it does not list may serve old values for up to {left_seconds:.1f} s more; confirm "
                "again after that time"
            )
        if self.forgotten_ms:
            return (
                f"too many replicas of {self.namespace!r} fell silent within a day: {name} no longer lists some that "
                f"may serve old values; find out why they do not close, and confirm again in "
                f"{self.forgotten_ms / 3_600_000:.1f} h"
            )
        return None


def _named(replicas: Sequence[str]) -> str:
    more = len(replicas) - _NAMED_MAX
    return ", ".join(replicas[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


async def registered(link: Link, namespace: str, *, of_older_version: bool = False) -> Registry:
    """Return the registry of `namespace`, or that of older versions, which have the names of database 0.

    Raises: LinkLost; LogRefused.
    """
    names = names_of(namespace) if of_older_version else link.names_of(namespace)
    try:
        time, rows, [lease_ms] = await link.call_all(
            [
                ("TIME",),
                ("ZRANGEBYSCORE", names.registry, "-inf", "+inf", "WITHSCORES"),
                ("HMGET", names.head, "lease_ms"),
            ]
        )
    except Refused as refusal:
        raise refused(f"list the replicas of {namespace!r}", refusal) from refusal
    now_ms = int(time[0]) * 1_000 + int(time[1]) // 1_000
    births_ms: list[int] = []
    left_ms: dict[str, int] = {}
    silent: dict[str, SilentReplica] = {}
    shared: list[str] = []
    serving: set[str] = set()
    forgotten_ms = 0
    for member, score in sorted(rows):
        ends_ms, marks = divmod(float(score), 1)
        left, serves_nothing, is_shared = int(ends_ms) - now_ms, *_read_marks(marks)
        if member == _FORGOTTEN:
            forgotten_ms = max(0, left)
        elif member.startswith(b" "):
            births_ms += [int(since[1]) for since in [_SINCE.fullmatch(member)] if since]
        elif left > 0:
            left_ms[member.decode(errors="replace")] = left
            if is_shared:
                shared.append(member.decode(errors="replace"))
            if is_shared or not serves_nothing:
                serving.add(member.decode(errors="replace"))
        elif -left < _SILENT_MS_MAX:
            # Of several processes with one id, the last word is that of one.
            may_serve = is_shared or not serves_nothing
            silent[member.decode(errors="replace")] = SilentReplica(-left, may_serve)
    return Registry(
        namespace,
        is_there=bool(rows),
        left_ms=left_ms,
        age_ms=now_ms - max(births_ms) if births_ms else None,
        # Another program may have written anything there.
        lease_ms=int(lease_ms) if lease_ms and lease_ms.isdigit() else None,
        silent=silent,
        shared=shared,
        forgotten_ms=forgotten_ms,
        born_at_ms=max(births_ms) if births_ms else None,
        serving=serving.union(replica for replica, each in silent.items() if each.may_serve),
    )


def _read_marks(fraction: float) -> tuple[bool, bool]:
    """Return whether the replica serves nothing beyond its registration, and whether its id is shared.

    Shape: older versions, and other programs, write no marks. The replica may then serve.
    """
    digit = fraction * 4
    if digit != int(digit):
        return False, False
    return bool(int(digit) & SERVES_NOTHING), bool(int(digit) & IS_SHARED)


async def presences(link: Link, namespace: str, replicas: Sequence[str]) -> dict[str, Presence]:
    """Return the last presences of these replicas; expired ones are left out.

    Raises: LinkLost; LogRefused.
    """
    if not replicas:
        return {}
    prefix = link.names_of(namespace).presence_prefix
    try:
        texts: Iterable[Any] = await link.call("MGET", *[prefix + replica for replica in replicas])
    except Refused as refusal:
        raise refused(f"return the presences of the replicas of {namespace!r}", refusal) from refusal
    return {
        replica: presence_of(text, replica) for replica, text in zip(replicas, texts, strict=True) if text is not None
    }


async def replicas_of(link: Link, namespace: str) -> list[ReplicaPresence]:
    """Return the registered and the silent replicas, by name. One without a presence has the state `unknown`.

    Raises: LinkLost; LogRefused.
    """
    newest = await head(link, namespace)
    registry = await registered(link, namespace)
    names = [*registry.left_ms, *registry.silent]
    found = await presences(link, namespace, names)
    if len(found) < len(names):
        # Evicted; or the replica has left in between.
        registry = await registered(link, namespace)
    still_listed = sorted({*registry.left_ms, *registry.silent}.intersection(names))
    return [as_of_now(found.get(name) or Presence(replica=name), registry, newest) for name in still_listed]


async def withdraw(
    link: Link, namespaces: Iterable[str], replica_id: str, *, life: str, others: Mapping[str, Collection[str]]
) -> None:
    """Remove a replica that is about to stop from the registry, unless another process has registered this id.

    Shape:  `life` is the token in its presences, and `others` has those of other processes that are known to have this
            id, by namespace.
    Raises: LinkLost; LogRefused.
    """
    gone = tuple(namespaces)
    keys = [key for names in map(link.names_of, gone) for key in (names.presence_prefix + replica_id, names.registry)]
    lives = [",".join(others.get(namespace, ())) for namespace in gone]
    try:
        await run_script(link, _WITHDRAW, keys, (replica_id, life, *lives))
    except Refused as refusal:
        raise refused(f"remove replica {replica_id!r} from its registry", refusal) from refusal


async def forget(link: Link, namespace: str, replica_id: str) -> Literal["forgotten", "registered", "unknown"]:
    """Forget a replica that fell silent; of a registered one, only other processes that may have its id.

    Raises: LinkLost; LogRefused.
    """
    names = link.names_of(namespace)
    try:
        result = await run_script(link, _FORGET, (names.presence_prefix + replica_id, names.registry), (replica_id,))
    except Refused as refusal:
        raise refused(f"forget replica {replica_id!r} of {namespace!r}", refusal) from refusal
    return "forgotten" if result in (1, 2) else "registered" if result == 0 else "unknown"


def as_of_now(presence: Presence, registry: Registry, head: Position | None) -> ReplicaPresence:
    """Return the presence of a replica that `registry` lists, with its age, and its distance from `head`."""
    silent = registry.silent.get(presence.replica)
    left_ms = registry.left_ms[presence.replica] if silent is None else -silent.ended_ms_ago
    fields = msgspec.structs.asdict(presence)
    seen_ms_ago = max(0, presence.lifetime_ms - left_ms) if presence.lifetime_ms else None
    if presence.staleness_seconds is not None and seen_ms_ago is not None:
        fields["staleness_seconds"] = presence.staleness_seconds + seen_ms_ago / 1_000
    return ReplicaPresence(
        **fields,
        seen_ms_ago=seen_ms_ago,
        behind=_behind(presence, head),
        is_silent=silent is not None,
        may_serve=silent is None or silent.may_serve,
    )


def _behind(presence: Presence, head: Position | None) -> int | None:
    position = presence.position
    if position is None or head is None:
        return 0 if position is head and presence.state == "coherent" else None
    # The replica may have advanced after the head was read.
    return max(0, head.sequence - position.sequence) if head.epoch == position.epoch else None


class Registries:
    """Reads registries, and remembers the longest lease seen in each namespace, and the replicas that may serve.

    When Redis loses the registry, it may also lose the record of the longest lease in the head. And a replica that is
    cut off does not register again, although it may serve from its caches: for a day, its silence is a doubt.
    """

    def __init__(self, *, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._read_at: dict[str, float] = {}
        self._lost_until: dict[str, dict[str, float]] = {}
        self._leases_ms: dict[str, int] = {}
        self._last: dict[str, Registry] = {}
        self._watched: set[str] = set()

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces whose registries were read or watched."""
        return tuple(sorted({*self._last, *self._watched}))

    def watch(self, namespace: str) -> None:
        """Count a namespace among `namespaces`, although its registry is read elsewhere."""
        self._watched.add(namespace)

    async def read(self, link: Link, namespace: str) -> Registry:
        """Return the registry of `namespace`. Raises: LinkLost; LogRefused."""
        registry = await registered(link, namespace)
        lost = self._lost(registry, self._last.get(namespace))
        registry = self._last[namespace] = registry._replace(lost=lost)
        # The time left of a registration is never longer than its lifetime.
        seen_ms = (self._leases_ms.get(namespace, 0), registry.lease_ms or 0, *registry.left_ms.values())
        longest_ms = max(seen_ms)
        if longest_ms:
            self._leases_ms[namespace] = longest_ms
        return registry if registry.lease_ms is None else registry._replace(lease_ms=longest_ms)

    def _lost(self, registry: Registry, before: Registry | None) -> list[str]:
        """Return the replicas of a lost registry that may serve, and that the new one does not list."""
        now, lost_until = self._clock(), self._lost_until.get(registry.namespace, {})
        if before is not None and before.born_at_ms != registry.born_at_ms:
            lost_until = (
                dict.fromkeys(before.serving, self._read_at[registry.namespace] + _SILENT_MS_MAX / 1_000) | lost_until
            )
        lost_until = {
            replica: until
            for replica, until in lost_until.items()
            if until > now and replica not in registry.left_ms and replica not in registry.silent
        }
        self._read_at[registry.namespace], self._lost_until[registry.namespace] = now, lost_until
        return sorted(lost_until)

    def dismiss(self, namespace: str, replica: str) -> bool:
        """Have no doubt because of this replica any more; return whether there was one."""
        return self._lost_until.get(namespace, {}).pop(replica, None) is not None

    def forget(self, namespace: str) -> None:
        """Count a namespace no longer: it was forgotten."""
        self._lost_until.pop(namespace, None)
        self._watched.discard(namespace)
        self._last.pop(namespace, None)

    def last(self, namespace: str) -> Registry | None:
        """The registry as it was last read; None if it has not been read."""
        return self._last.get(namespace)

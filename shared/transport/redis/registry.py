"""The registry: which replicas follow a namespace, and the presence that each published with its last echo."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from ...invalidation import Position
from ...presence import Presence, ReplicaPresence
from .link import Link, Refused
from .log import head
from .names import names_of
from .refusals import refused

__all__ = ["Registries", "Registry", "presences", "registered", "replicas_of", "withdraw"]

# A member of the registry that is not a replica: ids of replicas have no spaces.
_SINCE = re.compile(rb" since=(\d{1,16})")


_decoder = msgspec.json.Decoder(Presence)


class Registry(NamedTuple):
    """The replicas that are registered for a namespace, and whether the list is complete.

    Shape:  `left_ms` has, for each replica by name, in how many milliseconds its registration ends. `age_ms` is how
            long the registry has existed; None when it has no record of that. `lease_ms` is the longest lifetime that
            any replica's registration has had; None when the head has no record of that.
    """

    namespace: str
    is_there: bool
    left_ms: dict[str, int]
    age_ms: int | None
    lease_ms: int | None

    @property
    def doubt(self) -> str | None:
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
        return None


async def registered(link: Link, namespace: str) -> Registry:
    """Return the registry of `namespace`.

    Raises: LinkLost; LogRefused.
    """
    names = names_of(namespace)
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
    for member, score in sorted(rows):
        if member.startswith(b" "):
            births_ms += [int(since[1]) for since in [_SINCE.fullmatch(member)] if since]
        elif (left := int(float(score)) - now_ms) > 0:
            left_ms[member.decode(errors="replace")] = left
    return Registry(
        namespace,
        is_there=bool(rows),
        left_ms=left_ms,
        age_ms=now_ms - max(births_ms) if births_ms else None,
        # Another program may have written anything there.
        lease_ms=int(lease_ms) if lease_ms and lease_ms.isdigit() else None,
    )


async def presences(link: Link, namespace: str, replicas: Sequence[str]) -> dict[str, Presence]:
    """Return the last presences of these replicas; expired ones are left out.

    Raises: LinkLost; LogRefused.
    """
    if not replicas:
        return {}
    prefix = names_of(namespace).presence_prefix
    try:
        texts: Iterable[Any] = await link.call("MGET", *[prefix + replica for replica in replicas])
    except Refused as refusal:
        raise refused(f"return the presences of the replicas of {namespace!r}", refusal) from refusal
    return {replica: _read(text, replica) for replica, text in zip(replicas, texts, strict=True) if text is not None}


async def replicas_of(link: Link, namespace: str) -> list[ReplicaPresence]:
    """Return the registered replicas that have a presence, by name. Raises: LinkLost; LogRefused."""
    newest = await head(link, namespace)
    left_ms = (await registered(link, namespace)).left_ms
    found = await presences(link, namespace, list(left_ms))
    return [_as_of_now(presence, left_ms[replica], newest) for replica, presence in found.items()]


async def withdraw(link: Link, namespaces: Iterable[str], replica_id: str) -> None:
    """Remove a replica that is about to stop from the registry. Raises: LinkLost; LogRefused."""
    commands: list[tuple[str, ...]] = []
    for names in map(names_of, namespaces):
        commands += [("ZREM", names.registry, replica_id), ("DEL", names.presence_prefix + replica_id)]
    try:
        await link.call_all(commands)
    except Refused as refusal:
        raise refused(f"remove replica {replica_id!r} from its registry", refusal) from refusal


def _read(text: bytes, replica: str) -> Presence:
    """Decode the presence of a replica of any version. One that cannot be decoded gives only the replica's id."""
    try:
        presence = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Presence(replica=replica)
    return msgspec.structs.replace(presence, replica=replica)


def _as_of_now(presence: Presence, left_ms: int, head: Position | None) -> ReplicaPresence:
    fields = msgspec.structs.asdict(presence)
    seen_ms_ago = max(0, presence.lifetime_ms - left_ms) if presence.lifetime_ms else None
    if presence.staleness_seconds is not None and seen_ms_ago is not None:
        fields["staleness_seconds"] = presence.staleness_seconds + seen_ms_ago / 1_000
    return ReplicaPresence(**fields, seen_ms_ago=seen_ms_ago, behind=_behind(presence, head))


def _behind(presence: Presence, head: Position | None) -> int | None:
    position = presence.position
    if position is None or head is None:
        return 0 if position is head and presence.state == "coherent" else None
    # The replica may have advanced after the head was read.
    return max(0, head.sequence - position.sequence) if head.epoch == position.epoch else None


class Registries:
    """Reads registries, and remembers the longest lease seen in each namespace.

    When Redis loses the registry, it may also lose the record of the longest lease in the head.
    """

    def __init__(self) -> None:
        self._leases_ms: dict[str, int] = {}

    async def read(self, link: Link, namespace: str) -> Registry:
        """Return the registry of `namespace`. Raises: LinkLost; LogRefused."""
        registry = await registered(link, namespace)
        # The time left of a registration is never longer than its lifetime.
        seen_ms = (self._leases_ms.get(namespace, 0), registry.lease_ms or 0, *registry.left_ms.values())
        longest_ms = max(seen_ms)
        if longest_ms:
            self._leases_ms[namespace] = longest_ms
        return registry if registry.lease_ms is None else registry._replace(lease_ms=longest_ms)

"""Combines the DNS replies about a service: one address for each replica, and why some may be missing."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

import dns.name

from .addresses import AliasRefused, Discovered, ReplicaAddress, ResolverFailed, ResolverTimedOut, ServiceNotFound
from .resolver import Reply, Resolver, is_within, refusal

__all__ = ["Lookup"]

_VIRTUAL_WAIT_SECONDS: Final = 0.5  # for the SRV reply that proves a single address to be virtual
_LOOKUPS_MAX: Final = 32  # at a time, of SRV targets that came without addresses
_NAMES_SHOWN_MAX: Final = 5

_Failure = ResolverFailed | AliasRefused


class Lookup:
    """The queries of one discovery, until `deadline` by the event loop's clock."""

    def __init__(self, resolver: Resolver, deadline: float) -> None:
        self._resolver = resolver
        self._deadline = deadline

    async def by_addresses(self, name: dns.name.Name, port: int) -> Discovered | None:
        """Return the addresses of `name`, or None if it has none.

        Raises: ResolverFailed, ResolverTimedOut, AliasRefused.
        """
        query = self._resolver.query
        # The DNS library can miss a cancellation that arrives together with a packet, so it runs in tasks of its own.
        async with asyncio.TaskGroup() as tasks:
            four = tasks.create_task(query(name, "A", self._deadline))
            six = tasks.create_task(query(name, "AAAA", self._deadline))
            rows = tasks.create_task(query(name, "SRV", self._deadline))
            await asyncio.wait([four, six])
            found = _one_family(name, four.result(), six.result())
            if len(found.hosts) == 1:
                await asyncio.wait([rows], timeout=_VIRTUAL_WAIT_SECONDS)
            rows.cancel()
        if found.failure is not None:
            raise found.failure
        if not found.hosts:
            return None
        notes = list(found.notes)
        if len(found.hosts) == 1 and not rows.cancelled() and _is_virtual(name, rows.result()):
            notes.append(_virtual(name))
        return _discovered([ReplicaAddress(host, port) for host in found.hosts], "dns", notes)

    async def by_rows(self, name: dns.name.Name, port: str) -> Discovered | None:
        """Return the addresses of the port named `port`, or None if `name` has no such port.

        Raises: ServiceNotFound, ResolverFailed, ResolverTimedOut, AliasRefused.
        """
        async with asyncio.TaskGroup() as tasks:
            query = self._resolver.query(name, "SRV", self._deadline, under=(f"_{port}".encode(), b"_tcp"))
            querying = tasks.create_task(query)
        reply = querying.result()
        if reply.failure is not None:
            raise reply.failure
        rows = _live_rows(name, reply)
        if not rows:
            return None
        targets = dict.fromkeys(target for target, _ in rows)
        known = {target: reply.glue[target] for target in targets if target in reply.glue}
        known |= await self._of_targets([target for target in targets if target not in known])
        notes = [reply.truncated] if reply.truncated else []
        if without_port := sum(number == 0 and target != dns.name.root for target, number in reply.targets):
            notes.append(f"{without_port} SRV records of {_text(name)} have no port and were left out.")
        notes += _doubts_about_targets(name, known)
        addresses = [
            ReplicaAddress(host, number) for target, number in rows for host in _hosts_of_target(known[target])
        ]
        addresses = _without_second_family(name, addresses, known.values(), notes)
        if len(addresses) == 1 and _is_virtual(name, reply):
            notes.append(_virtual(name))
        return _discovered(addresses, "srv", notes)

    async def _of_targets(self, targets: Sequence[dns.name.Name]) -> "dict[dns.name.Name, _Families]":
        slots = asyncio.Semaphore(_LOOKUPS_MAX)

        async def of(target: dns.name.Name) -> _Families:
            async with slots, asyncio.TaskGroup() as tasks:
                four = tasks.create_task(self._resolver.query(target, "A", self._deadline))
                six = tasks.create_task(self._resolver.query(target, "AAAA", self._deadline))
            return four.result(), six.result()

        async with asyncio.TaskGroup() as tasks:
            found = {target: tasks.create_task(of(target)) for target in targets}
        return {target: task.result() for target, task in found.items()}


_Families = tuple[Reply, Reply]  # the replies for A and for AAAA


class _Found(NamedTuple):
    hosts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failure: _Failure | None = None


def _one_family(name: dns.name.Name, four: Reply, six: Reply) -> _Found:
    """Choose one address family, so that a replica that has both is called once."""
    failures = _failures([(four, six)])
    hosts = max(four.addresses, six.addresses, key=len)  # IPv4 if both have the same number
    if not hosts or any(isinstance(failure, AliasRefused) for failure in failures):
        return _Found(failure=_gravest(failures))
    notes = [reply.truncated for reply in (four, six) if reply.truncated]
    notes += [f"Addresses of one family are not known: {failure}." for failure in failures]
    if four.addresses and six.addresses and len(four.addresses) != len(six.addresses):
        notes.append(_unpaired(name, len(four.addresses), len(six.addresses)))
    return _Found(hosts, tuple(notes))


def _is_virtual(name: dns.name.Name, rows: Reply) -> bool:
    """Whether the SRV rows point back to the service itself: those of a headless service point to its pods."""
    return bool(rows.targets) and all(target == name for target, _ in rows.targets)


def _live_rows(name: dns.name.Name, reply: Reply) -> list[tuple[dns.name.Name, int]]:
    """Return the rows that can be called. An ExternalName service appears here as a foreign target without a port.

    Raises: AliasRefused for a target outside the service's own domain: one foreign row makes all of them doubtful.
    """
    for target, _ in reply.targets:
        if target != dns.name.root and not target.is_subdomain(name) and not is_within(target, name, name):
            raise refusal(name, target)
    return [(target, number) for target, number in reply.targets if number and target != dns.name.root]


def _doubts_about_targets(name: dns.name.Name, known: dict[dns.name.Name, _Families]) -> list[str]:
    """Return why replicas may be missing among the targets' addresses.

    Raises: ServiceNotFound, ResolverFailed, AliasRefused when the targets have no addresses at all.
    """
    failures = _failures(known.values())
    because = _gravest(failures)
    lost = [target for target, families in known.items() if not _hosts_of_target(families)]
    if isinstance(because, AliasRefused) or (because is not None and len(lost) == len(known)):
        raise because
    if len(lost) == len(known):
        raise ServiceNotFound(f"expected addresses for the SRV targets of {_text(name)}, got none: {_some(lost)}")
    notes = []
    if lost:
        notes.append(f"{len(lost)} of {len(known)} targets have no known address and were left out: {_some(lost)}.")
    if because is not None:
        notes.append(f"Addresses of targets are not known: {because}.")
    for target, (four, six) in known.items():
        notes += [reply.truncated for reply in (four, six) if reply.truncated]
        if four.addresses and six.addresses and len(four.addresses) != len(six.addresses):
            notes.append(_unpaired(target, len(four.addresses), len(six.addresses)))
    return notes


def _hosts_of_target(families: _Families) -> tuple[str, ...]:
    four, six = families
    return four.addresses or six.addresses


def _without_second_family(
    name: dns.name.Name, addresses: list[ReplicaAddress], known: Iterable[_Families], notes: list[str]
) -> list[ReplicaAddress]:
    """Drop one family if every target has only one: targets are then named by address, and a replica has two."""
    four = [address for address in addresses if ":" not in address.host]
    six = [address for address in addresses if ":" in address.host]
    if not four or not six or any(families[0].addresses and families[1].addresses for families in known):
        return addresses
    if len(four) != len(six):
        notes.append(_unpaired(name, len(four), len(six)))
    return max(four, six, key=len)


def _failures(known: Iterable[_Families]) -> list[_Failure]:
    return [reply.failure for families in known for reply in families if reply.failure is not None]


def _gravest(failures: Iterable[_Failure]) -> _Failure | None:
    """Return a refusal, else a failure, else a timeout: the result is a timeout only if all failures are."""
    return min(
        failures,
        key=lambda failure: (isinstance(failure, ResolverTimedOut), not isinstance(failure, AliasRefused)),
        default=None,
    )


def _discovered(addresses: Iterable[ReplicaAddress], how: Literal["dns", "srv"], notes: Iterable[str]) -> Discovered:
    notes = tuple(notes)
    return Discovered(tuple(dict.fromkeys(addresses)), how, is_complete=not notes, notes=notes)


def _virtual(name: dns.name.Name) -> str:
    return (
        f"{_text(name)} has one virtual address that stands for all replicas, and only one of them would receive the "
        "request. Use a headless service (clusterIP: None)."
    )


def _unpaired(name: dns.name.Name, four: int, six: int) -> str:
    return (
        f"{_text(name)} has {four} IPv4 and {six} IPv6 addresses, which cannot be paired: one family is used, and "
        "replicas that have only the other are missing."
    )


def _some(names: Sequence[dns.name.Name]) -> str:
    shown = ", ".join(_text(name) for name in names[:_NAMES_SHOWN_MAX])
    more = len(names) - _NAMES_SHOWN_MAX
    return f"{shown} and {more} more" if more > 0 else shown


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)

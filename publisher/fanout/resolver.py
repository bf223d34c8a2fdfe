"""Sends one DNS query, and returns the whole reply: records, aliases, glue, truncation or failure."""

import asyncio
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
import dns.rrset

from .addresses import AliasRefused, ReplicaAddress, ResolverFailed, ResolverTimedOut, ServiceNotFound

__all__ = ["Reply", "Resolver", "is_within", "refusal"]

_UDP_BYTES_MAX: Final = 1_232  # passes every network unfragmented; larger answers come by TCP
_TRIES: Final = 2  # at each name server, within the time of a lookup: one packet may be lost

Kind = Literal["A", "AAAA", "SRV"]


@dataclass(frozen=True, slots=True)
class Reply:
    """The name servers' reply about a name and a kind of record: rows, no rows, or a failure.

    Shape: `addresses` for A and AAAA, in canonical form. `targets` for SRV, with the `glue` of the same message: the A
           and AAAA records of each target. All in the order of the answer.
    """

    addresses: tuple[str, ...] = ()
    targets: tuple[tuple[dns.name.Name, int], ...] = ()
    glue: Mapping[dns.name.Name, "tuple[Reply, Reply]"] = field(default_factory=dict)
    truncated: str = ""  # a sentence if rows are missing
    failure: ResolverFailed | AliasRefused | None = None


class Resolver:
    """A stub resolver without a cache. It reads `resolv_conf` at its first query."""

    def __init__(self, nameservers: Sequence[ReplicaAddress], *, timeout_seconds: float, resolv_conf: str) -> None:
        self._nameservers = [dns.nameserver.Do53Nameserver(*nameserver) for nameserver in nameservers]
        self._timeout_seconds = timeout_seconds
        self._resolv_conf = resolv_conf
        self._client: dns.asyncresolver.Resolver | None = None
        self._backend = _ConnectedDatagrams()

    def candidates(self, service: str) -> list[dns.name.Name]:
        """Return the absolute names that `service` may stand for, in the order in which to try them.

        Raises: ServiceNotFound for an invalid name; ResolverFailed without a name server.
        Source: resolv.conf(5), `search` and `ndots`.
        """
        try:
            name = dns.name.from_text(service, None)
        except (dns.exception.DNSException, UnicodeError) as error:
            raise ServiceNotFound(f"expected the DNS name of a service, got {service!r}: {error}") from None
        if name in (dns.name.empty, dns.name.root):
            raise ServiceNotFound(f"expected the DNS name of a service, got {service!r}")
        client = self._configured()
        if name.is_absolute():
            return [name]
        suffixes = client.search or [client.domain]
        # A name has one dot less than labels. With `ndots` dots or more it is tried as given first, else last.
        is_first = len(name) > (1 if client.ndots is None else client.ndots)
        return list(
            dict.fromkeys(_joined(name, [dns.name.root, *suffixes] if is_first else [*suffixes, dns.name.root]))
        )

    async def query(self, name: dns.name.Name, kind: Kind, deadline: float, *, under: tuple[bytes, ...] = ()) -> Reply:
        """Query `name`, or the labels `under` it, until `deadline` by the loop's clock. A failure is in the reply."""
        client = self._configured()
        try:
            queried = dns.name.Name(under + name.labels)
        except dns.name.NameTooLong:
            return Reply()  # Longer than a name can be, so it does not exist.
        try:
            answer = await client.resolve(
                queried,
                kind,
                raise_on_no_answer=False,
                lifetime=deadline - asyncio.get_running_loop().time(),
                backend=self._backend,
            )
            return _reply_of(answer.response, queried, name)
        except dns.resolver.NXDOMAIN as error:
            return _reply_of(error.response(queried), queried, name)  # type: ignore[no-untyped-call]
        except dns.exception.Timeout:
            return Reply(
                failure=ResolverTimedOut(
                    f"no answer to {_question(queried, kind)} in {self._timeout_seconds:g} s from "
                    f"{' and '.join(map(str, client.nameservers))}"
                )
            )
        except dns.exception.DNSException as error:
            return Reply(failure=ResolverFailed(f"no answer to {_question(queried, kind)}: {error}"))

    def _configured(self) -> dns.asyncresolver.Resolver:
        if self._client is None:
            self._client = self._read_configuration()
        return self._client

    def _read_configuration(self) -> dns.asyncresolver.Resolver:
        client = dns.asyncresolver.Resolver(configure=False)
        try:
            client.read_resolv_conf(self._resolv_conf)
        except (OSError, ValueError, dns.exception.DNSException) as error:
            # With name servers given, the file is only used for its search list, and may be missing.
            if not self._nameservers:
                raise ResolverFailed(
                    f"expected name servers in {self._resolv_conf}, got none ({error}): set `nameservers` "
                    "(BROADCACHE_FANOUT_NAMESERVERS)"
                ) from None
        if self._nameservers:
            client.nameservers = self._nameservers
        client.use_edns(0, 0, _UDP_BYTES_MAX)
        client.timeout = self._timeout_seconds / (_TRIES * len(client.nameservers))
        return client


class _ConnectedDatagrams(dns.asyncbackend.Backend):  # type: ignore[name-defined, misc]
    """The library's asyncio backend, with connected sockets.

    A closed port is then an error at once, and packets from other hosts are ignored.
    """

    def __init__(self) -> None:
        self._inner = dns.asyncbackend.get_backend("asyncio")

    def name(self) -> str:
        return self._inner.name()

    def datagram_connection_required(self) -> Any:
        return True

    async def make_socket(self, *args: Any, **kwargs: Any) -> Any:
        return await self._inner.make_socket(*args, **kwargs)  # type: ignore[no-untyped-call]

    async def sleep(self, interval: float) -> None:
        await self._inner.sleep(interval)  # type: ignore[no-untyped-call]


def _joined(name: dns.name.Name, suffixes: Iterable[dns.name.Name]) -> Iterable[dns.name.Name]:
    for suffix in suffixes:
        try:
            yield name.concatenate(suffix)
        except dns.name.NameTooLong:
            continue  # Longer than a name can be, so it does not exist.


def _reply_of(message: dns.message.Message, queried: dns.name.Name, service: dns.name.Name) -> Reply:
    assert isinstance(message, dns.message.QueryMessage)
    chain = message.resolve_chaining()
    for target in (row.target for alias in chain.cnames for row in _rows(alias)):
        if not is_within(target, queried, service):
            return Reply(failure=refusal(service, target))
    rows = _rows(chain.answer or ())
    truncated = ""
    if message.flags & dns.flags.TC:
        question = message.question[0]
        truncated = (
            f"The answer to {_question(queried, dns.rdatatype.to_text(question.rdtype))} was cut off after "
            f"{len(rows)} records, even over TCP: there are more."
        )
        if not rows:
            return Reply(failure=ResolverFailed(truncated))
    if chain.answer is None or chain.answer.rdtype != dns.rdatatype.SRV:
        return Reply(addresses=_canonical(rows), truncated=truncated)
    return Reply(
        targets=tuple((row.target, row.port) for row in rows), glue=_glue(message.additional), truncated=truncated
    )


def _rows(rrset: Iterable[Any]) -> list[Any]:
    # The fields of a row depend on its record type; the library's annotations do not have them.
    return list(rrset)


def _glue(additional: Iterable[dns.rrset.RRset]) -> dict[dns.name.Name, tuple[Reply, Reply]]:
    known = {(rrset.name, rrset.rdtype): Reply(_canonical(rrset)) for rrset in additional if _is_address(rrset)}
    return {
        name: (known.get((name, dns.rdatatype.A), Reply()), known.get((name, dns.rdatatype.AAAA), Reply()))
        for name, _ in known
    }


def _is_address(rrset: dns.rrset.RRset) -> bool:
    return rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA)


def _canonical(rows: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(ipaddress.ip_address(row.address)) for row in rows))


def is_within(alias: dns.name.Name, queried: dns.name.Name, service: dns.name.Name) -> bool:
    """Whether `alias` may answer for `service`: only names of the same domain may."""
    # The parent of a single label is the root, and every name is within the root.
    domain = service.parent()
    return alias == queried or (domain != dns.name.root and alias.is_subdomain(domain))


def refusal(service: dns.name.Name, alias: dns.name.Name) -> AliasRefused:
    """Return the error for a service that is an alias of, or has SRV records for, a name outside its own domain."""
    return AliasRefused(
        f"expected {service} to have addresses of its own, got an alias or SRV target {alias}, which is outside of "
        f"{service.parent()}: fan out to that service by its own name"
    )


def _question(name: dns.name.Name, kind: str) -> str:
    return f"{kind} of {name.to_text(omit_final_dot=True)}"

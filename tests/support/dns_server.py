"""A DNS server with zones that a test may change at any time: UDP and TCP on one port, in the test's own event loop."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

_TTL_SECONDS: Final = 5
_TCP_BYTES_MAX: Final = 65_535
_PLAIN_UDP_BYTES_MAX: Final = 512  # for clients that do not say how much they take
_CHAIN_MAX: Final = 16

Rows = Callable[[], Sequence[str]]
Failure = Literal["SERVFAIL", "REFUSED", "NXDOMAIN", "FORMERR"]
_Question = tuple[dns.name.Name, dns.rdatatype.RdataType]


class Query(NamedTuple):
    """One question that arrived. Shape: `name` in lower case, without the last dot."""

    name: str
    rdtype: str
    transport: Literal["udp", "tcp"]


@dataclass
class _Records:
    rows: Rows
    glue: Mapping[str, Sequence[str]] = field(default_factory=dict)


class DnsServer:
    """`async with DnsServer() as server:` then `server.a("web.test", "127.0.0.2")` and ask `server.address`.

    Setting a name and type again replaces what was there; no rows remove it. A callable in the place of rows is called
    for each answer. An unknown name is NXDOMAIN, a known name of another type has no data.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._port = 0
        self._records: dict[_Question, _Records] = {}
        self._failures: dict[_Question, Failure] = {}
        self._silent: set[_Question] = set()
        self._tcp_rows_max: int | None = None
        self._is_tcp_silent = False
        self._datagrams: asyncio.DatagramTransport | None = None
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.queries: list[Query] = []

    @property
    def address(self) -> str:
        """Where it listens, as `127.0.0.1:5353` or `[::1]:5353`."""
        assert self._port, "enter the server first"
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    def a(self, name: str, *addresses: str | Rows) -> None:
        self._set(name, "A", addresses)

    def aaaa(self, name: str, *addresses: str | Rows) -> None:
        self._set(name, "AAAA", addresses)

    def srv(
        self, name: str, rows: Sequence[tuple[str, int]], *, glue: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Let `name` have rows of `(target, port)`. `glue` goes along: the addresses of targets, of either family."""
        self._set(name, "SRV", [f"0 10 {port} {_absolute(target)}" for target, port in rows], glue or {})

    def cname(self, name: str, target: str) -> None:
        self._set(name, "CNAME", [str(_absolute(target))])

    def fails(self, name: str, rdtype: str, failure: Failure) -> None:
        self._failures[_question(name, rdtype)] = failure

    def is_silent(self, name: str, rdtype: str) -> None:
        """Never answer this."""
        self._silent.add(_question(name, rdtype))

    def heals(self, name: str, rdtype: str) -> None:
        """Take back what `fails` and `is_silent` did."""
        self._failures.pop(_question(name, rdtype), None)
        self._silent.discard(_question(name, rdtype))

    def truncates_tcp_at(self, rows: int | None) -> None:
        """Cut answers off after so many rows, over TCP too, as a server does that has more than a message can hold."""
        self._tcp_rows_max = rows

    def is_silent_over_tcp(self) -> None:
        """Take connections and questions, and answer none."""
        self._is_tcp_silent = True

    async def refuses_tcp(self) -> None:
        """Take no more connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            # The sockets close in the event loop's next round.
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        listening, datagrams = _bound(self._host)
        self._port = listening.getsockname()[1]
        self._listener = await asyncio.start_server(self._serve, sock=listening)
        self._datagrams, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=datagrams)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._datagrams is not None:
            self._datagrams.close()
        await self.refuses_tcp()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)

    def answer(self, wire: bytes, transport: Literal["udp", "tcp"]) -> bytes | None:
        """Return the answer to one question, or None where there is silence."""
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return None
        name, rdtype = query.question[0].name, query.question[0].rdtype
        self.queries.append(Query(name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(rdtype), transport))
        if (name, rdtype) in self._silent or (transport == "tcp" and self._is_tcp_silent):
            return None
        response = dns.message.make_response(query, recursion_available=True)
        response.flags |= dns.flags.AA
        failure = self._failures.get((name, rdtype))
        if failure is not None:
            response.set_rcode(dns.rcode.from_text(failure))
        else:
            self._fill(response, name, rdtype)
        if transport == "tcp":
            return self._fitted_to_tcp(response)
        size = query.payload if query.edns >= 0 else _PLAIN_UDP_BYTES_MAX
        return response.to_wire(max_size=size, prefer_truncation=True, want_shuffle=False)

    def _set(
        self, name: str, rdtype: str, rows: Sequence[str | Rows], glue: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        if not rows:
            self._records.pop(_question(name, rdtype), None)
            return
        self._records[_question(name, rdtype)] = _Records(lambda: _called(rows), glue or {})

    def _fill(self, response: dns.message.Message, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> None:
        """Answer with the records of `name`, or of the name that it is an alias of."""
        for _ in range(_CHAIN_MAX):
            records = self._records.get((name, rdtype))
            if records is not None and (rows := records.rows()):
                response.answer.append(_rrset(name, rdtype, rows))
                response.additional.extend(_glue(records.glue))
                return
            alias = self._records.get((name, dns.rdatatype.CNAME))
            if alias is None:
                break
            targets = alias.rows()
            response.answer.append(_rrset(name, dns.rdatatype.CNAME, targets))
            name = dns.name.from_text(targets[0])
        known = {known for known, _ in (*self._records, *self._failures, *self._silent)}
        if name not in known:
            response.set_rcode(dns.rcode.NXDOMAIN)

    def _fitted_to_tcp(self, response: dns.message.Message) -> bytes:
        if self._tcp_rows_max is not None:
            _cut(response, self._tcp_rows_max)
        while True:
            try:
                return response.to_wire(max_size=_TCP_BYTES_MAX, want_shuffle=False)
            except dns.exception.TooBig:
                # As real servers do: as many rows as a message holds, and the flag.
                _cut(response, len(response.answer[-1]) * 9 // 10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(2), "big")
                answer = self.answer(await reader.readexactly(size), "tcp")
                if answer is not None:
                    writer.write(len(answer).to_bytes(2, "big") + answer)
                    await writer.drain()
        except (EOFError, OSError, asyncio.CancelledError):
            pass  # The client has what it wants, or the server closes.
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        answer = self._server.answer(data, "udp")
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)


def _bound(host: str) -> tuple[socket.socket, socket.socket]:
    """Return a TCP and a UDP socket on one free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        listening = socket.socket(family, socket.SOCK_STREAM)
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        listening.setblocking(False)
        datagrams.setblocking(False)
        try:
            listening.bind((host, 0))
            datagrams.bind((host, listening.getsockname()[1]))
            return listening, datagrams
        except OSError as error:
            listening.close()
            datagrams.close()
            if error.errno != errno.EADDRINUSE:
                raise


def _absolute(name: str) -> dns.name.Name:
    return dns.name.from_text(name)


def _question(name: str, rdtype: str) -> _Question:
    return _absolute(name), dns.rdatatype.from_text(rdtype)


def _called(rows: Sequence[str | Rows]) -> list[str]:
    return [text for row in rows for text in ([row] if isinstance(row, str) else row())]


def _rrset(name: dns.name.Name, rdtype: dns.rdatatype.RdataType, rows: Sequence[str]) -> dns.rrset.RRset:
    return dns.rrset.from_text_list(name, _TTL_SECONDS, "IN", dns.rdatatype.to_text(rdtype), rows)


def _glue(glue: Mapping[str, Sequence[str]]) -> Iterable[dns.rrset.RRset]:
    for target, addresses in glue.items():
        for rdtype, of_family in (
            (dns.rdatatype.A, [address for address in addresses if ":" not in address]),
            (dns.rdatatype.AAAA, [address for address in addresses if ":" in address]),
        ):
            if of_family:
                yield _rrset(_absolute(target), rdtype, of_family)


def _cut(response: dns.message.Message, rows_max: int) -> None:
    if not response.answer or len(response.answer[-1]) <= rows_max:
        return
    whole = response.answer.pop()
    if rows_max:
        response.answer.append(dns.rrset.from_rdata_list(whole.name, whole.ttl, list(whole)[:rows_max]))
    response.flags |= dns.flags.TC

"""The diagnosis: connects as a publisher and a replica do, gathers the facts, and has the checks judge them."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple

from ...shared.clock import Clock, monotonic
from ...shared.errors import InvalidSettings, LinkLost, LogRefused
from ...shared.invalidation import check_namespace
from ...shared.presence import Presence
from ...shared.transport.redis.address import RedisAddress, address_of
from ...shared.transport.redis.link import Argument, Link, OnMessage, Refused
from ...shared.transport.redis.log import Entry, head, read_after, read_newest
from ...shared.transport.redis.names import names_of
from ...shared.transport.redis.registry import as_of_now, presences, registered
from .facts import DeliveryFacts, LogFacts, NamespaceFacts, ServerFacts
from .findings import Finding
from .namespace_checks import examine_namespace, is_settled
from .rights import ROLES, Role, missing_of, rights_of
from .server_checks import examine_server, unreachable

__all__ = ["Diagnosis"]


_ROUND_TRIPS: Final = 20
_PROBES: Final = 20
_SETTINGS: Final = (
    "client-output-buffer-limit",
    "cluster-require-full-coverage",
    "maxmemory",
    "maxmemory-policy",
    "min-replicas-max-lag",
    "min-replicas-to-write",
    "save",
    "stop-writes-on-bgsave-error",
    "timeout",
)
_READ_INTERVAL_SECONDS: Final = 0.1


class _Links(NamedTuple):
    """Two links to the same server: one for commands, one that is subscribed and puts messages into `received`."""

    commands: Link
    listener: Link
    received: "asyncio.Queue[bytes]"


class Diagnosis:
    """Checks the Redis of a URL, and some namespaces on it. It changes nothing, and no replica notices.

    Shape:  `roles` are those whose rights the URL's user should have. `prefix` begins the names in Redis, as for a
            Publisher.
    Units:  `timeout_seconds` bounds the wait for each reply. A replica that is not coherent is read again until
            `patience_seconds` have passed: it may be starting. `away_seconds` is how long a disconnected replica must
            be able to catch up from the log. `clock` measures times; `wall_clock`, in seconds, is compared with the
            server's.
    Raises: InvalidSettings, InvalidNamespace when built. Faults of the servers and replicas are findings.
    """

    def __init__(
        self,
        url: str | RedisAddress,
        *,
        namespaces: Sequence[str],
        roles: Sequence[Role] = ROLES,
        timeout_seconds: float = 5.0,
        patience_seconds: float = 3.0,
        away_seconds: float = 60.0,
        prefix: str | None = None,
        clock: Clock = monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, seconds in (("timeout_seconds", timeout_seconds), ("away_seconds", away_seconds)):
            if not 0 < seconds < float("inf"):
                raise InvalidSettings(f"expected {name} to be a number of seconds above 0, got {seconds!r}")
        if not namespaces:
            raise InvalidSettings("expected at least one namespace, got none")
        self._address = address_of(url, prefix=prefix)
        self.label: Final = self._address.label
        self._namespaces = tuple(dict.fromkeys(map(check_namespace, namespaces)))
        self._roles = tuple(roles)
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._away_seconds = away_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._me = f"doctor-{secrets.token_hex(4)}"

    async def findings(self) -> list[Finding]:
        """Connect, measure and judge. In a cluster, each namespace is checked on its own server."""
        # Findings of servers come first, each server once.
        of_servers: dict[str, list[Finding]] = {}
        of_namespaces: list[Finding] = []
        for address, namespaces in self._places():
            was_reached = False
            try:
                async with self._connected(address) as links:
                    was_reached = True
                    if links.commands.label not in of_servers:
                        of_servers[links.commands.label] = []
                        of_servers[links.commands.label] += examine_server(await self._server(links.commands))
                    for namespace in namespaces:
                        facts = await self._namespace(links, namespace)
                        of_namespaces += examine_namespace(facts, away_seconds=self._away_seconds)
            except LinkLost as error:
                where = f"namespace {namespaces[0]}" if address.is_cluster else self.label
                of_namespaces.append(unreachable(where, error, was_reached=was_reached))
        return [*itertools.chain(*of_servers.values()), *of_namespaces]

    def _places(self) -> list[tuple[RedisAddress, tuple[str, ...]]]:
        if not self._address.is_cluster:
            return [(self._address, self._namespaces)]
        return [(self._address.of(namespace), (namespace,)) for namespace in self._namespaces]

    @asynccontextmanager
    async def _connected(self, address: RedisAddress) -> AsyncIterator[_Links]:
        received: asyncio.Queue[bytes] = asyncio.Queue()

        async def opened(on_message: OnMessage | None = None) -> Link:
            return await Link.open(
                address,
                client_name=f"broadcache:{self._me}",
                timeout_seconds=self._timeout_seconds,
                on_message=on_message,
            )

        commands = await opened()
        try:
            listener = await opened(lambda _, frame: received.put_nowait(frame))
            try:
                yield _Links(commands, listener, received)
            finally:
                await listener.close()
        finally:
            await commands.close()

    async def _query(self, link: Link, *command: Argument) -> Any:
        """Return the reply of the server, which may be a refusal. Raises: LinkLost."""
        try:
            async with link.within(self._timeout_seconds):
                return await link.call(*command)
        except Refused as refusal:
            return refusal

    # --- a server ----------------------------------------------------------------------------------------------------

    async def _server(self, link: Link) -> ServerFacts:
        hello = await self._query(link, "HELLO")
        round_trips_ms = [await self._timed_ms(link) for _ in range(_ROUND_TRIPS)]
        info = await self._query(link, "INFO")
        settings, refusal = await self._settings(link)
        clock_ahead_ms = await self._clock_ahead_ms(link)
        refusals = [str(each) for each in (info, refusal, clock_ahead_ms) if isinstance(each, Refused)]
        return ServerFacts(
            label=link.label,
            is_sentinel=self._address.label.partition("://")[0].endswith("sentinel"),
            is_cluster=self._address.is_cluster,
            hello={} if isinstance(hello, Refused) else _texts(hello),
            info={} if isinstance(info, Refused) else _fields_of(info),
            settings=settings,
            refusals=list(dict.fromkeys(refusals)),
            round_trips_ms=round_trips_ms,
            clock_ahead_ms=None if isinstance(clock_ahead_ms, Refused) else clock_ahead_ms,
        )

    async def _timed_ms(self, link: Link) -> float:
        # A refusal takes as long as a PONG.
        sent_at = self._clock()
        await self._query(link, "PING")
        return (self._clock() - sent_at) * 1_000

    async def _settings(self, link: Link) -> tuple[dict[str, str], Refused | None]:
        settings: dict[str, str] = {}
        for name in _SETTINGS:
            answer = await self._query(link, "CONFIG", "GET", name)
            if isinstance(answer, Refused):
                return settings, answer
            settings |= _texts(answer)
        return settings, None

    async def _clock_ahead_ms(self, link: Link) -> float | Refused:
        before = self._wall_clock()
        answer = await self._query(link, "TIME")
        if isinstance(answer, Refused):
            return answer
        server_seconds = int(answer[0]) + int(answer[1]) / 1_000_000
        return (server_seconds - (before + self._wall_clock()) / 2) * 1_000

    # --- a namespace -------------------------------------------------------------------------------------------------

    async def _namespace(self, links: _Links, namespace: str) -> NamespaceFacts:
        link = links.commands
        user = await self._query(link, "ACL", "WHOAMI")
        rights = rights_of(
            link.names_of(namespace),
            roles=self._roles,
            is_sharded=link.is_sharded,
            me=self._me,
            older=names_of(namespace) if link.naming.has_older_names else None,
        )
        async with link.within(self._timeout_seconds):
            missing = await missing_of(link, rights)
        facts = NamespaceFacts(
            namespace=namespace,
            naming=link.naming,
            user="" if isinstance(user, Refused) else _text(user),
            checked=rights,
            missing=missing,
            delivery=await self._delivery(links, namespace),
        )
        if link.naming.has_older_names:
            facts = await self._with_older(link, facts)
        return await self._with_replicas(link, await self._with_log(link, facts))

    async def _with_older(self, link: Link, facts: NamespaceFacts) -> NamespaceFacts:
        try:
            async with link.within(self._timeout_seconds):
                registry = await registered(link, facts.namespace, of_older_version=True)
        except LogRefused as error:
            return replace(facts, older_refusal=str(error))
        return replace(facts, older_replicas=sorted(registry.left_ms))

    async def _with_log(self, link: Link, facts: NamespaceFacts) -> NamespaceFacts:
        try:
            async with link.within(self._timeout_seconds):
                newest, first, last = await asyncio.gather(
                    head(link, facts.namespace),
                    read_after(link, facts.namespace, after=0, count=1),
                    read_newest(link, facts.namespace, count=1),
                )
        except LogRefused as error:
            return replace(facts, log_refusal=str(error))
        length = await self._query(link, "XLEN", link.names_of(facts.namespace).log)
        if isinstance(length, Refused):
            # No role needs XLEN; the sequences of the entries tell their number.
            length = last[0].sequence - first[0].sequence + 1 if first and last else 0
        return replace(facts, head=newest, log=_log_facts(length, first, last))

    async def _delivery(self, links: _Links, namespace: str) -> DeliveryFacts:
        channel = links.commands.names_of(namespace).echo_prefix + self._me
        latencies_ms: list[float] = []
        try:
            async with links.listener.within(self._timeout_seconds):
                await links.listener.subscribe(channel)
            for number in range(_PROBES):
                probe = str(number).encode()
                sent_at = self._clock()
                async with links.commands.within(self._timeout_seconds):
                    await links.commands.publish(channel, probe)
                if not await self._receives(links, probe):
                    return DeliveryFacts(latencies_ms=latencies_ms, lost=1)
                latencies_ms.append((self._clock() - sent_at) * 1_000)
        except Refused as refusal:
            return DeliveryFacts(refusal=str(refusal))
        return DeliveryFacts(latencies_ms=latencies_ms)

    async def _receives(self, links: _Links, probe: bytes) -> bool:
        """Wait for a probe; return False if it is lost. Raises: LinkLost when the listener is lost."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await links.received.get() == probe
        except TimeoutError:
            if links.listener.lost.done():
                raise links.listener.lost.result() from None
            return False

    async def _with_replicas(self, link: Link, facts: NamespaceFacts) -> NamespaceFacts:
        """Add the replicas, read again while one of them is not coherent, until `patience_seconds` have passed."""
        deadline = self._clock() + self._patience_seconds
        while True:
            facts = await self._with_replicas_now(link, facts)
            if is_settled(facts) or self._clock() >= deadline:
                return facts
            await self._sleep(_READ_INTERVAL_SECONDS)

    async def _with_replicas_now(self, link: Link, facts: NamespaceFacts) -> NamespaceFacts:
        try:
            async with link.within(self._timeout_seconds):
                registry = await registered(link, facts.namespace)
            async with link.within(self._timeout_seconds):
                found = await presences(link, facts.namespace, [*registry.left_ms, *registry.silent])
        except LogRefused as error:
            refusal = error.__cause__
            is_right_missing = isinstance(refusal, Refused) and refusal.code == "NOPERM"
            return replace(facts, replicas_refusal=str(error), may_read_replicas=not is_right_missing)
        return replace(
            facts,
            replicas=[found[replica] for replica in registry.left_ms if replica in found],
            without_presence=[replica for replica in registry.left_ms if replica not in found],
            silent=[
                as_of_now(found.get(replica) or Presence(replica=replica), registry, facts.head)
                for replica in registry.silent
            ],
            shared_ids=registry.shared,
            registry_doubt=registry.doubt_of_list or "",
            read_at=self._wall_clock(),
            subscribers=await self._subscribers(link, facts.namespace),
        )

    async def _subscribers(self, link: Link, namespace: str) -> int | None:
        command = "SHARDNUMSUB" if link.is_sharded else "NUMSUB"
        reply = await self._query(link, "PUBSUB", command, link.names_of(namespace).channel)
        return None if isinstance(reply, Refused) else int(reply[1])


def _log_facts(length: int, first: Sequence[Entry], last: Sequence[Entry]) -> LogFacts:
    if not first or not last:
        return LogFacts(length=0)
    return LogFacts(
        length=length,
        first_sequence=first[0].sequence,
        last_sequence=last[0].sequence,
        first_sent_at_ms=_sent_at_ms(first[0]),
        last_sent_at_ms=_sent_at_ms(last[0]),
    )


def _sent_at_ms(entry: Entry) -> int | None:
    return None if entry.invalidation is None else entry.invalidation.sent_at_ms


def _fields_of(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _texts(reply: Mapping[Any, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in reply.items()}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

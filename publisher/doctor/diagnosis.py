"""The diagnosis: connects as a publisher and as a replica would, gathers the facts, and has the doctor judge them."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from ...shared.clock import Clock, monotonic
from ...shared.errors import BroadcacheError, InvalidSettings, LinkLost, LogRefused
from ...shared.invalidation import check_namespace
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Argument, Link, OnMessage, Refused
from ...shared.transport.redis.log import Entry, echo_channel_of, head, names_of, read_after, read_newest
from ..fanout.addresses import Discovered
from .facts import DeliveryFacts, FanoutFacts, LogFacts, NamespaceFacts, ServerFacts
from .findings import Finding
from .namespace_checks import examine_fanout, examine_namespace, examine_server, is_settled, unreachable
from .rights import ROLES, Role, missing_of, rights_of
from .sightings import PRESENCE_PATTERN, is_of, sighting_of

__all__ = ["Diagnosis", "Discover", "look_up"]

T = TypeVar("T")

Discover: TypeAlias = Callable[[str], Awaitable[Discovered]]
"""Returns the addresses of a service, or raises BroadcacheError, OSError."""

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
_SCAN_COUNT: Final = 1_000
_SCANS_MAX: Final = 200
"""How many times the server is asked for some of its keys: other applications may have millions there."""
_LOOK_INTERVAL_SECONDS: Final = 0.1


class _Links(NamedTuple):
    """One link to ask over, and one that listens, to the same server."""

    commands: Link
    listener: Link
    heard: "asyncio.Queue[bytes]"


class _Presences(NamedTuple):
    """Where the presences of replicas are. `has_seen_all` is False when there were too many keys to look at all."""

    keys: Sequence[str]
    has_seen_all: bool
    refusal: str = ""


class Diagnosis:
    """Looks at one Redis, wherever its URL leads, and at some namespaces. Nothing is changed, and no replica notices.

    Shape:  `roles` are those that the URL's user is to have the rights of.
    Units:  `timeout_seconds` is how long each answer is waited for. A replica that is not coherent is looked at again
            until `patience_seconds` have passed: it may have been starting. `away_seconds` is how long a replica may be
            away and still catch up. `clock` measures, `wall_clock` in seconds is what the server's is compared with.
    Raises: InvalidSettings, InvalidNamespace when built. What is wrong with the world is a finding.
    """

    def __init__(
        self,
        url: str,
        *,
        namespaces: Sequence[str],
        roles: Sequence[Role] = ROLES,
        timeout_seconds: float = 5.0,
        patience_seconds: float = 3.0,
        away_seconds: float = 60.0,
        clock: Clock = monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, seconds in (("timeout_seconds", timeout_seconds), ("away_seconds", away_seconds)):
            if not 0 < seconds < float("inf"):
                raise InvalidSettings(f"expected {name} to be a number of seconds above 0, got {seconds!r}")
        if not namespaces:
            raise InvalidSettings("expected at least one namespace, got none")
        self.label: Final = RedisAddress(url).label
        self._address = RedisAddress(url)
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
        """Connect, measure and judge. In a cluster, each namespace is looked at where it is."""
        # Servers first, however many namespaces each of them has.
        of_servers: dict[str, list[Finding]] = {}
        of_namespaces: list[Finding] = []
        for address, namespaces in self._places():
            try:
                async with self._connected(address) as links:
                    if links.commands.label not in of_servers:
                        of_servers[links.commands.label] = []
                        of_servers[links.commands.label] += examine_server(await self._server(links.commands))
                    presences = await self._presences(links.commands)
                    for namespace in namespaces:
                        facts = await self._namespace(links, namespace, presences)
                        of_namespaces += examine_namespace(facts, away_seconds=self._away_seconds)
            except LinkLost as error:
                where = f"namespace {namespaces[0]}" if address.is_cluster else self.label
                of_namespaces.append(unreachable(where, error))
        return [*itertools.chain(*of_servers.values()), *of_namespaces]

    def _places(self) -> list[tuple[RedisAddress, tuple[str, ...]]]:
        if not self._address.is_cluster:
            return [(self._address, self._namespaces)]
        return [(self._address.of(namespace), (namespace,)) for namespace in self._namespaces]

    @asynccontextmanager
    async def _connected(self, address: RedisAddress) -> AsyncIterator[_Links]:
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def opened(on_message: OnMessage | None = None) -> Link:
            return await Link.open(
                address,
                client_name=f"broadcache:{self._me}",
                timeout_seconds=self._timeout_seconds,
                on_message=on_message,
            )

        commands = await opened()
        try:
            listener = await opened(lambda _, frame: heard.put_nowait(frame))
            try:
                yield _Links(commands, listener, heard)
            finally:
                await listener.close()
        finally:
            await commands.close()

    async def _within(self, link: Link, answer: Awaitable[T]) -> T:
        """Wait for an answer as long as one may take. Raises: LinkLost."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await answer
        except TimeoutError:
            raise LinkLost(
                f"expected an answer from {link.label} within {self._timeout_seconds:g} s, got none; "
                "it answered before: see whether it hangs, or is busy"
            ) from None

    async def _told(self, link: Link, *command: Argument) -> Any:
        """Ask, and take a refusal for an answer. Raises: LinkLost."""
        try:
            return await self._within(link, link.call(*command))
        except Refused as refusal:
            return refusal

    # --- a server ----------------------------------------------------------------------------------------------------

    async def _server(self, link: Link) -> ServerFacts:
        hello = await self._told(link, "HELLO")
        round_trips_ms = [await self._timed_ms(link) for _ in range(_ROUND_TRIPS)]
        info = await self._told(link, "INFO")
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
        # Whoever may not PING is told so just as fast.
        asked_at = self._clock()
        await self._told(link, "PING")
        return (self._clock() - asked_at) * 1_000

    async def _settings(self, link: Link) -> tuple[dict[str, str], Refused | None]:
        settings: dict[str, str] = {}
        for name in _SETTINGS:
            answer = await self._told(link, "CONFIG", "GET", name)
            if isinstance(answer, Refused):
                return settings, answer
            settings |= _texts(answer)
        return settings, None

    async def _clock_ahead_ms(self, link: Link) -> float | Refused:
        before = self._wall_clock()
        answer = await self._told(link, "TIME")
        if isinstance(answer, Refused):
            return answer
        server_seconds = int(answer[0]) + int(answer[1]) / 1_000_000
        return (server_seconds - (before + self._wall_clock()) / 2) * 1_000

    # --- a namespace -------------------------------------------------------------------------------------------------

    async def _namespace(self, links: _Links, namespace: str, presences: _Presences) -> NamespaceFacts:
        link = links.commands
        who = await self._told(link, "ACL", "WHOAMI")
        rights = rights_of(namespace, roles=self._roles, is_sharded=link.is_sharded, me=self._me)
        facts = NamespaceFacts(
            namespace=namespace,
            user="" if isinstance(who, Refused) else _text(who),
            checked=rights,
            missing=await self._within(link, missing_of(link, rights)),
            delivery=await self._delivery(links, namespace),
        )
        return await self._with_replicas(link, await self._with_log(link, facts), presences)

    async def _with_log(self, link: Link, facts: NamespaceFacts) -> NamespaceFacts:
        try:
            newest = await self._within(link, head(link, facts.namespace))
            length = await self._told(link, "XLEN", names_of(facts.namespace).log)
            first = await self._within(link, read_after(link, facts.namespace, after=0, count=1))
            last = await self._within(link, read_newest(link, facts.namespace, count=1))
        except LogRefused as error:
            return replace(facts, log_refusal=str(error))
        if isinstance(length, Refused):
            # No role needs XLEN, and whoever writes the log numbers its entries.
            length = last[0].sequence - first[0].sequence + 1 if first and last else 0
        return replace(facts, head=newest, log=_log_facts(length, first, last))

    async def _delivery(self, links: _Links, namespace: str) -> DeliveryFacts:
        channel = echo_channel_of(namespace, self._me)
        latencies_ms: list[float] = []
        try:
            await self._within(links.listener, links.listener.subscribe(channel))
            for number in range(_PROBES):
                sent_at = self._clock()
                await self._within(links.commands, links.commands.publish(channel, str(number).encode()))
                if not await self._heard(links, str(number).encode()):
                    return DeliveryFacts(latencies_ms=latencies_ms, lost=1)
                latencies_ms.append((self._clock() - sent_at) * 1_000)
        except Refused as refusal:
            return DeliveryFacts(refusal=str(refusal))
        return DeliveryFacts(latencies_ms=latencies_ms)

    async def _heard(self, links: _Links, probe: bytes) -> bool:
        """Wait for a probe. Raises: LinkLost when the listener is no more."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await links.heard.get() == probe
        except TimeoutError:
            if links.listener.lost.done():
                raise links.listener.lost.result() from None
            return False

    async def _presences(self, link: Link) -> _Presences:
        """Find the presences of all replicas, whichever namespace's name they are under."""
        keys: set[str] = set()
        cursor: Any = b"0"
        for _ in range(_SCANS_MAX):
            answer = await self._told(link, "SCAN", cursor, "MATCH", PRESENCE_PATTERN, "COUNT", _SCAN_COUNT)
            if isinstance(answer, Refused):
                return _Presences((), has_seen_all=False, refusal=str(answer))
            cursor, found = answer
            keys.update(map(_text, found))
            if cursor == b"0":
                return _Presences(sorted(keys), has_seen_all=True)
        return _Presences(sorted(keys), has_seen_all=False)

    async def _with_replicas(self, link: Link, facts: NamespaceFacts, presences: _Presences) -> NamespaceFacts:
        """Look at the replicas, and again while one of them is on its way, for as long as patience lasts."""
        if presences.refusal:
            return replace(facts, replicas_refusal=presences.refusal)
        facts = replace(facts, has_seen_all=presences.has_seen_all)
        deadline = self._clock() + self._patience_seconds
        while True:
            facts = await self._with_replicas_now(link, facts, presences.keys)
            if is_settled(facts) or self._clock() >= deadline:
                return facts
            await self._sleep(_LOOK_INTERVAL_SECONDS)

    async def _with_replicas_now(self, link: Link, facts: NamespaceFacts, keys: Sequence[str]) -> NamespaceFacts:
        replicas = []
        for key in keys:
            text = await self._told(link, "GET", key)
            if isinstance(text, Refused):
                # A user who is confined to one namespace is refused those of the others.
                if is_of(key, facts.namespace):
                    return replace(facts, replicas_refusal=str(text))
            elif text is not None and (replica := sighting_of(key, text, facts.namespace)) is not None:
                replicas.append(replica)
        return replace(facts, replicas=replicas)


async def look_up(service: str, discover: Discover, *, timeout_seconds: float) -> list[Finding]:
    """Look up the service of the fan-out, and judge what came."""
    try:
        async with asyncio.timeout(timeout_seconds):
            found = await discover(service)
    except TimeoutError:
        return examine_fanout(FanoutFacts(service=service, error=f"no answer within {timeout_seconds:g} s"))
    except (BroadcacheError, OSError) as error:
        return examine_fanout(FanoutFacts(service=service, error=str(error) or type(error).__name__))
    doubts = () if found.is_complete else found.notes
    return examine_fanout(FanoutFacts(service=service, addresses=[*map(str, found.addresses)], doubts=doubts))


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

"""The broadcaster: sends one request to every address of a service at once, and tells what each of them made of it."""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from ...shared.clock import Clock, monotonic
from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.process.closing import Closing
from ..telemetry.observer import UNOBSERVED, PublisherObserver
from .addresses import Discovered, Discovery, ReplicaAddress
from .exchange import Header, HttpResponse, Tls, Untold, exchange
from .policy import Destination, FanoutPolicy

__all__ = [
    "Broadcast",
    "Broadcaster",
    "CallOutcome",
    "HostMode",
    "Limits",
    "Request",
    "Scheme",
    "TooManyBroadcasts",
    "tls_of",
]

HostMode: TypeAlias = Literal["address", "service", "original"]
"""What the Host header says: the address that is called, the service's name, or what the caller sent."""
Scheme: TypeAlias = Literal["http", "https"]

_ATTEMPTS_MAX: Final = 3
_PAUSE_SECONDS_MIN: Final = 0.05
_PAUSE_SECONDS_MAX: Final = 0.4
# Not now, said by somebody who has not acted on it.
_TRY_AGAIN: Final = frozenset({408, 425, 429, 502, 503, 504})

_log = logging.getLogger("broadcache.fanout")


class TooManyBroadcasts(BroadcacheError):
    """As many broadcasts are under way as there may be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, and how much.

    Units:  `connect_timeout_seconds` is for one attempt to connect, `timeout_seconds` for all that is tried at one
            address, `deadline_seconds` for the whole broadcast without its discovery. `concurrency` addresses are
            called at a time, over all broadcasts, of which `broadcasts_max` may be under way. Of an answer's body
            `answer_bytes_max` bytes are read.
    Raises: InvalidSettings.
    """

    connect_timeout_seconds: float = 0.5
    timeout_seconds: float = 2.0
    deadline_seconds: float = 10.0
    concurrency: int = 256
    broadcasts_max: int = 32
    answer_bytes_max: int = 65_536

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise InvalidSettings(f"expected {name} to be above 0, got {getattr(self, name)!r}; correct it")
        if self.timeout_seconds > self.deadline_seconds:
            raise InvalidSettings(
                f"timeout_seconds must not exceed deadline_seconds (got {self.timeout_seconds:g} and "
                f"{self.deadline_seconds:g}): no address would be given its time"
            )


def _no_objection(answer: HttpResponse) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent to each address.

    Shape:  `target` is path and query, byte for byte. `headers` are those of the request, without Host and framing.
            `is_idempotent` allows to send it again after it may have arrived. `original_host` is the caller's Host.
            `objection_to` returns why an answer of 200 to 299 is no success; None when it is one, as by default.
    """

    method: str
    destination: Destination
    target: bytes = b"/"
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    is_idempotent: bool = False
    original_host: bytes = b""
    objection_to: Callable[[HttpResponse], str | None] = _no_objection


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What came of one address. `status_code` is None, and `error` says why, when there was no answer.

    Shape: with a status of 200 to 299, `error` is the request's objection to the answer.

    Units: `latency_ms` is from its turn to its answer, over all attempts.
    """

    url: str
    status_code: int | None
    error: str | None
    latency_ms: float
    attempts: int
    body: bytes = b""

    @property
    def is_success(self) -> bool:
        """Whether it answered with a status of 200 to 299, to which the request has no objection."""
        return self.error is None and self.status_code is not None and 200 <= self.status_code < 300


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What came of a broadcast: an outcome of each address, in the order in which they were named.

    Shape:  `is_complete` is whether discovery is known to have named everybody; `notes` say what is to be known of it.
    """

    outcomes: tuple[CallOutcome, ...]
    how: str
    is_complete: bool
    notes: tuple[str, ...]
    elapsed_ms: float

    @property
    def succeeded(self) -> int:
        """How many answered with success."""
        return sum(outcome.is_success for outcome in self.outcomes)


class Broadcaster(Closing):
    """Sends a request to all addresses of a service. Each has its own outcome: one that is dead spoils no other.

    A broadcast that has begun is carried out, whatever becomes of its caller: half of the addresses told is the worst
    of all results. An asynchronous context manager; leaving it waits for the broadcasts that are under way.

    Shape:  `tls` is for `scheme="https"`: certificates are checked for `tls_name`, or else for the service's name.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        discovery: Discovery,
        policy: FanoutPolicy,
        *,
        limits: Limits | None = None,
        scheme: Scheme = "http",
        host_mode: HostMode = "address",
        tls: ssl.SSLContext | None = None,
        tls_name: str | None = None,
        clock: Clock = monotonic,
        uniform: Callable[[], float] = random.random,
        observer: PublisherObserver = UNOBSERVED,
    ) -> None:
        self.limits: Final = limits or Limits()
        self._discovery = discovery
        self._policy = policy
        self._scheme = scheme
        self._host_mode = host_mode
        self._tls = (tls or ssl.create_default_context()) if scheme == "https" else None
        self._tls_name = tls_name
        self._clock = clock
        self._uniform = uniform
        self.observer: PublisherObserver = observer
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._running: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Wait for the broadcasts that are under way: each ends by its deadline. Closing twice is harmless."""
        while self._running:
            await asyncio.wait(self._running)

    async def broadcast(self, request: Request) -> Broadcast:
        """Send `request` to all addresses of its destination, and tell what each made of it.

        Raises: FanoutRefused for an address that may not be called, and then nobody is; ServiceNotFound,
                ResolverFailed, AliasRefused; TooManyBroadcasts.
        """
        try:
            broadcast = await self._begun(request)
        except BroadcacheError as error:
            self.observer.not_broadcast(request.destination.name, type(error).__name__)
            raise
        return broadcast

    async def _begun(self, request: Request) -> Broadcast:
        if len(self._running) >= self.limits.broadcasts_max:
            raise TooManyBroadcasts(
                f"expected at most {self.limits.broadcasts_max} broadcasts at a time, got one more; try again in a "
                "moment, or raise BROADCACHE_FANOUT_BROADCASTS_MAX"
            )
        return await asyncio.shield(self._owned(self._broadcast(request)))

    def _owned(self, work: Coroutine[Any, Any, Broadcast]) -> asyncio.Task[Broadcast]:
        task = asyncio.create_task(work, name="broadcache broadcast")
        self._running.add(task)

        def end(task: asyncio.Task[Broadcast]) -> None:
            self._running.discard(task)
            if not task.cancelled():
                task.exception()  # its caller may have gone; whoever is there gets it by waiting

        task.add_done_callback(end)
        return task

    async def _broadcast(self, request: Request) -> Broadcast:
        began_at = self._clock()
        found = await self._discovered(request)
        deadline_at = self._clock() + self.limits.deadline_seconds
        outcomes = await self._round(request, found.addresses, deadline_at)
        late, notes = await self._second_look(request, found)
        outcomes += await self._round(request, late, deadline_at)
        elapsed_seconds = self._clock() - began_at
        # Here, where it has ended: its caller may have gone before.
        self.observer.broadcast(
            request.destination.name, tuple(outcomes), elapsed_seconds, is_complete=found.is_complete
        )
        return Broadcast(tuple(outcomes), found.how, found.is_complete, (*found.notes, *notes), elapsed_seconds * 1_000)

    async def _discovered(self, request: Request) -> Discovered:
        """Return where the service is. Every address is checked before any is called."""
        found = await self._discovery.discover(request.destination.service, request.destination.port)
        if found.how != "list":  # whose addresses the operator has named one by one
            for address in found.addresses:
                self._policy.check_address(address.host)
        return found

    async def _second_look(
        self, request: Request, first: Discovered
    ) -> tuple[Sequence[ReplicaAddress], tuple[str, ...]]:
        """Return the addresses that have come up while the first ones were called."""
        if first.how == "list":
            return (), ()
        try:
            second = await self._discovered(request)
        except BroadcacheError as error:
            return (), (f"whether more have come up meanwhile is not known: {error}",)
        late = [address for address in second.addresses if address not in first.addresses]
        return late, (f"{len(late)} came up meanwhile, and were called too",) if late else ()

    async def _round(
        self, request: Request, addresses: Sequence[ReplicaAddress], deadline_at: float
    ) -> list[CallOutcome]:
        if not addresses:
            return []
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(self._call(request, address, deadline_at)) for address in addresses]
        return [call.result() for call in calls]

    # --- one address -------------------------------------------------------------------------------------------------

    async def _call(self, request: Request, address: ReplicaAddress, deadline_at: float) -> CallOutcome:
        url = f"{self._scheme}://{address}{request.target.decode('latin-1')}"
        async with self._slots:
            began_at = self._clock()
            ends_at = min(began_at + self.limits.timeout_seconds, deadline_at)
            answer: HttpResponse | None = None
            error: str | None = f"not tried: the deadline of {self.limits.deadline_seconds:g} s had come"
            attempts = 0
            while (left_seconds := ends_at - self._clock()) > 0 and attempts < _ATTEMPTS_MAX:
                attempts += 1
                try:
                    answer = await self._exchange(request, address, left_seconds)
                except Untold as untold:
                    answer, error = None, str(untold)
                    may_try_again = untold.may_be_repeated or request.is_idempotent
                else:
                    error = None
                    may_try_again = request.is_idempotent and answer.status_code in _TRY_AGAIN
                if not may_try_again or not await self._pause(attempts, answer, ends_at):
                    break
            latency_ms = (self._clock() - began_at) * 1_000
        if answer is None:
            return CallOutcome(url, None, error, latency_ms, attempts)
        is_success = 200 <= answer.status_code < 300
        objection = request.objection_to(answer) if is_success else None
        return CallOutcome(url, answer.status_code, objection, latency_ms, attempts, answer.body)

    async def _pause(self, attempts: int, answer: HttpResponse | None, ends_at: float) -> bool:
        """Wait before the next attempt; return whether there is to be one."""
        ceiling_seconds: float = min(_PAUSE_SECONDS_MAX, _PAUSE_SECONDS_MIN * 2.0**attempts)
        pause_seconds = self._uniform() * ceiling_seconds
        if answer is not None and answer.retry_after_seconds is not None:
            pause_seconds = max(pause_seconds, answer.retry_after_seconds)
        if attempts >= _ATTEMPTS_MAX or self._clock() + pause_seconds >= ends_at:
            return False
        await asyncio.sleep(pause_seconds)
        return True

    async def _exchange(self, request: Request, address: ReplicaAddress, left_seconds: float) -> HttpResponse:
        name = request.destination.name
        tls = None if self._tls is None else Tls(self._tls, self._tls_name or name)
        return await exchange(
            address.host,
            address.port,
            method=request.method.encode(),
            target=request.target,
            headers=((b"Host", self._host_of(request, address)), *request.headers),
            body=request.body,
            tls=tls,
            connect_timeout_seconds=min(self.limits.connect_timeout_seconds, left_seconds),
            timeout_seconds=left_seconds,
            answer_bytes_max=self.limits.answer_bytes_max,
        )

    def _host_of(self, request: Request, address: ReplicaAddress) -> bytes:
        match self._host_mode:
            case "service":
                return f"{request.destination.name}:{address.port}".encode()
            case "original" if request.original_host:
                return request.original_host
            case _:
                return str(address).encode()


def tls_of(scheme: Scheme, ca_file: str | None, where: str) -> ssl.SSLContext | None:
    """Return how to encrypt, with these authorities or the system's; None for http.

    Raises: InvalidSettings, which names `where` the file comes from.
    """
    if scheme == "http":
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InvalidSettings(f"{where}: expected a file of certificates, got {ca_file!r}: {error}") from None

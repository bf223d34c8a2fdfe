"""The broadcaster: sends one request to every address of a service at once, and returns the outcome of each call."""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from ...shared.clock import Clock, monotonic
from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.process.backoff import Backoff
from ...shared.process.closing import Closing
from ...shared.process.extras import check_installed
from ..telemetry.observer import UNOBSERVED, CallResult, PublisherObserver
from .addresses import Discovered, Discovery, ReplicaAddress
from .exchange import Tls, exchange
from .policy import Destination, FanoutPolicy
from .response import Header, HttpResponse, NoResponse

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
"""The Host header of each request: the address called, the service's name, or the caller's own Host."""
Scheme: TypeAlias = Literal["http", "https"]

_ATTEMPTS_MAX: Final = 3
_BACKOFF: Final = Backoff(seconds_min=0.1, seconds_max=0.4)
# "Not now": the server has not acted on the request.
_RETRYABLE_STATUSES: Final = frozenset({408, 425, 429, 502, 503, 504})

_log = logging.getLogger("broadcache.fanout")


class TooManyBroadcasts(BroadcacheError):
    """The limit of broadcasts under way at one time is reached."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of time and size for broadcasts.

    Units:  `connect_timeout_seconds` is for one attempt to connect, `timeout_seconds` for all attempts at one address,
            `deadline_seconds` for the whole broadcast without its discovery. At most `concurrency` addresses are called
            at a time, over all broadcasts; at most `broadcasts_max` broadcasts are under way. At most
            `answer_bytes_max` bytes of a response's body are read.
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
                raise InvalidSettings(f"expected {name} to be above 0, got {getattr(self, name)!r}")
        if self.timeout_seconds > self.deadline_seconds:
            raise InvalidSettings(
                f"timeout_seconds must not exceed deadline_seconds (got {self.timeout_seconds:g} and "
                f"{self.deadline_seconds:g}): the deadline would cut every call short"
            )


def _no_objection(response: HttpResponse) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The request sent to each address.

    Shape:  `target` is path and query, byte for byte. `headers` are those of the request, without Host and framing.
            `is_idempotent` allows to send it again after it may have arrived. `original_host` is the caller's Host.
            `objection_to` returns why a response of 200 to 299 is no success, or None if it is one (the default).
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
    """The outcome of calling one address.

    Shape: `result` is its class, for counting. Without a response `status_code` is None and `error` says why; with a
           status of 200 to 299, `error` is the request's objection to the response.
    Units: `latency_ms` is from the start of the first attempt to the response, over all attempts.
    """

    url: str
    result: CallResult
    status_code: int | None
    error: str | None
    latency_ms: float
    attempts: int
    body: bytes = b""

    @property
    def is_success(self) -> bool:
        """Whether the response had a status of 200 to 299, and the request has no objection to it."""
        return self.result == "success"


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The result of a broadcast: one outcome for each address, in the order of discovery.

    Shape:  `is_complete` is whether discovery is known to have named every replica; `notes` are its remarks.
    """

    outcomes: tuple[CallOutcome, ...]
    how: str
    is_complete: bool
    notes: tuple[str, ...]
    elapsed_ms: float

    @property
    def succeeded(self) -> int:
        """How many calls succeeded."""
        return sum(outcome.is_success for outcome in self.outcomes)


class Broadcaster(Closing):
    """Sends a request to all addresses of a service. Each call has its own outcome, and none delays the others.

    A broadcast that has begun runs to its end even if its caller is cancelled: a request that only half of the
    addresses have received is the worst result. An asynchronous context manager; leaving it waits for the broadcasts
    under way.

    Shape:  `tls` is for `scheme="https"`: certificates are checked for `tls_name`, or else for the service's name.
    Raises: InvalidSettings, also when the extra `fanout` is not installed.
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
        if not policy.is_off:  # one that is off calls nothing, and needs no extra
            check_installed("the fan-out", "h11")
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
        self._loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Wait for the broadcasts under way; each ends by its deadline. Closing twice is harmless."""
        self._settle()
        while self._running:
            await asyncio.wait(self._running)

    async def broadcast(self, request: Request) -> Broadcast:
        """Send `request` to all addresses of its destination, and return the outcome of each call.

        Raises: FanoutRefused if one of the addresses may not be called: then none is; ServiceNotFound, ResolverFailed,
                AliasRefused; TooManyBroadcasts.
        """
        self._settle()
        try:
            if len(self._running) >= self.limits.broadcasts_max:
                raise TooManyBroadcasts(
                    f"expected at most {self.limits.broadcasts_max} broadcasts at a time, got one more; try again in a "
                    "moment, or raise BROADCACHE_FANOUT_BROADCASTS_MAX"
                )
            return await asyncio.shield(self._start(self._broadcast(request)))
        except BroadcacheError as error:
            self.observer.not_broadcast(request.destination.name, type(error).__name__)
            raise

    def _settle(self) -> None:
        """On a new event loop, forget the broadcasts of the one before: it has ended, so they never do."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._slots = asyncio.Semaphore(self.limits.concurrency)
            self._running = set()

    def _start(self, work: Coroutine[Any, Any, Broadcast]) -> asyncio.Task[Broadcast]:
        task = asyncio.create_task(work, name="broadcache broadcast")
        self._running.add(task)

        def end(task: asyncio.Task[Broadcast]) -> None:
            self._running.discard(task)
            if not task.cancelled():
                task.exception()  # retrieved here, because a caller that was cancelled does not

        task.add_done_callback(end)
        return task

    async def _broadcast(self, request: Request) -> Broadcast:
        began_at = self._clock()
        found = await self._discover(request)
        deadline_at = self._clock() + self.limits.deadline_seconds
        outcomes = await self._call_all(request, found.addresses, deadline_at)
        late, notes = await self._discover_late(request, found)
        outcomes += await self._call_all(request, late, deadline_at)
        elapsed_seconds = self._clock() - began_at
        # Reported by the task, not by its caller, which may have been cancelled.
        self.observer.broadcast(
            request.destination.name, tuple(outcomes), elapsed_seconds, is_complete=found.is_complete
        )
        return Broadcast(tuple(outcomes), found.how, found.is_complete, (*found.notes, *notes), elapsed_seconds * 1_000)

    async def _discover(self, request: Request) -> Discovered:
        """Return the addresses of the service. Every address and port is checked before any is called."""
        found = await self._discovery.discover(request.destination.service, request.destination.port)
        if found.how != "list":  # the operator has named each address of a list
            for address in found.addresses:
                self._policy.check_address(address.host)
                if found.how == "srv":  # the name server has chosen the port
                    self._policy.check_port(request.destination, address.port)
        return found

    async def _discover_late(
        self, request: Request, first: Discovered
    ) -> tuple[Sequence[ReplicaAddress], tuple[str, ...]]:
        """Return the addresses that have appeared while the first ones were called."""
        if first.how == "list":
            return (), ()
        try:
            second = await self._discover(request)
        except BroadcacheError as error:
            return (), (f"replicas that started during the broadcast may be missing: {error}",)
        late = [address for address in second.addresses if address not in first.addresses]
        return late, (
            f"addresses that appeared during the broadcast, and were called too: {len(late)}",
        ) if late else ()

    async def _call_all(
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
            response: HttpResponse | None = None
            result: CallResult = "not tried"
            error = f"not tried: the deadline of {self.limits.deadline_seconds:g} s had passed"
            attempts = 0
            while (left_seconds := ends_at - self._clock()) > 0 and attempts < _ATTEMPTS_MAX:
                attempts += 1
                try:
                    response = await self._exchange(request, address, left_seconds)
                except NoResponse as failure:
                    response, result, error = None, failure.result, str(failure)
                    may_try_again = failure.may_be_repeated or request.is_idempotent
                else:
                    may_try_again = request.is_idempotent and response.status_code in _RETRYABLE_STATUSES
                if not may_try_again or not await self._pause(attempts, response, ends_at):
                    break
            latency_ms = (self._clock() - began_at) * 1_000
        if response is None:
            return CallOutcome(url, result, None, error, latency_ms, attempts)
        objection = None
        if not 200 <= response.status_code < 300:
            result = "status"
        else:
            objection = request.objection_to(response)
            result = "success" if objection is None else "not applied"
        return CallOutcome(url, result, response.status_code, objection, latency_ms, attempts, response.body)

    async def _pause(self, attempts: int, response: HttpResponse | None, ends_at: float) -> bool:
        """Wait before the next attempt; return whether one remains within limits and time."""
        pause_seconds = _BACKOFF.seconds(attempts, self._uniform)
        if response is not None and response.retry_after_seconds is not None:
            pause_seconds = max(pause_seconds, response.retry_after_seconds)
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
    """Return a TLS context that trusts the authorities in `ca_file`, or the system's; None for http.

    Raises: InvalidSettings, which names `where` the file comes from.
    """
    if scheme == "http":
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InvalidSettings(f"{where}: expected a file of PEM certificates, got {ca_file!r}: {error}") from None

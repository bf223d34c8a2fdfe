"""The fan-out as a publisher's second path: POSTs an invalidation to every replica of a service."""

import ssl
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec

from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.fanout_report import NOT_APPLIED_BY_ALL, NOT_FOLLOWED, AddressOutcome, FanoutReport, ProcessOutcome
from ...shared.process.closing import Closing
from ...shared.process.renamed import renamed
from ...shared.process.tokens import Tokens
from ..telemetry.observer import UNOBSERVED, PublisherObserver
from .addresses import Discovery
from .broadcaster import Broadcast, Broadcaster, CallOutcome, HostMode, Limits, Request, Scheme
from .discovery import DnsDiscovery, ListDiscovery
from .policy import FanoutPolicy, allow_of, check_destination
from .response import HttpResponse

__all__ = ["Fanout"]

_PATH: Final = "/cache-invalidation"
_SHOWN_MAX: Final = 60
"""How much of a foreign response an error shows: enough to recognize the server."""
_ERROR_SHOWN_MAX: Final = 200
_NAMED_MAX: Final = 5
_APPLIED: Final = frozenset({"applied", "repeat"})
"""Outcomes of a replica that has applied the invalidation; older replicas send `repeat` for a second delivery."""
_DROPPED: Final = _APPLIED | {"cleared"}
"""Outcomes of a replica that has dropped what the invalidation names, and perhaps more."""


class _Frame(msgspec.Struct, frozen=True):
    """The part of a frame that a replica's response repeats."""

    id: str


class _Member(msgspec.Struct, frozen=True):
    """The result of one subscriber of a process that has several, each with a replica id."""

    replica: str
    outcome: str | None = None


class _ReplicaResponse(msgspec.Struct, frozen=True):
    """The part of a replica's response that a publisher uses. All other fields are skipped.

    Shape:  `replicas` are all that one process has told of it, and `processes` all that serve the address; replicas of
            older versions send neither.
    """

    replica: str | None = None
    outcome: str | None = None
    id: str | None = None
    dropped: int | None = None
    replicas: tuple[_Member, ...] = ()
    processes: tuple[ProcessOutcome, ...] | None = None
    doubt: str | None = None

    @property
    def applied_by(self) -> tuple[str, ...]:
        """The replicas that have applied the invalidation, if the response as a whole says so."""
        listed = [each.replica for each in self.replicas if each.replica and each.outcome in _DROPPED]
        named = [self.replica] if self.replica and not listed else []
        return tuple(dict.fromkeys([*named, *listed]))

    @property
    def unapplied(self) -> str | None:
        """Why not all processes of the address have applied the invalidation; None if they have."""
        failed = [each for each in self.processes or () if each.error is not None]
        if not failed:
            return None if self.outcome != NOT_APPLIED_BY_ALL else "a process that was not named"
        return ", ".join(f"{_name_of(each)} ({_cut(each.error or '')})" for each in failed[:_NAMED_MAX]) + (
            f" and {len(failed) - _NAMED_MAX} more" if len(failed) > _NAMED_MAX else ""
        )

    @property
    def doubts(self) -> str | None:
        """Why there may be processes of the address that have not been told; None if there are none."""
        if self.processes is None:
            return (
                "the response does not name the processes that serve the address, and others may not have applied it; "
                "expected a replica of this version, and InvalidationEndpoint where another framework has the route"
            )
        return self.doubt


def _name_of(process: ProcessOutcome) -> str:
    return "a process" if process.pid is None else f"process {process.pid}"


def _cut(text: str) -> str:
    return text if len(text) <= _ERROR_SHOWN_MAX else f"{text[:_ERROR_SHOWN_MAX]}…"


_frame_decoder = msgspec.json.Decoder(_Frame)
_response_decoder = msgspec.json.Decoder(_ReplicaResponse)


class Fanout(Closing):
    """Sends invalidations by HTTP to every replica of a service.

    `Publisher(url, delivery="both", fanout=Fanout("web", 8080))`

    Shape:  `service` is a DNS name, best of a headless service; `port` a number, or the name of a port in SRV records.
            `addresses` (`host:port`) are called instead of a DNS lookup. `path` is the route of the replicas for
            invalidations, `token` their bearer token. `networks`, `nameservers` and the rest: docs/fanout.md.
    Raises: InvalidSettings, which names the wrong argument; also when the extra `fanout` is not installed.
    """

    def __init__(
        self,
        service: str,
        port: int | str,
        *,
        addresses: Sequence[str] = (),
        path: str = _PATH,
        token: str | None = None,
        networks: Sequence[str] = (),
        nameservers: Sequence[str] = (),
        limits: Limits | None = None,
        scheme: Scheme = "http",
        host_mode: HostMode = "address",
        tls: ssl.SSLContext | None = None,
        tls_name: str | None = None,
        observer: PublisherObserver = UNOBSERVED,
    ) -> None:
        if not path.startswith("/") or not path.isascii():
            raise InvalidSettings(f"expected a percent-encoded path that begins with /, got {path!r:.100}")
        if token is not None:
            Tokens([token], variable="token", has_rights=False)
        check_destination(service, str(port))
        self.service: Final = service
        policy = FanoutPolicy(allow_of(service, port), networks=networks)
        self._destination = policy.check("POST", service, str(port))
        self._target = path.encode()
        authorization = () if token is None else ((b"Authorization", b"Bearer " + token.encode()),)
        self._headers = ((b"Content-Type", b"application/json"), *authorization)
        discovery: Discovery = ListDiscovery({service: addresses}) if addresses else DnsDiscovery(nameservers)
        self.broadcaster: Final = Broadcaster(
            discovery,
            policy,
            limits=limits,
            scheme=scheme,
            host_mode=host_mode,
            tls=tls,
            tls_name=tls_name,
            observer=observer,
        )

    def __repr__(self) -> str:
        return f"Fanout({self.service!r}, {self._destination.port!r})"

    async def close(self) -> None:
        """Wait for the calls under way. Closing twice is harmless."""
        await self.broadcaster.close()

    @renamed("Fanout.send")
    async def tell(self, frames: Sequence[bytes]) -> FanoutReport:
        """The old name of `send`, until 0.2."""
        return await self.send(frames)

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        """POST each of `frames`, those of one invalidation, to every replica.

        An address has applied the invalidation if a replica there has confirmed every frame.

        Raises: nothing; errors are in the report.
        """
        broadcasts: list[Broadcast] = []
        problem: str | None = None
        for frame in frames:
            request = Request(
                method="POST",
                destination=self._destination,
                target=self._target,
                headers=self._headers,
                body=frame,
                is_idempotent=True,  # applied twice, an invalidation costs one more load
                objection_to=partial(
                    _objection_to, _frame_decoder.decode(frame).id, self.broadcaster.limits.answer_bytes_max
                ),
            )
            try:
                broadcasts.append(await self.broadcaster.broadcast(request))
            except BroadcacheError as error:
                problem = str(error)
                break
        return self._report(broadcasts, len(frames), problem)

    def _report(self, broadcasts: Sequence[Broadcast], frames: int, problem: str | None) -> FanoutReport:
        by_address: dict[str, list[CallOutcome]] = {}
        for broadcast in broadcasts:
            for outcome in broadcast.outcomes:
                by_address.setdefault(outcome.url, []).append(outcome)
        # An address discovered late has not received the first frames; after a problem no address receives any.
        outcomes = tuple(_outcome_of(url, each, frames) for url, each in by_address.items())
        succeeded = sum(outcome.is_success for outcome in outcomes)
        not_followed = sum(outcome.is_not_followed for outcome in outcomes)
        has_all_addresses = all(broadcast.is_complete for broadcast in broadcasts)
        doubts = [f"at {each.address}: {each.doubt}" for each in outcomes if each.doubt is not None]
        return FanoutReport(
            service=self.service,
            total=len(outcomes),
            succeeded=succeeded,
            failed=len(outcomes) - succeeded - not_followed,
            complete=has_all_addresses and not doubts,
            discovery_complete=has_all_addresses,
            doubt=f"{doubts[0]}{f' (and {len(doubts) - 1} more)' if len(doubts) > 1 else ''}" if doubts else None,
            discovery=broadcasts[0].how if broadcasts else None,
            elapsed_ms=round(sum(broadcast.elapsed_ms for broadcast in broadcasts), 3),
            outcomes=outcomes,
            problem=problem,
            not_followed=not_followed,
        )


def _outcome_of(url: str, calls: Sequence[CallOutcome], frames: int) -> AddressOutcome:
    """Return the outcome of one address: that of the first frame that failed, or else of the last frame."""
    decisive = next((call for call in calls if not call.is_success), calls[-1])
    is_not_followed = all(_is_not_followed(call) for call in calls)
    last = _replica_response_in(decisive.body) or _ReplicaResponse()
    error = None if is_not_followed else decisive.error
    unapplied = last.unapplied
    if (decisive.is_success or is_not_followed) and len(calls) < frames:
        error = f"only {len(calls)} of {frames} parts were sent to this address; publish again"
    elif unapplied is not None:
        error = _unapplied_text(unapplied)
    elif error is None and not decisive.is_success and not is_not_followed:
        error = f"answered {decisive.status_code}"
    responses = [response for call in calls if call.is_success and (response := _replica_response_in(call.body))]
    dropped = [response.dropped for response in responses if response.dropped is not None]
    doubt = next((doubt for response in responses if (doubt := response.doubts) is not None), None)
    # Processes that pass on to each other have all applied each part, whichever was called.
    if error is None and doubt is not None and len({frozenset(response.applied_by) for response in responses}) > 1:
        names = ", ".join(sorted({each[:_SHOWN_MAX] for response in responses for each in response.applied_by}))
        error = f"expected one replica to apply all {frames} parts, got several behind one address: {names}"
    return AddressOutcome(
        address=url,
        status_code=decisive.status_code,
        error=error,
        latency_ms=round(sum(call.latency_ms for call in calls), 3),
        attempts=sum(call.attempts for call in calls),
        replica=last.replica,
        replicas=last.applied_by if error is None or (unapplied is not None and len(calls) == frames) else (),
        outcome=last.outcome,
        dropped=sum(dropped) if dropped else None,
        processes=last.processes or (),
        doubt=doubt,
    )


def _is_not_followed(call: CallOutcome) -> bool:
    if call.status_code is None or not 200 <= call.status_code < 300:
        return False
    response = _replica_response_in(call.body)
    return response is not None and bool(response.replica) and response.outcome == NOT_FOLLOWED


def _objection_to(id: str, answer_bytes_max: int, response: HttpResponse) -> str | None:
    """Return why a response of 200 to 299 does not prove that a replica has applied the invalidation of this id."""
    answer = _replica_response_in(response.body)
    if answer is None or not answer.replica or answer.outcome is None:
        shown = f"{response.status_code} and {_shown(response.body, answer_bytes_max)}"
        return (
            f"expected the answer of a replica (a JSON object with replica, outcome and id), got {shown}; check that "
            "service, port and path are those of the replicas"
        )
    replica = f"replica {answer.replica[:_SHOWN_MAX]!r}"
    match answer.outcome:
        case _ if answer.unapplied is not None:
            return _unapplied_text(answer.unapplied)
        case "cleared":
            pass  # the replica has dropped everything
        case "not followed":
            return (
                f"expected {replica} to have applied it, got 'not followed': this replica has no cache of this "
                "namespace; have the fan-out call the service whose replicas follow the namespace"
            )
        case outcome if outcome not in _APPLIED:
            return f"expected {replica} to have applied it, got outcome {outcome[:_SHOWN_MAX]!r}; publish again"
        case _ if answer.id != id:
            return (
                f"expected {replica} to have applied id {id!r}, got id {answer.id and answer.id[:_SHOWN_MAX]!r}; check "
                "the proxies between the publisher and the replica"
            )
    return None


def _unapplied_text(processes: str) -> str:
    return f"expected each process of this address to have applied it, but not so {processes}; publish again"


def _shown(body: bytes, answer_bytes_max: int) -> str:
    if not body:
        return "an empty body"
    cut = f", cut at the limit of {answer_bytes_max} bytes" if len(body) >= answer_bytes_max else ""
    return f"{len(body)} bytes{cut}, which begin {body[:_SHOWN_MAX].decode('utf-8', 'replace')!r}"


def _replica_response_in(body: bytes) -> _ReplicaResponse | None:
    """Decode a replica's response; None if the body is something else."""
    try:
        return _response_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None

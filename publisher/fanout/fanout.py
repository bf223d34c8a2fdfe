"""The fan-out as a publisher's second path: POSTs an invalidation to every replica of a service."""

import ssl
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec

from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.fanout_report import AddressOutcome, FanoutReport
from ...shared.process.closing import Closing
from ...shared.process.extras import check_installed
from ..telemetry.observer import UNOBSERVED, PublisherObserver
from .addresses import Discovery
from .broadcaster import Broadcast, Broadcaster, CallOutcome, HostMode, Limits, Request, Scheme
from .discovery import DnsDiscovery, ListDiscovery
from .exchange import HttpResponse
from .policy import FanoutPolicy

__all__ = ["Fanout"]

_PATH: Final = "/cache-invalidation"


_SHOWN_MAX: Final = 60
"""How much of an answer that is not a replica's an error shows: enough to see what answered."""
_APPLIED: Final = frozenset({"applied", "repeat"})
"""What a replica answers that has applied the invalidation; `repeat` is what older ones say when they had before."""


class _Posted(msgspec.Struct, frozen=True):
    """The part of a frame that a replica's answer repeats."""

    id: str


class _ReplicaResponse(msgspec.Struct, frozen=True):
    """The part of a replica's answer that a publisher uses. All other fields are skipped."""

    replica: str | None = None
    outcome: str | None = None
    id: str | None = None
    dropped: int | None = None


_posted_decoder = msgspec.json.Decoder(_Posted)
_decoder = msgspec.json.Decoder(_ReplicaResponse)


class Fanout(Closing):
    """Every replica of a service, to be told by HTTP: `Publisher(url, delivery="both", fanout=Fanout("web", 8080))`.

    Shape:  `service` is a name in DNS, best of a headless service; `port` a number, or a name that SRV records know.
            `addresses` (`host:port`) are called instead of asking DNS. `path` is where a replica takes invalidations,
            `token` what it wants to see. `networks`, `nameservers` and the rest: docs/fanout.md.
    Raises: InvalidSettings, FanoutRefused or InvalidService for a service or port that is none.
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
        check_installed("Fanout", "h11", *([] if addresses else ["dns"]), extra="fanout")
        if not path.startswith("/") or not path.isascii():
            raise InvalidSettings(f"expected a path that begins with / and is percent-encoded, got {path!r:.100}")
        self.service: Final = service
        policy = FanoutPolicy([f"{service}:{port}"], networks=networks)
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
        """Wait for what is under way. Closing twice is harmless."""
        await self.broadcaster.close()

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        """POST each of `frames`, those of one invalidation, to every replica.

        An address has taken the invalidation when a replica answered there, to each frame, that it has applied it.

        Raises: nothing: what goes wrong is in the report.
        """
        told: list[Broadcast] = []
        problem: str | None = None
        for frame in frames:
            request = Request(
                method="POST",
                destination=self._destination,
                target=self._target,
                headers=self._headers,
                body=frame,
                is_idempotent=True,  # applied twice, it costs a load
                objection_to=partial(
                    _objection_to, _posted_decoder.decode(frame).id, self.broadcaster.limits.answer_bytes_max
                ),
            )
            try:
                told.append(await self.broadcaster.broadcast(request))
            except BroadcacheError as error:
                problem = str(error)
                break
        return self._report(told, len(frames), problem)

    def _report(self, told: Sequence[Broadcast], frames: int, problem: str | None) -> FanoutReport:
        by_address: dict[str, list[CallOutcome]] = {}
        for broadcast in told:
            for outcome in broadcast.outcomes:
                by_address.setdefault(outcome.url, []).append(outcome)
        # An address that came up after the first frame was not sent it; no address is sent what follows a problem.
        outcomes = tuple(_outcome_of(url, each, frames) for url, each in by_address.items())
        succeeded = sum(outcome.is_success for outcome in outcomes)
        return FanoutReport(
            service=self.service,
            total=len(outcomes),
            succeeded=succeeded,
            failed=len(outcomes) - succeeded,
            complete=all(broadcast.is_complete for broadcast in told),
            discovery=told[0].how if told else None,
            elapsed_ms=round(sum(broadcast.elapsed_ms for broadcast in told), 3),
            outcomes=outcomes,
            problem=problem,
        )


def _outcome_of(url: str, calls: Sequence[CallOutcome], frames: int) -> AddressOutcome:
    """Return what came of one address: of the first frame that it did not take, or else of the last."""
    decisive = next((call for call in calls if not call.is_success), calls[-1])
    error = decisive.error
    if decisive.is_success and len(calls) < frames:
        error = f"expected {frames} parts to be sent to it, got {len(calls)}; publish again"
    elif error is None and not decisive.is_success:
        error = f"answered {decisive.status_code}"
    answers = [answer for call in calls if call.is_success and (answer := _answer_of(call.body))]
    dropped = [answer.dropped for answer in answers if answer.dropped is not None]
    last = _answer_of(decisive.body) or _ReplicaResponse()
    if error is None and len({answer.replica for answer in answers}) > 1:
        names = ", ".join(sorted({str(answer.replica)[:_SHOWN_MAX] for answer in answers}))
        error = f"expected one replica to take all {frames} parts, got several behind one address: {names}"
    return AddressOutcome(
        address=url,
        status_code=decisive.status_code,
        error=error,
        latency_ms=round(sum(call.latency_ms for call in calls), 3),
        attempts=sum(call.attempts for call in calls),
        replica=last.replica,
        outcome=last.outcome,
        dropped=sum(dropped) if dropped else None,
    )


def _objection_to(id: str, answer_bytes_max: int, answer: HttpResponse) -> str | None:
    """Return why this answer of 200 to 299 does not say that a replica has applied the invalidation of this id."""
    told = _answer_of(answer.body)
    if told is None or not told.replica or told.outcome is None:
        return (
            f"expected the answer of a replica (a JSON object with replica, outcome and id), got {answer.status_code} "
            f"and {_shown(answer.body, answer_bytes_max)}; check that service, port and path are those of the replicas"
        )
    who = f"replica {told.replica[:_SHOWN_MAX]!r}"
    if told.outcome == "cleared":
        return None  # everything, so this too
    if told.outcome == "not followed":
        return (
            f"expected {who} to have applied it, got 'not followed': it holds nothing of this namespace; have the "
            "fan-out call the service whose replicas follow the namespace"
        )
    if told.outcome not in _APPLIED:
        return f"expected {who} to have applied it, got outcome {told.outcome[:_SHOWN_MAX]!r}; publish again"
    if told.id != id:
        return (
            f"expected {who} to have applied id {id!r}, got id {told.id and told.id[:_SHOWN_MAX]!r}; check what stands "
            "between the publisher and the replica"
        )
    return None


def _shown(body: bytes, answer_bytes_max: int) -> str:
    if not body:
        return "an empty body"
    cut = f", cut at the limit of {answer_bytes_max} bytes" if len(body) >= answer_bytes_max else ""
    return f"{len(body)} bytes{cut}, which begin {body[:_SHOWN_MAX].decode('utf-8', 'replace')!r}"


def _answer_of(body: bytes) -> _ReplicaResponse | None:
    """Return a replica's answer; None when it is something else."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None

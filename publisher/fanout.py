"""The fan-out as a publisher's second path: POSTs an invalidation to every replica of a service."""

import ssl
from collections.abc import Sequence
from typing import Final

import msgspec

from ..shared.closing import Closing
from ..shared.delivery import FanoutReport, Outcome
from ..shared.errors import BroadcacheError, InvalidSettings
from .broadcaster import Broadcast, Broadcaster, HostMode, Limits, Request, Scheme
from .broadcaster import Outcome as Called
from .discovery import Discovery, DnsDiscovery, ListDiscovery
from .fanout_policy import FanoutPolicy
from .observer import UNOBSERVED, Observer

__all__ = ["Fanout"]

_PATH: Final = "/cache-invalidation"


class _ReplicaAnswer(msgspec.Struct, frozen=True):
    """What a publisher wants to know of a replica's answer. Whatever else is in it is skipped."""

    replica: str | None = None
    dropped: int | None = None


_decoder = msgspec.json.Decoder(_ReplicaAnswer)


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
        observer: Observer = UNOBSERVED,
    ) -> None:
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

    async def tell(self, frames: Sequence[bytes]) -> FanoutReport:
        """POST each of `frames`, those of one invalidation, to every replica; who took all of them has taken it.

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
                is_idempotent=True,  # a replica knows the id of what it has applied
            )
            try:
                told.append(await self.broadcaster.broadcast(request))
            except BroadcacheError as error:
                problem = str(error)
                break
        return self._report(told, problem)

    def _report(self, told: Sequence[Broadcast], problem: str | None) -> FanoutReport:
        by_address: dict[str, list[Called]] = {}
        for broadcast in told:
            for outcome in broadcast.outcomes:
                by_address.setdefault(outcome.url, []).append(outcome)
        # Who came up after the first frame has not been told of it.
        outcomes = tuple(_outcome_of(url, each, len(told)) for url, each in by_address.items())
        succeeded = sum(outcome.error is None and outcome.status_code is not None for outcome in outcomes)
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


def _outcome_of(url: str, calls: Sequence[Called], frames: int) -> Outcome:
    """Return what came of one address: of the first frame that it did not take, or else of the last."""
    decisive = next((call for call in calls if not call.is_success), calls[-1])
    error = decisive.error
    if decisive.is_success and len(calls) < frames:
        error = f"told only {len(calls)} of {frames} parts"
    elif error is None and not decisive.is_success:
        error = f"answered {decisive.status_code}"
    answers = [_answer_of(call.body) for call in calls]
    dropped = [answer.dropped for answer in answers if answer.dropped is not None]
    return Outcome(
        address=url,
        status_code=decisive.status_code,
        error=error,
        latency_ms=round(sum(call.latency_ms for call in calls), 3),
        attempts=sum(call.attempts for call in calls),
        replica=answers[-1].replica,
        dropped=sum(dropped) if dropped else None,
    )


def _answer_of(body: bytes) -> _ReplicaAnswer:
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _ReplicaAnswer()  # a path that something else answers

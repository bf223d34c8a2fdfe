"""The result of a broadcast, as the API returns it."""

import msgspec

from ...fanout.broadcaster import Broadcast

__all__ = ["AddressResult", "BroadcastResult", "answer_of"]


class AddressResult(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result at one address. Without a response, `statusCode` is null and `error` says why."""

    status_code: int | None
    address: str
    error: str | None
    latency_ms: float
    attempts: int


class BroadcastResult(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a broadcast. `complete` is false when addresses are known or likely to be missing: see `notes`."""

    responses: tuple[AddressResult, ...]
    total: int
    succeeded: int
    failed: int
    complete: bool
    discovery: str
    elapsed_ms: float
    body_dropped: bool
    notes: tuple[str, ...]


def answer_of(broadcast: Broadcast, *, is_body_dropped: bool = False) -> BroadcastResult:
    """Convert a broadcast."""
    return BroadcastResult(
        responses=tuple(
            AddressResult(
                status_code=outcome.status_code,
                address=outcome.url,
                error=outcome.error,
                latency_ms=round(outcome.latency_ms, 3),
                attempts=outcome.attempts,
            )
            for outcome in broadcast.outcomes
        ),
        total=len(broadcast.outcomes),
        succeeded=broadcast.succeeded,
        failed=len(broadcast.outcomes) - broadcast.succeeded,
        complete=broadcast.is_complete,
        discovery=broadcast.how,
        elapsed_ms=round(broadcast.elapsed_ms, 3),
        body_dropped=is_body_dropped,
        notes=broadcast.notes,
    )

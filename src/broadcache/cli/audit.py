"""`broadcache audit`: whether replicas serve what they should, by asking them."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..shared.errors import InvalidSettings
from ..shared.invalidation import DEFAULT_NAMESPACE
from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, Namespace, RedisUrl

if TYPE_CHECKING:
    from ..publisher import AuditStats, Inconsistency
    from ..publisher.audit.source import SourceLookup
    from ..publisher.audit.stats import Within

__all__ = ["audit"]


def audit(
    *,
    namespace: Namespace = DEFAULT_NAMESPACE,
    seconds: Annotated[float, typer.Option(help="How long to audit.")] = 60.0,
    sample: Annotated[float, typer.Option(help="The share of invalidations that is looked into.")] = 0.1,
    within: Annotated[
        list[float] | None,
        typer.Option(help="How many seconds after an invalidation to ask. May be repeated. [default: 1, 10, 60]"),
    ] = None,
    source_url: Annotated[
        str | None, typer.Option(help="Where the source answers with a value as JSON, e.g. 'http://…/{key}'.")
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to try to reach Redis.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """Sample invalidations, and ask every replica whether it keeps to them.

    The exit code is 1 when one does not, and when it was never known that every replica was asked.
    """
    source = None if source_url is None else _source_at(source_url, namespace)
    stats, findings = asyncio.run(
        _audited(redis_url, namespace, seconds, sample, within, source=source, timeout_seconds=timeout_seconds)
    )
    if json:
        _print_json(stats, findings)
    else:
        _print_text(stats, findings, seconds)
    raise typer.Exit(OK if stats.is_consistent and not stats.found_nobody else FAILED)


async def _audited(
    redis_url: str,
    namespace: str,
    seconds: float,
    sample: float,
    within: list[float] | None,
    *,
    source: "SourceLookup | None",
    timeout_seconds: float,
) -> "tuple[AuditStats, tuple[Inconsistency, ...]]":
    from ..publisher import Auditor, Publisher
    from ..publisher.audit.auditor import TIMESCALES_SECONDS

    async with Publisher(redis_url, timeout_seconds=timeout_seconds) as publisher:
        auditor = Auditor(
            publisher, namespace, sample=sample, source=source, timescales_seconds=within or TIMESCALES_SECONDS
        )
        await publisher.head(namespace)  # a Redis that is away from the start is no audit
        await auditor.run(seconds)
        return auditor.stats(), auditor.findings


def _source_at(source_url: str, namespace: str) -> "SourceLookup":
    """Raises: InvalidSettings."""
    from ..publisher.audit.source import source_at

    try:
        return source_at(source_url, namespace)
    except InvalidSettings as error:
        raise InvalidSettings(f"--source-url: {error}") from None


def _print_json(stats: "AuditStats", findings: "tuple[Inconsistency, ...]") -> None:
    import msgspec

    answer: dict[str, Any] = msgspec.to_builtins(stats)
    answer["within"] = [
        {**msgspec.to_builtins(each), "share": each.share, "nines": each.nines} for each in stats.within
    ]
    answer["inconsistencies"] = stats.inconsistencies
    answer["findings"] = findings
    print(msgspec.json.encode(answer).decode())


def _print_text(stats: "AuditStats", findings: "tuple[Inconsistency, ...]", seconds: float) -> None:
    from .printable import printable

    print(f"{stats.namespace}, {seconds:g} s: {stats.seen} invalidations, {stats.sampled} sampled")
    for each in stats.within:
        print(f"  consistent within {each.seconds:g} s: {_share_of(each)}")
    for finding in findings:
        print(printable(f"  ✗ {finding}"))
    if stats.unasked:
        print(f"  not asked: {stats.unasked}, when no replica was there or the registry may not have listed every one")
    if stats.undecided:
        print(f"  undecided: {stats.undecided}, of keys that were invalidated all the time")


def _share_of(within: "Within") -> str:
    share = "not asked" if within.share is None else f"{within.share:.4%}"
    # All of them is no number of nines: it says more of how many were asked about.
    nines = "" if within.nines is None else f", {within.nines:.1f} nines"
    return f"{share} ({within.consistent} of {within.judged}{nines})"

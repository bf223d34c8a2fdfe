"""`broadcache audit`: samples invalidations and reports which replicas do not honour them."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..shared.errors import InvalidSettings
from ..shared.invalidation import DEFAULT_NAMESPACE
from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, Namespace, RedisUrl, publisher_at

if TYPE_CHECKING:
    from ..publisher import AuditStats, Inconsistency
    from ..publisher.audit.source import SourceLookup
    from ..publisher.audit.stats import Within

__all__ = ["audit"]


def audit(
    *,
    namespace: Namespace = DEFAULT_NAMESPACE,
    seconds: Annotated[float, typer.Option(help="How long to audit.")] = 60.0,
    sample: Annotated[float, typer.Option(help="The share of invalidations to audit, up to 1.")] = 0.1,
    within: Annotated[
        list[float] | None,
        typer.Option(
            help="Seconds after an invalidation at which to query the replicas. May be repeated.",
            show_default="1, 10, 60",
        ),
    ] = None,
    source_url: Annotated[
        str | None,
        typer.Option(help="URL at which the source returns the value of a key as JSON, e.g. 'http://…/{key}'."),
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to try to reach Redis.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """Sample invalidations, and query every replica for entries that it should have dropped.

    The exit code is 1 when a replica is inconsistent, and when nothing could be judged: there was no invalidation, or
    no query is known to have reached every replica.
    """
    source = None if source_url is None else _source_at(source_url, namespace)
    stats, findings = asyncio.run(
        _audited(redis_url, namespace, seconds, sample, within, source=source, timeout_seconds=timeout_seconds)
    )
    if json:
        _print_json(stats, findings)
    else:
        _print_text(stats, findings, seconds)
    raise typer.Exit(OK if stats.is_consistent and stats.has_judged else FAILED)


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
    from ..publisher import Auditor
    from ..publisher.audit.auditor import TIMESCALES_SECONDS

    async with publisher_at(redis_url, timeout_seconds) as publisher:
        auditor = Auditor(
            publisher, namespace, sample=sample, source=source, timescales_seconds=within or TIMESCALES_SECONDS
        )
        await publisher.head(namespace)  # fails at once when Redis is unreachable from the start
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
    if not stats.sampled:
        print("  nothing was audited: no invalidation was sampled; audit for longer, or with a larger --sample")
    elif not stats.has_judged:
        print("  nothing was judged: no query is known to have reached every replica")
    if stats.unasked:
        print(f"  not queried: {stats.unasked}, no replica was registered or the registry may have been incomplete")
    if stats.undecided:
        print(f"  undecided: {stats.undecided}, the keys were invalidated again too often")


def _share_of(within: "Within") -> str:
    share = "not queried" if within.share is None else f"{within.share:.4%}"
    # No "nines" are shown for 100 %: the number would only reflect the size of the sample.
    nines = "" if within.nines is None else f", {within.nines:.1f} nines"
    return f"{share} ({within.consistent} of {within.judged}{nines})"

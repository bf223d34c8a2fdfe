"""`broadcache audit`: whether replicas serve what they should, by asking them."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from ..shared.errors import InvalidSettings
from ..shared.invalidation import DEFAULT_NAMESPACE
from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, Namespace, RedisUrl

if TYPE_CHECKING:
    from ..publisher import AuditStats, Inconsistency
    from ..publisher.auditor import Source

__all__ = ["audit"]

_SOURCE_SECONDS = 5.0


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
    """Sample invalidations, and ask every replica whether it keeps to them. 1: something was inconsistent."""
    source = None if source_url is None else _source_at(source_url)
    stats, findings = asyncio.run(
        _audited(redis_url, namespace, seconds, sample, within, source=source, timeout_seconds=timeout_seconds)
    )
    if json:
        _print_json(stats, findings)
    else:
        _print_text(stats, findings, seconds)
    raise typer.Exit(OK if stats.is_consistent else FAILED)


async def _audited(
    redis_url: str,
    namespace: str,
    seconds: float,
    sample: float,
    within: list[float] | None,
    *,
    source: "Source | None",
    timeout_seconds: float,
) -> "tuple[AuditStats, tuple[Inconsistency, ...]]":
    from ..publisher import Auditor, Publisher
    from ..publisher.auditor import TIMESCALES_SECONDS

    async with Publisher(redis_url, timeout_seconds=timeout_seconds) as publisher:
        auditor = Auditor(
            publisher, namespace, sample=sample, source=source, timescales_seconds=within or TIMESCALES_SECONDS
        )
        await publisher.head(namespace)  # a Redis that is away from the start is no audit
        await auditor.run(seconds)
        return auditor.stats(), auditor.findings


def _source_at(template: str) -> "Source":
    """Read a key with GET from where `template` says. Raises: InvalidSettings."""
    if urlsplit(template).scheme not in ("http", "https") or "{key}" not in template:
        raise InvalidSettings(f"expected --source-url to be http://… with {{key}} in it, got {template!r}")

    async def read(key: str) -> Any:
        return await asyncio.to_thread(_get, template.replace("{key}", quote(key, safe="")))

    return read


def _get(url: str) -> Any:
    """Return the JSON at `url`. Raises: LookupError when there is none, OSError, ValueError."""
    import urllib.error
    import urllib.request

    import msgspec

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_SOURCE_SECONDS) as response:
            return msgspec.json.decode(response.read())
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                raise LookupError(url) from None
            raise


def _print_json(stats: "AuditStats", findings: "tuple[Inconsistency, ...]") -> None:
    import msgspec

    answer: dict[str, Any] = msgspec.to_builtins(stats)
    answer["within"] = [{**msgspec.to_builtins(each), "share": each.share} for each in stats.within]
    answer["findings"] = findings
    print(msgspec.json.encode(answer).decode())


def _print_text(stats: "AuditStats", findings: "tuple[Inconsistency, ...]", seconds: float) -> None:
    from .printable import printable

    print(f"{stats.namespace}, {seconds:g} s: {stats.seen} invalidations, {stats.sampled} sampled")
    for each in stats.within:
        share = "not asked" if each.share is None else f"{each.share:.4%}"
        print(f"  consistent within {each.seconds:g} s: {share} ({each.consistent} of {each.judged})")
    for finding in findings:
        print(printable(f"  ✗ {_line_of(finding)}"))
    if stats.undecided:
        print(f"  undecided: {stats.undecided}, of keys that were invalidated all the time")


def _line_of(finding: "Inconsistency") -> str:
    at = "nowhere" if finding.replica_position is None else str(finding.replica_position.sequence)
    what = {
        "missing": "did not answer",
        "behind": f"has not applied it: it is at {at}",
        "differs": f"is at {at} and serves {finding.fingerprint}, "
        + (
            "others serve something else"
            if finding.expected is None
            else f"{'the source has' if finding.against == 'source' else 'most serve'} {finding.expected}"
        ),
    }[finding.kind]
    named = "" if finding.key is None else f" of {finding.key}"
    return (
        f"{finding.replica}: {what}, {finding.within_seconds:g} s after the invalidation{named} "
        f"at {finding.position.sequence}"
    )

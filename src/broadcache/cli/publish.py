"""`broadcache publish`: log one invalidation, straight to Redis."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from ..shared.errors import InvalidTarget
from ..shared.invalidation import DEFAULT_NAMESPACE, Everything, Keys, Prefixes, Tags, Target
from .options import REDIS_URL, Json, Namespace, RedisUrl

if TYPE_CHECKING:
    from ..shared.log import Receipt

__all__ = ["publish"]


def publish(
    *,
    namespace: Namespace = DEFAULT_NAMESPACE,
    key: Annotated[list[str] | None, typer.Option(help="Drop the entry with this key. May be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Drop the entries with this tag. May be repeated.")] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(help="Drop the entries whose key begins so. May be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Drop every entry of the namespace.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for those who read the log later.")] = "",
    timeout_seconds: Annotated[float, typer.Option(help="How long to try.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """Tell every replica to drop entries. Done (0) means that Redis has logged it; otherwise the exit code is 1."""
    targets = _targets(key or [], tag or [], prefix or [], everything=everything)
    if not targets:
        raise InvalidTarget("expected at least one of --key, --tag, --prefix or --everything, got none")
    receipt = asyncio.run(_published(targets, redis_url, namespace, reason, timeout_seconds))
    print(_as_json(receipt) if json else _as_text(receipt))


def _targets(keys: list[str], tags: list[str], prefixes: list[str], *, everything: bool) -> list[Target]:
    targets: list[Target] = [Everything()] if everything else []
    for kind, names in ((Keys, keys), (Tags, tags), (Prefixes, prefixes)):
        if names:
            targets.append(kind(*names))
    return targets


async def _published(
    targets: list[Target], redis_url: str, namespace: str, reason: str, timeout_seconds: float
) -> "Receipt":
    from ..publisher import Publisher

    async with Publisher(redis_url, timeout_seconds=timeout_seconds) as publisher:
        return await publisher.publish(*targets, namespace=namespace, reason=reason)


def _as_text(receipt: "Receipt") -> str:
    assert receipt.position is not None, "without a second path a publish that returns was logged"
    epoch, sequence = receipt.position
    return (
        f"published {receipt.id} to {receipt.namespace} at {sequence} of epoch {epoch}; "
        f"receivers: {receipt.receivers} (connections that listen; not a proof)"
    )


def _as_json(receipt: "Receipt") -> str:
    """The same fields as the answer of `POST /invalidations`."""
    import json

    epoch, sequence = receipt.position or (None, None)
    return json.dumps(
        {
            "id": receipt.id,
            "namespace": receipt.namespace,
            "epoch": epoch,
            "sequence": sequence,
            "receivers": receipt.receivers,
            "logged": receipt.is_logged,
            "pending": receipt.pending,
            "fanout": None,
        }
    )

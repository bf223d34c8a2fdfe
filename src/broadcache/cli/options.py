"""Options that several commands share."""

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..publisher import Publisher

__all__ = ["REDIS_URL", "Json", "Namespace", "RedisUrl", "publisher_at"]

REDIS_URL: Final = "redis://127.0.0.1:6379"

RedisUrl = Annotated[
    str,
    typer.Option(
        envvar="BROADCACHE_REDIS_URL",
        help="The URL of Redis or Valkey. A password is safer in the environment: process lists show arguments.",
    ),
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="The namespace of the caches.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, one object a line.")]


@asynccontextmanager
async def publisher_at(redis_url: str, timeout_seconds: float) -> "AsyncIterator[Publisher]":
    """Enter the publisher of a command, whose error says what its log would say of an outage."""
    from ..publisher import Publisher

    outages = logging.getLogger("broadcache.publisher.outages")
    was_disabled, outages.disabled = outages.disabled, True
    try:
        async with Publisher(redis_url, timeout_seconds=timeout_seconds) as publisher:
            yield publisher
    finally:
        outages.disabled = was_disabled

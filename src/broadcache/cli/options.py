"""Options that several commands share."""

import logging
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
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


def publisher_at(redis_url: str, timeout_seconds: float) -> "Publisher":
    """Return the publisher of a command, whose error says what its log would say of an outage."""
    from ..publisher import Publisher

    logging.getLogger("broadcache.publisher.outages").disabled = True
    return Publisher(redis_url, timeout_seconds=timeout_seconds)

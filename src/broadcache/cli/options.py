"""Options that several commands share."""

from typing import Annotated, Final

import typer

__all__ = ["REDIS_URL", "Json", "Namespace", "RedisUrl"]

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

"""Options that several commands share."""

from typing import Annotated, Final

import typer

from ..shared.invalidation import DEFAULT_NAMESPACE

__all__ = ["REDIS_URL", "Json", "Namespace", "RedisUrl"]

REDIS_URL: Final = "redis://127.0.0.1:6379"

RedisUrl = Annotated[
    str,
    typer.Option(
        envvar="BROADCACHE_REDIS_URL",
        help="Where Redis or Valkey is. A password is safer in the environment, where others cannot list it.",
    ),
]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help=f"The family of caches. [default: {DEFAULT_NAMESPACE}]")
]
Json = Annotated[bool, typer.Option("--json", help="JSON for scripts, one object a line.")]

"""`broadcache serve`: runs the publisher's HTTP API."""

import os
from contextlib import ExitStack
from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    *,
    host: Annotated[str | None, typer.Option(help="The address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="The port; 0 chooses a free one.", show_default="8000")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="The URL of Redis or Valkey.", show_default="redis://127.0.0.1:6379")
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Start a Valkey server on this machine instead; it persists nothing.")
    ] = False,
    embedded_port: Annotated[
        int | None,
        typer.Option(min=1, max=65_535, help="The port of that server; implies --embedded.", show_default="a free one"),
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(help="TOKEN, rw:TOKEN or ro:TOKEN (GET only). May be repeated. Safer in BROADCACHE_TOKENS."),
    ] = None,
    fanout_only: Annotated[
        bool, typer.Option("--fanout-only", help="Serve only the HTTP fan-out: no Redis, no invalidations.")
    ] = False,
    allow_open: Annotated[bool, typer.Option("--allow-open", help="Listen beyond loopback without a token.")] = False,
) -> None:
    """Serve the HTTP API, the operators' page and the fan-out. More settings: BROADCACHE_… environment variables."""
    from ..publisher.api import server
    from ..publisher.api.settings import ApiSettings, FanoutSettings
    from ..shared.errors import InvalidSettings
    from ..shared.process.settings import read_settings

    embedded = embedded or embedded_port is not None
    if embedded and redis_url is not None:
        raise InvalidSettings("expected --redis-url or an embedded server, got both; leave one out")
    if fanout_only and (embedded or redis_url is not None):
        raise InvalidSettings("--fanout-only uses no Redis: leave out --redis-url, --embedded and --embedded-port")
    with ExitStack() as stack:
        if embedded:
            from ..shared.transport.redis.embedded import EmbeddedServer

            redis_url = stack.enter_context(EmbeddedServer(port=embedded_port)).url
            print(f"embedded server at {redis_url}", flush=True)
        kind: type[FanoutSettings] = FanoutSettings if fanout_only else ApiSettings
        settings = read_settings(
            kind,
            os.environ,
            listen_host=host,
            listen_port=port,
            tokens=tuple(token) if token else None,
            allow_open=allow_open or None,
            redis_url=redis_url,  # None with --fanout-only, which has no such setting
        )
        server.serve(settings, on_ready=lambda url: print(f"publisher listens on {url}", flush=True))

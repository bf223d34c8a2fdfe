"""`broadcache replica`: an example service with a product catalogue, to try broadcache on."""

import os
import socket
from pathlib import Path
from typing import Annotated, Final

import typer

from ..options import REDIS_URL, RedisUrl

__all__ = ["replica"]

_READ_ELSEWHERE: Final = ("BROADCACHE_REDIS_URL", "BROADCACHE_REPLICA_TOKEN", "BROADCACHE_REPLICA_ALLOW_OPEN")


def replica(
    *,
    source: Annotated[Path, typer.Option(help="An SQLite file with the products; created and filled if missing.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port to listen on; 0 chooses a free one.")] = 8101,
    redis_url: RedisUrl = REDIS_URL,
    name: Annotated[
        str | None,
        typer.Option(help="The replica's id.", show_default="replica-PORT; beyond loopback, replica-HOSTNAME"),
    ] = None,
    when_incoherent: Annotated[
        str,
        typer.Option(help="While coherence cannot be proven: `bypass` the cache, or `serve` from it until the TTL."),
    ] = "bypass",
    no_subscribe: Annotated[
        bool, typer.Option("--no-subscribe", help="Receive no invalidations: a naive cache, for comparison.")
    ] = False,
) -> None:
    """Run an example replica: GET /products/{id} reads through its cache, PUT only writes the source."""
    from ...shared.process.logs import LogSettings, set_up_logging
    from ...shared.process.serving import listen, new_server, run, url_of
    from ...shared.process.settings import read_settings
    from .catalogue import Catalogue, CatalogueSource, NaiveCatalogue
    from .replica_api import ObservedCache, naive_app, replica_app

    settings = read_settings(LogSettings, os.environ, read_elsewhere=_READ_ELSEWHERE)
    set_up_logging(settings.log_format)
    with listen(host, port) as listener:
        name = name or _name_at(host, listener.getsockname()[1])
        products = CatalogueSource(source)
        if no_subscribe:
            app = naive_app(NaiveCatalogue(products), name)
        else:
            cache = ObservedCache(when_incoherent)
            app = replica_app(Catalogue(products, redis_url, cache=cache, replica_id=name), name)
        url = url_of(host, listener)
        server = new_server(app, on_ready=lambda: print(f"{name} listens on {url}", flush=True))
        run(server, listener)


def _name_at(host: str, port: int) -> str:
    """Name a replica after its port or, beyond loopback, where several may have the same port, after its host."""
    from ...shared.process.serving import is_loopback

    return f"replica-{port if is_loopback(host) else socket.gethostname()}"

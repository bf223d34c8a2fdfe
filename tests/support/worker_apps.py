"""A service for each server that runs several workers. It is configured by the environment: `REDIS` and `SOURCE`.

`SOURCE` is a file with the value that every worker loads. Where a master loads the module before it forks, the module
starts the subscriber and fills the cache in the master, as services do that preload. With `ALONE` in the environment,
no process passes on what is posted to it: the negative control.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from cachetools import TTLCache
from fastapi import FastAPI

from broadcache.subscriber import CacheInvalidationMixin, InvalidationEndpoint, LocalCache, Subscriber
from broadcache.subscriber.endpoint import posted
from broadcache.subscriber.endpoint.processes.siblings import PassedOn

NAMESPACE: Final = "products"
KEY: Final = "key"
BOUND_SECONDS: Final = 8.0
if "ALONE" in os.environ:
    posted.__dict__["pass_on"] = lambda *_: PassedOn()
_OPTIONS: Final[dict[str, Any]] = {"echo_interval_seconds": 0.2, "echo_timeout_seconds": 8.0}
_OVERLAP_SECONDS: Final = 0.05
"""How long each request takes at least, so that several at once reach several workers."""


def load() -> str:
    return Path(os.environ["SOURCE"]).read_text()


class Catalogue(CacheInvalidationMixin):
    namespace = NAMESPACE

    def __init__(self) -> None:
        cache = TTLCache[str, Any](maxsize=100, ttl=3_600)
        super().__init__(
            os.environ["REDIS"],
            cache=cache,
            max_staleness_seconds=BOUND_SECONDS,
            when_incoherent="serve",  # nothing but HTTP can reach it while Redis is away
            **_OPTIONS,
        )


def described(subscriber: Subscriber, value: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "replica": subscriber.replica_id, "state": subscriber.state, "value": value}


def new_asgi() -> FastAPI:
    """Built where the module is imported, e.g. in a master; started in each worker, by its lifespan."""
    catalogue = Catalogue()
    app = FastAPI(lifespan=catalogue.lifespan)
    app.include_router(catalogue.router)

    @app.get("/")
    def read() -> dict[str, Any]:
        time.sleep(_OVERLAP_SECONDS)
        return described(catalogue.subscriber, catalogue.get_or_load_sync(KEY, load))

    return app


def new_wsgi() -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    """Started where the module is imported: in a master that preloads, before it forks."""
    cache, subscriber = new_subscriber()
    endpoint = InvalidationEndpoint(subscriber)
    start(cache, subscriber)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            response = endpoint.post(body)
            status, document = f"{response.status_code} Posted", response.document
        else:
            time.sleep(_OVERLAP_SECONDS)
            status, document = "200 OK", described(subscriber, cache.get_or_load_sync(KEY, load))
        answer = json.dumps(document).encode()
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]

    return application


def new_subscriber() -> tuple[LocalCache, Subscriber]:
    cache = LocalCache(TTLCache(maxsize=100, ttl=3_600), max_staleness_seconds=BOUND_SECONDS, when_incoherent="serve")
    return cache, Subscriber(os.environ["REDIS"], caches={NAMESPACE: cache}, **_OPTIONS)


def start(cache: LocalCache, subscriber: Subscriber) -> None:
    subscriber.__enter__()
    cache.get_or_load_sync(KEY, load)


def new_celery() -> Any:
    import celery  # type: ignore[import-untyped]

    app = celery.Celery("products", broker=os.environ["REDIS"], backend=os.environ["REDIS"])
    app.conf.worker_hijack_root_logger = False
    cache, subscriber = new_subscriber()
    start(cache, subscriber)

    @app.task(name="read")  # type: ignore[untyped-decorator]
    def read() -> dict[str, Any]:
        time.sleep(_OVERLAP_SECONDS)
        return described(subscriber, cache.get_or_load_sync(KEY, load))

    @app.task(name="end")  # type: ignore[untyped-decorator]
    def end() -> None:
        raise SystemExit

    return app


def __getattr__(name: str) -> Any:
    """Make `asgi`, `wsgi` or `celery` when a server first looks for it: importing this module starts nothing."""
    makers: dict[str, Callable[[], Any]] = {"asgi": new_asgi, "wsgi": new_wsgi, "celery_app": new_celery}
    if name not in makers:
        raise AttributeError(name)
    made = globals()[name] = makers[name]()
    return made

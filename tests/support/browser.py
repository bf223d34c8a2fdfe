"""A real browser in front of a real publisher, and replicas in processes of their own."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

from cachetools import TTLCache
from tests.support.called_replicas import NETWORKS, SERVICE, TOKEN, called
from tests.support.paths import ROOT
from tests.support.registry import make_registry_old, make_registry_old_sync
from tests.support.replicas import FAST, fill

from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.server import new_server
from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.process.serving import listen, url_of
from broadcache.shared.transport.redis.embedded import dying_with_us
from broadcache.subscriber import LocalCache, Subscriber

T = TypeVar("T")

CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS: Final = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def serving(redis_url: str, **settings: Any) -> Iterator[str]:
    """A publisher in a thread of its own, until the block ends. Yields its URL."""
    with listen("127.0.0.1", 0) as listener:
        is_ready = threading.Event()
        server = new_server(create_app(ApiSettings(redis_url=redis_url, **settings)), on_ready=is_ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert is_ready.wait(30)
            yield url_of("127.0.0.1", listener)
        finally:
            server.should_exit = True
            thread.join()


class Replica:
    """Made by `replica`."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        if sys.platform == "linux":
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def replica(
    url: str, namespace: str, name: str, *, max_staleness_seconds: float = 5.0, **options: Any
) -> Iterator[Replica]:
    """A replica that has one entry, `key`, from when it is coherent until the block ends. It never takes its leave."""
    chosen = {"replica_id": name, **FAST, **options}
    settings = {"url": url, "namespace": namespace, "bound": max_staleness_seconds, "options": chosen}
    command = dying_with_us((sys.executable, "-m", "tests.support.child_replica", json.dumps(settings)))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"coherent\n"
            make_registry_old_sync(url, namespace)
            yield Replica(process)
        finally:
            process.kill()


@contextmanager
def fleet(url: str, namespace: str, names: list[str], *, entries: int = 0) -> Iterator[None]:
    """Replicas that share a thread, from when all are coherent; when the block ends they leave in order."""
    with _in_a_thread(_fleet(url, namespace, names, entries)):
        yield


@contextmanager
def called_fleet(url: str) -> Iterator[dict[str, Any]]:
    """Replicas of `products` that can be told by HTTP, too. Yields the settings of a publisher that does."""
    with _in_a_thread(called(url)) as (_, port, nameserver):
        yield {
            "delivery": "redis-then-fanout",
            "fanout_service": f"{SERVICE}:{port}",
            "fanout_networks": NETWORKS,
            "fanout_nameservers": (nameserver,),
            "replica_token": TOKEN,
        }


@contextmanager
def _in_a_thread(living: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Hold what lives in an event loop of its own, until the block ends."""
    held: list[T] = []
    is_ready, is_over = threading.Event(), threading.Event()

    async def live() -> None:
        async with living as it:
            held.append(it)
            is_ready.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    try:
        assert is_ready.wait(30)
        yield held[0]
    finally:
        is_over.set()
        thread.join()


@asynccontextmanager
async def _fleet(url: str, namespace: str, names: list[str], entries: int) -> AsyncIterator[None]:
    options = {**FAST, "echo_interval_seconds": 0.5, "echo_timeout_seconds": 5.0}
    caches = [LocalCache(TTLCache(maxsize=max(10, entries), ttl=600)) for _ in names]
    async with AsyncExitStack() as stack:
        subscribers = [
            Subscriber(url, caches={namespace: cache}, replica_id=name, **options)
            for name, cache in zip(names, caches, strict=True)
        ]
        await asyncio.gather(*map(stack.enter_async_context, subscribers))
        await make_registry_old(url, namespace)
        for cache in caches:
            fill(cache, *(f"product:{number}" for number in range(entries)))
        yield

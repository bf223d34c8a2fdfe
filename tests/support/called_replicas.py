"""Replicas behind a web server, which can be told by HTTP and are named by DNS: the second path's other end."""

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from cachetools import TTLCache
from fastapi import FastAPI
from tests.support.dns_server import DnsServer
from tests.support.replicas import FAST
from tests.support.waiting import until
from tests.support.web_server import web_server

from broadcache.publisher import Fanout
from broadcache.subscriber import CacheInvalidationMixin

HOSTS: Final = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
SERVICE: Final = "web.test"
NETWORKS: Final = ("127.0.0.0/8",)
TOKEN: Final = "swordfish"


class Replica(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, url: str, name: str) -> None:
        super().__init__(
            url,
            cache=TTLCache(maxsize=100, ttl=600),
            when_incoherent="serve",  # nothing but HTTP can tell it while Redis is away
            replica_id=name,
            replica_token=TOKEN,
            **FAST,
        )


@asynccontextmanager
async def fleet(url: str) -> AsyncIterator[tuple[list[Replica], Fanout]]:
    """Three replicas that `SERVICE` names, from when they are coherent, and what calls them."""
    async with called(url) as (replicas, port, nameserver):
        yield (
            replicas,
            Fanout(SERVICE, port, token=TOKEN, networks=NETWORKS, nameservers=[nameserver]),
        )


@asynccontextmanager
async def called(url: str) -> AsyncIterator[tuple[list[Replica], int, str]]:
    """The same three, the port on which all are called, and the name server that knows them."""
    async with AsyncExitStack() as stack:
        dns = await stack.enter_async_context(DnsServer())
        dns.a(SERVICE, *HOSTS)
        with socket.create_server((HOSTS[0], 0)) as free:
            port = free.getsockname()[1]
        replicas = [Replica(url, f"web-{number}") for number in range(len(HOSTS))]
        for replica, host in zip(replicas, HOSTS, strict=True):
            app = FastAPI(lifespan=replica.lifespan)
            app.include_router(replica.router)
            await stack.enter_async_context(web_server(app, host=host, port=port))
        await until(lambda: all(replica.subscriber.state == "coherent" for replica in replicas), "a coherent fleet")
        yield replicas, port, dns.address

"""An application behind the web server that users run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from fastapi import FastAPI
from uvicorn import Server

from broadcache.publisher.api.server import new_server
from broadcache.shared.process.serving import listen


@asynccontextmanager
async def web_server(app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[tuple[int, Server]]:
    """Serve `app` until the block ends. Yields its port, a free one unless `port` says which."""
    with listen(host, port) as listener:
        is_ready = asyncio.Event()
        server = new_server(app, on_ready=is_ready.set)
        running = asyncio.create_task(server.serve([listener]))
        await is_ready.wait()
        try:
            yield listener.getsockname()[1], server
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of `app`, which is served until the block ends."""
    async with (
        web_server(app) as (port, _),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client,
    ):
        yield client

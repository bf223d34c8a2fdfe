"""The response to GET /events: it continues until the client disconnects or the publisher shuts down."""

import asyncio
import logging
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ....shared.invalidation import Position
from ..documents.problems import STREAMS_EXHAUSTED, Problem
from ..responses import problem_response
from .hub import Client, Hub, HubFull

__all__ = ["EventStream"]

_RETRY_AFTER_SECONDS: Final = 5
_RECONNECT_MS: Final = 1_000
_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    # Proxies such as nginx would buffer events until a buffer is full.
    (b"x-accel-buffering", b"no"),
]

logger: logging.Logger = logging.getLogger("broadcache.publisher")


class EventStream(Response):
    """Sends one client its events. It joins the hub when the response begins, and leaves it when the response ends."""

    def __init__(self, hub: Hub, namespace: str, *, after: Position | None) -> None:
        super().__init__()
        self._hub = hub
        self._namespace = namespace
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client disconnects or is too slow, or until the hub closes."""
        try:
            async with self._hub.client(self._namespace, self._after) as client:
                await _send_until_gone(client, receive, send)
        except HubFull as error:
            headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
            problem = Problem(STREAMS_EXHAUSTED, str(error), headers=headers)
            await problem_response(problem)(scope, receive, send)


async def _send_until_gone(client: Client, receive: Receive, send: Send) -> None:
    tasks = [
        asyncio.create_task(_send_events(client, send), name="broadcache events to a client"),
        asyncio.create_task(_disconnected(receive), name="broadcache events until a client disconnects"),
        asyncio.create_task(client.is_cut.wait(), name="broadcache events until a client is cut"),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if client.is_cut.is_set():
        logger.warning("disconnected a client of GET /events that did not read its events in time")
    if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
        raise results[0]


async def _send_events(client: Client, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await _send_chunk(client, send, b"retry: %d\n\n" % _RECONNECT_MS)
    while (chunk := await client.next()) is not None:
        await _send_chunk(client, send, chunk)
    await send({"type": "http.response.body", "body": b""})


async def _send_chunk(client: Client, send: Send, chunk: bytes) -> None:
    client.is_sending = True
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
    client.is_sending = False


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

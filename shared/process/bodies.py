"""Bodies of HTTP requests: read up to a limit, and given up when the server shuts down."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import msgspec

from .problems import PROBLEM_MEDIA_TYPE, BasicProblem, problem_type

__all__ = ["UnfinishedBodies", "read_at_most"]

_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]

_SHUTTING_DOWN: Final = BasicProblem(
    type=problem_type("shutting-down"),
    title="The server is shutting down",
    status=503,
    detail="expected the whole body of the request, got a part of it when the server began to shut down; nothing of it "
    "was processed: send the request again",
)


async def read_at_most(chunks: AsyncIterable[bytes], bytes_max: int) -> bytes:
    """Join `chunks`; stop reading as soon as they exceed `bytes_max`.

    Shape: a body that is too long is returned as its first `bytes_max + 1` bytes.
    """
    kept: list[bytes] = []
    left_bytes = bytes_max + 1
    async for chunk in chunks:
        kept.append(chunk[:left_bytes])
        left_bytes -= len(chunk)
        if left_bytes <= 0:
            break
    return b"".join(kept)


class UnfinishedBodies:
    """ASGI middleware that does not wait for the rest of a body once the server shuts down, and answers 503.

    The application below learns that its client has gone, and has processed nothing: half a body has no meaning. A
    request whose body is complete is not affected.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._is_ending = False
        self._waiting: set[asyncio.Timeout] = set()

    def end(self) -> None:
        """Give up all bodies that are not complete, and those of later requests unless they have arrived already."""
        self._is_ending = True
        for limit in self._waiting:
            limit.reschedule(0)

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_complete = is_given_up = has_begun = False

        async def received() -> _Message:
            nonlocal is_complete, is_given_up
            if is_complete:  # what is left to receive is the client's disconnection
                return await receive()
            limit = asyncio.timeout(0 if self._is_ending else None)
            try:
                async with limit:
                    self._waiting.add(limit)
                    message = await receive()
            except TimeoutError:
                if not limit.expired():
                    raise
                is_given_up = True
                return {"type": "http.disconnect"}
            finally:
                self._waiting.discard(limit)
            is_complete = not message.get("more_body", False)
            return message

        async def sent(message: _Message) -> None:
            nonlocal has_begun
            if is_given_up and not has_begun:
                return  # the answer to a client that has gone: this one has not
            has_begun = True
            await send(message)

        await self._app(scope, received, sent)
        if is_given_up and not has_begun:
            await _send_problem(send)


async def _send_problem(send: _Send) -> None:
    body = msgspec.json.encode(_SHUTTING_DOWN)
    headers = [
        (b"content-type", PROBLEM_MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": _SHUTTING_DOWN.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""One exchange on the wire: HTTP/1.1 by h11, over a connection of its own."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final, cast

import h11

from .exchange import Header, HttpResponse, Untold

__all__ = ["Http1"]

_HEAD_BYTES_MAX: Final = 65_536
# Of these an absent Content-Length says that there is no body; of all others a body of no bytes is said to be one.
_BODILESS: Final = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"})


class Http1(asyncio.Protocol):
    """Writes the request as soon as there is a connection, and reads until the answer is whole, or large enough.

    Raises: Untold when the request cannot be written as HTTP/1.1.
    """

    def __init__(
        self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes, answer_bytes_max: int
    ) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
        try:
            self._request = self._written(method, target, headers, body)
        except h11.LocalProtocolError as error:
            raise Untold(f"the request cannot be sent: {error}", may_be_repeated=False) from None
        self.answer: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
        self._answer_bytes_max = answer_bytes_max
        self._transport: asyncio.Transport | None = None
        self._is_sent = False
        self._response: h11.Response | None = None
        self._body = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        # Other event loops have transports that are no subclass of this one.
        self._transport = cast("asyncio.Transport", transport)
        self._is_sent = True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Read on, until the answer is whole or large enough."""
        if self.answer.done():
            return
        try:
            self._http.receive_data(data)
            self._read()
        except h11.RemoteProtocolError as error:
            self._fail(f"the answer is not HTTP/1.1: {error}")

    def eof_received(self) -> None:
        """End the answer, if its head has come."""
        self._read_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer likewise."""
        self._read_end()

    def answer_so_far(self, time: str) -> HttpResponse:
        """Return the answer of which at least the head has come in this time. Raises: Untold."""
        if self._response is None:
            missing = "answer" if self._is_sent else "connection"
            raise Untold(f"no {missing} {time}", may_be_repeated=not self._is_sent)
        return self._answered(self._response)

    def close(self) -> None:
        """Give up the connection."""
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()  # no caller waits for it any more
        if self._transport is not None:
            self._transport.abort()

    def _written(self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes) -> bytes:
        framed = [*headers, (b"Connection", b"close")]
        if body or method not in _BODILESS:
            framed.append((b"Content-Length", b"%d" % len(body)))
        events: list[h11.Event] = [h11.Request(method=method, target=target, headers=framed)]
        if body:
            events.append(h11.Data(data=body))
        return b"".join(self._http.send(event) or b"" for event in (*events, h11.EndOfMessage()))

    def _read(self) -> None:
        while True:
            match self._http.next_event():
                case h11.Response() as response:
                    self._response = response
                case h11.Data(data=data):
                    self._body += data
                    if len(self._body) >= self._answer_bytes_max:
                        break
                case h11.InformationalResponse():
                    pass
                case h11.EndOfMessage():
                    break
                case _:
                    return
        if self._response is not None:
            self.answer.set_result(self._answered(self._response))

    def _read_end(self) -> None:
        if self.answer.done():
            return
        with contextlib.suppress(h11.RemoteProtocolError):
            self._http.receive_data(b"")
            self._read()
        if self.answer.done():
            return
        if self._response is not None:
            self.answer.set_result(self._answered(self._response))
        else:
            self._fail("the connection was closed before the answer")

    def _answered(self, response: h11.Response) -> HttpResponse:
        retry_after = next((value for name, value in response.headers if name == b"retry-after"), b"")
        return HttpResponse(
            response.status_code,
            bytes(self._body[: self._answer_bytes_max]),
            float(retry_after) if retry_after.isdigit() and len(retry_after) < 10 else None,
        )

    def _fail(self, why: str) -> None:
        self.answer.set_exception(Untold(why, may_be_repeated=not self._is_sent))

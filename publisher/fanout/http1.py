"""One HTTP/1.1 request and its response on one connection, as an asyncio protocol over h11."""

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Final, cast

import h11

from .response import Header, HttpResponse, NoResponse

__all__ = ["Http1"]

_HEAD_BYTES_MAX: Final = 65_536
# With these methods a missing Content-Length means no body; with all others an empty body is declared as such.
_BODILESS: Final = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"})


class Http1(asyncio.Protocol):
    """Writes the request once connected, and reads until the response is complete or has reached its size limit.

    Shape:  `response` is done when the response is, or raises NoResponse.
    Raises: NoResponse when the request cannot be written as HTTP/1.1.
    """

    def __init__(
        self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes, answer_bytes_max: int
    ) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
        try:
            self._request = self._serialized(method, target, headers, body)
        except h11.LocalProtocolError as error:
            # The text quotes the header or the target, which may contain a token.
            problem = re.split(r" b['\"]", str(error))[0]
            why = f"the request cannot be sent: {problem}"
            raise NoResponse(why, result="failed", may_be_repeated=False) from None
        self.response: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
        self._answer_bytes_max = answer_bytes_max
        self._transport: asyncio.Transport | None = None
        self._is_sent = False
        self._head: h11.Response | None = None
        self._body = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        # Transports of other event loops need not be subclasses of asyncio.Transport.
        self._transport = cast("asyncio.Transport", transport)
        self._is_sent = True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Parse until the response is complete or has reached its size limit."""
        if self.response.done():
            return
        try:
            self._http.receive_data(data)
            self._parse()
        except h11.RemoteProtocolError as error:
            self._fail(f"the answer is not HTTP/1.1: {error}")

    def eof_received(self) -> None:
        """End the response."""
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the response."""
        self._end()

    def response_after(self, timeout_seconds: float) -> HttpResponse:
        """Return the response as far as it has arrived in this time, at least its head. Raises: NoResponse."""
        if self._head is None:
            why = f"no {'answer' if self._is_sent else 'connection'} within {timeout_seconds:.3g} s"
            raise NoResponse(why, result="timeout", may_be_repeated=not self._is_sent)
        return self._response_of(self._head)

    def close(self) -> None:
        """Drop the connection."""
        if not self.response.cancel() and not self.response.cancelled():
            self.response.exception()  # retrieved: no caller awaits it any more
        if self._transport is not None:
            self._transport.abort()

    def _serialized(self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes) -> bytes:
        framed = [*headers, (b"Connection", b"close")]
        if body or method not in _BODILESS:
            framed.append((b"Content-Length", b"%d" % len(body)))
        events: list[h11.Event] = [h11.Request(method=method, target=target, headers=framed)]
        if body:
            events.append(h11.Data(data=body))
        return b"".join(self._http.send(event) or b"" for event in (*events, h11.EndOfMessage()))

    def _parse(self) -> None:
        while True:
            match self._http.next_event():
                case h11.Response() as head:
                    self._head = head
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
        if self._head is not None:
            self.response.set_result(self._response_of(self._head))

    def _end(self) -> None:
        """Accept the response if its head has arrived: the connection yields no more."""
        if self.response.done():
            return
        with contextlib.suppress(h11.RemoteProtocolError):
            self._http.receive_data(b"")
            self._parse()
        if self.response.done():
            return
        if self._head is not None:
            self.response.set_result(self._response_of(self._head))
        else:
            self._fail("the connection was closed before the answer")

    def _response_of(self, head: h11.Response) -> HttpResponse:
        retry_after = next((value for name, value in head.headers if name == b"retry-after"), b"")
        return HttpResponse(
            head.status_code,
            bytes(self._body[: self._answer_bytes_max]),
            float(retry_after) if retry_after.isdigit() and len(retry_after) < 10 else None,
        )

    def _fail(self, why: str) -> None:
        self.response.set_exception(NoResponse(why, result="failed", may_be_repeated=not self._is_sent))

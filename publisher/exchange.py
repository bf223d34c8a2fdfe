"""One request to one address, and what came of it: a connection of its own, HTTP/1.1, and no cleverness.

No redirect is followed, no cookie kept, no proxy of the environment asked, and nothing is sent twice. The address is
dialled as it was given: no name is looked up here.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import h11

__all__ = ["Answer", "Header", "Tls", "Untold", "exchange"]

Header = tuple[bytes, bytes]

_HEAD_BYTES_MAX: Final = 65_536


class Answer(NamedTuple):
    """What an address answered.

    Shape:  `body` is what came of it, no more than was wanted. `retry_after` is that header, if it was one number of
            seconds.
    """

    status_code: int
    body: bytes
    retry_after_seconds: float | None


class Tls(NamedTuple):
    """How to encrypt, and for which name the certificate has to be."""

    context: ssl.SSLContext
    server_name: str


class Untold(Exception):
    """There is no answer. `may_be_repeated` when not one byte had been sent: nobody can have acted on it."""

    def __init__(self, why: str, *, may_be_repeated: bool) -> None:
        super().__init__(why)
        self.may_be_repeated: Final = may_be_repeated


async def exchange(
    host: str,
    port: int,
    *,
    method: bytes,
    target: bytes,
    headers: Sequence[Header],
    body: bytes,
    tls: Tls | None,
    connect_timeout_seconds: float,
    timeout_seconds: float,
    answer_bytes_max: int,
) -> Answer:
    """Send one request to `host`, an IP literal, and return the answer.

    Shape:  `headers` are complete but for Content-Length, which is added, and Connection.
    Units:  `timeout_seconds` includes connecting. An answer whose head has come counts although its body does not end.
    Raises: Untold.
    """
    try:
        protocol = _Exchange(method, target, headers, body, answer_bytes_max)
    except h11.LocalProtocolError as error:
        raise Untold(f"the request cannot be sent: {error}", may_be_repeated=False) from None
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_seconds):
            try:
                async with asyncio.timeout(connect_timeout_seconds):
                    await loop.create_connection(
                        lambda: protocol,
                        host,
                        port,
                        ssl=tls and tls.context,
                        server_hostname=tls and tls.server_name,
                    )
            except TimeoutError:
                raise Untold(f"no connection within {connect_timeout_seconds:.3g} s", may_be_repeated=True) from None
            except ssl.SSLError as error:
                raise Untold(f"TLS failed: {error}", may_be_repeated=False) from None
            except ConnectionRefusedError:
                raise Untold("connection refused", may_be_repeated=True) from None
            except OSError as error:
                raise Untold(f"cannot connect: {error.strerror or error}", may_be_repeated=True) from None
            return await protocol.answer
    except TimeoutError:
        return protocol.answer_so_far(f"within {timeout_seconds:.3g} s")
    finally:
        protocol.close()


class _Exchange(asyncio.Protocol):
    """Writes the request as soon as there is a connection, and reads until the answer is whole, or large enough."""

    def __init__(
        self, method: bytes, target: bytes, headers: Sequence[Header], body: bytes, answer_bytes_max: int
    ) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._request = self._written(method, target, headers, body)
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answer_bytes_max = answer_bytes_max
        self._transport: asyncio.Transport | None = None
        self._is_sent = False
        self._response: h11.Response | None = None
        self._body = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Other event loops have transports that are no subclass of this one.
        self._transport = cast("asyncio.Transport", transport)
        self._is_sent = True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.answer.done():
            return
        try:
            self._http.receive_data(data)
            self._read()
        except h11.RemoteProtocolError as error:
            self._fail(f"the answer is not HTTP/1.1: {error}")

    def eof_received(self) -> None:
        self._read_end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_end()

    def answer_so_far(self, time: str) -> Answer:
        """Return the answer of which at least the head has come in this time. Raises: Untold."""
        if self._response is None:
            missing = "answer" if self._is_sent else "connection"
            raise Untold(f"no {missing} {time}", may_be_repeated=not self._is_sent)
        return self._answered(self._response)

    def close(self) -> None:
        """Give up the connection."""
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()  # one that nobody waited for any more
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

    def _answered(self, response: h11.Response) -> Answer:
        retry_after = next((value for name, value in response.headers if name == b"retry-after"), b"")
        return Answer(
            response.status_code,
            bytes(self._body[: self._answer_bytes_max]),
            float(retry_after) if retry_after.isdigit() and len(retry_after) < 10 else None,
        )

    def _fail(self, why: str) -> None:
        self.answer.set_exception(Untold(why, may_be_repeated=not self._is_sent))


# Of these an absent Content-Length says that there is no body; of all others a body of no bytes is said to be one.
_BODILESS: Final = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"})

"""One request to one address, and what came of it: a connection of its own, HTTP/1.1, and no cleverness.

No redirect is followed, no cookie kept, no proxy of the environment asked, and nothing is sent twice. The address is
dialled as it was given: no name is looked up here.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["Header", "HttpResponse", "Tls", "Untold", "exchange"]

Header = tuple[bytes, bytes]


class HttpResponse(NamedTuple):
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
) -> HttpResponse:
    """Send one request to `host`, an IP literal, and return the answer.

    Shape:  `headers` are complete but for Content-Length, which is added, and Connection.
    Units:  `timeout_seconds` includes connecting. An answer whose head has come counts although its body does not end.
    Raises: Untold.
    """
    from .http1 import Http1  # h11 is in an extra: what needs none of it can be imported without

    protocol = Http1(method, target, headers, body, answer_bytes_max)
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

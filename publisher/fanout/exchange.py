"""One HTTP/1.1 request to one address, over a connection of its own.

It follows no redirect, keeps no cookie, uses no proxy of the environment and never sends twice. It connects to the IP
address as given, and looks no name up.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import NamedTuple

from .response import Header, HttpResponse, NoResponse

__all__ = ["Tls", "exchange"]


class Tls(NamedTuple):
    """How to encrypt, and the name that the certificate must be for."""

    context: ssl.SSLContext
    server_name: str


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
    """Send one request to `host`, an IP literal, and return the response.

    Shape:  `headers` are complete except for Content-Length and Connection, which are added.
    Units:  `timeout_seconds` includes connecting. A response counts once its head has arrived, even if its body does
            not end in time.
    Raises: NoResponse.
    """
    from .http1 import Http1  # h11 is in an extra: without it, this module can still be imported

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
                why = f"no connection within {connect_timeout_seconds:.3g} s"
                raise NoResponse(why, result="timeout", may_be_repeated=True) from None
            except ssl.SSLError as error:
                raise NoResponse(f"TLS failed: {error}", result="failed", may_be_repeated=False) from None
            except ConnectionRefusedError:
                raise NoResponse("connection refused", result="refused", may_be_repeated=True) from None
            except OSError as error:
                why = f"cannot connect: {error.strerror or error}"
                raise NoResponse(why, result="failed", may_be_repeated=True) from None
            return await protocol.response
    except TimeoutError:
        return protocol.response_after(timeout_seconds)
    finally:
        protocol.close()

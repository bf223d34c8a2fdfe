"""The source over HTTP: reads the values that an audit compares with those of the replicas."""

import asyncio
import http.client
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec

from ...shared.clock import Clock, monotonic
from ...shared.errors import InvalidSettings

__all__ = ["READS_MAX", "VALUE_BYTES_MAX", "SourceLookup", "check_source_url", "source_at"]

SourceLookup: TypeAlias = Callable[[str], Awaitable[Any]]
"""Reads the value of a key from the source of the replicas. Raises LookupError if the key has none."""

READS_MAX: Final = 8
"""How many reads of one source are under way at once."""
VALUE_BYTES_MAX: Final = 4 * 1024 * 1024
"""How long a value may be as JSON. A longer one counts as a source that cannot be read."""
_READ_SECONDS: Final = 5.0
_CHUNK_BYTES: Final = 65_536


def check_source_url(template: str) -> str:
    """Return `template` if it is http://… or https://… with {key} after the host. Raises: InvalidSettings."""
    if not _is_source_url(template):
        raise InvalidSettings(
            "expected http://…/{key}, with {key} behind the host and without user and password, got something else "
            "(not shown, since it may contain a secret)"
        )
    return template


def source_at(template: str, namespace: str) -> SourceLookup:
    """Return a lookup that GETs a key's JSON value from the URL of `template`; 404 and 410 mean that there is none.

    Redirects are not followed. A value has at most `VALUE_BYTES_MAX` bytes, and arrives within 5 s.

    Shape:  {key} and {namespace} in `template` are replaced, percent-encoded.
    Raises: InvalidSettings.
    """
    template = check_source_url(template).replace("{namespace}", quote(namespace, safe=""))
    # Its own threads: a source that hangs must not occupy the event loop's default pool, which resolves names.
    threads = ThreadPoolExecutor(READS_MAX, thread_name_prefix="broadcache-audit-source")

    async def read(key: str) -> Any:
        url = template.replace("{key}", quote(key, safe=""))
        return await asyncio.get_running_loop().run_in_executor(threads, _get, url)

    return read


def _is_source_url(template: str) -> bool:
    try:
        url = urlsplit(template)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    # A key may choose the path of the request, never its host.
    return is_url and not {"{", "@"} & {*url.netloc} and "{key}" in url.path + "?" + url.query


def _get(url: str, *, clock: Clock = monotonic) -> Any:
    """Return the JSON value at `url`. Raises: LookupError if there is none, OSError, ValueError."""
    ends_at = clock() + _READ_SECONDS
    # No proxy of the environment; and no redirect, because a key must not lead to another host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    try:
        with opener.open(url, timeout=_READ_SECONDS) as response:
            return msgspec.json.decode(_read(response, lambda: ends_at - clock()))
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                raise LookupError(url) from None
            if 300 <= error.code < 400:
                raise ValueError(
                    f"expected a value, got a redirect ({error.code}), which is not followed; give the URL that it "
                    "leads to"
                ) from None
            raise


def _read(response: http.client.HTTPResponse, seconds_left: Callable[[], float]) -> bytes:
    """Read a body in bounded space and time. Raises: ValueError, TimeoutError."""
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > VALUE_BYTES_MAX:
            raise ValueError(f"expected a value of at most {VALUE_BYTES_MAX} bytes, got more; leave its key out")
        if seconds_left() <= 0:
            raise TimeoutError(f"expected the whole value within {_READ_SECONDS:g} s, got {len(body)} bytes")
    if response.length:  # `read1` does not report a connection that was cut
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None

"""The source over HTTP: reads the values that an audit compares with those of the replicas."""

import asyncio
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec

from ...shared.errors import InvalidSettings

__all__ = ["READS_MAX", "SourceLookup", "check_source_url", "source_at"]

SourceLookup: TypeAlias = Callable[[str], Awaitable[Any]]
"""Reads the value of a key from the source of the replicas. Raises LookupError if the key has none."""

READS_MAX: Final = 8
"""How many reads of one source are under way at once."""
_READ_SECONDS: Final = 5.0


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


def _get(url: str) -> Any:
    """Return the JSON value at `url`. Raises: LookupError if there is none, OSError, ValueError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_READ_SECONDS) as response:
            return msgspec.json.decode(response.read())
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                raise LookupError(url) from None
            raise

"""Requests that a browser sends for a web page of another site."""

from collections.abc import Iterable
from urllib.parse import urlsplit

__all__ = ["is_cross_site"]


def is_cross_site(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a browser sent the request for a web page of another site.

    Browsers send Sec-Fetch-Site, but not to plain HTTP addresses; there, Origin is compared with Host.

    Shape:  `headers` are those of an ASGI scope: their names are in lower case.
    """
    given = [(name, value.decode("latin-1")) for name, value in headers]
    if sites := [value for name, value in given if name == b"sec-fetch-site"]:
        return not set(sites) <= {"same-origin", "none"}
    host = next((value.lower() for name, value in given if name == b"host"), "")
    return any(_netloc_of(value) != host for name, value in given if name == b"origin")


def _netloc_of(url: str) -> str | None:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None

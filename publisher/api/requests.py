"""Checks of a request's headers, and its body as bytes."""

import re
from typing import Final

from starlette.requests import Request

from ...shared.process.bodies import read_at_most
from ...shared.process.cross_site import is_cross_site
from .documents.problems import (
    BODY_TOO_LARGE,
    CROSS_SITE,
    IDEMPOTENCY_KEY_INVALID,
    MEDIA_TYPE_UNSUPPORTED,
    Problem,
)

__all__ = ["check_is_json", "check_is_same_site", "idempotency_key_of", "read_body"]

_IDEMPOTENCY_KEY: Final = re.compile(r"[ -~]{1,255}", re.ASCII)


def check_is_json(request: Request) -> None:
    """Raises: Problem when Content-Type is not JSON.

    This also keeps out web pages of other origins: browsers send this type only after a preflight, which fails here.
    """
    media_type = request.headers.get("content-type", "")
    if media_type != "application/json":
        name, _, parameters = media_type.partition(";")
        charset = parameters.strip().lower().replace('"', "")
        if name.strip().lower() != "application/json" or charset not in {"", "charset=utf-8"}:
            raise Problem(
                MEDIA_TYPE_UNSUPPORTED,
                f"expected Content-Type: application/json, got {media_type!r:.100}; send JSON in UTF-8",
            )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Problem(
            MEDIA_TYPE_UNSUPPORTED,
            f"expected a body without Content-Encoding, got {encoding!r:.100}; send it uncompressed",
            headers={"Accept-Encoding": "identity"},
        )


def check_is_same_site(request: Request) -> None:
    """Raises: Problem when a browser sent the request for a web page of another site."""
    if is_cross_site(request.headers.raw):
        raise Problem(CROSS_SITE)


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Read the body, up to `bytes_max`. Raises: Problem; ClientDisconnect."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > bytes_max:
        raise _too_large(bytes_max)
    body = await read_at_most(request.stream(), bytes_max)
    if len(body) > bytes_max:
        raise _too_large(bytes_max)
    return body


def _too_large(bytes_max: int) -> Problem:
    return Problem(
        BODY_TOO_LARGE,
        f"expected a body of at most {bytes_max} bytes, got more; send several requests, or use a tag or a prefix",
    )


def idempotency_key_of(request: Request) -> str | None:
    """Return the request's Idempotency-Key; None when it has none. Raises: Problem."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1:
        raise Problem(IDEMPOTENCY_KEY_INVALID, f"expected one Idempotency-Key, got {len(keys)}; send the header once")
    if not _IDEMPOTENCY_KEY.fullmatch(keys[0]):
        raise Problem(
            IDEMPOTENCY_KEY_INVALID,
            f"expected an Idempotency-Key of 1 to 255 printable ASCII characters, got {len(keys[0])} characters "
            f"{keys[0]!r:.60}; send a UUID, for example",
        )
    return keys[0]

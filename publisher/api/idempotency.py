"""Idempotency keys: each is scoped to its caller, and determines the id of one invalidation."""

import asyncio
import functools
import hashlib
import logging
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from ...shared.clock import Clock, monotonic
from ...shared.process.tokens import Tokens

__all__ = ["KEYS_MAX", "KeyLifetimes", "Scopes", "id_of"]

KEYS_MAX: Final = 100_000
"""How many keys of one caller are remembered for the whole lifetime: some 20 MB of receipts in Redis."""

logger: logging.Logger = logging.getLogger("broadcache.publisher")

_SALT: Final = b"broadcache: the scope of a token"


class Scopes:
    """Separates callers, so that a key used by one never suppresses the invalidation of another.

    A caller is identified by its token. Without tokens, all callers share the scope `source`.
    """

    def __init__(self, tokens: Tokens, *, source: str) -> None:
        self._tokens = tokens
        self._source = source

    async def scope_of(self, request: Request) -> str:
        """Return the scope of the request's caller: the same in every process, and after a restart."""
        header = request.headers.get("authorization", "").encode("latin-1")
        digest = self._tokens.digest_of_header(header)
        if digest is None:
            return self._source
        return await asyncio.to_thread(_scope_of_token, digest)


class KeyLifetimes:
    """Decides how long the receipt of a key is kept, so that no caller can fill Redis with receipts.

    A caller may use `keys_max` keys at once, and as many again in each lifetime, evenly. Redis then holds less than
    twice as many of this caller, from this process. Keys beyond that are remembered as briefly as other ids.

    Units:  `seconds` is the lifetime.
    """

    def __init__(self, seconds: float, *, keys_max: int = KEYS_MAX, clock: Clock = monotonic) -> None:
        self._seconds = seconds
        self._keys_max = keys_max
        self._clock = clock
        self._left: dict[str, _Left] = {}

    def seconds_for(self, scope: str) -> float | None:
        """Return the lifetime of one more key of this caller, or None for that of ids without a key."""
        now = self._clock()
        left = self._left.setdefault(scope, _Left(self._keys_max, now))
        left.count = min(self._keys_max, left.count + (now - left.at) * self._keys_max / self._seconds)
        left.at = now
        if left.count >= 1:
            left.count -= 1
            left.is_reported = left.is_reported and left.count < self._keys_max / 2
            return self._seconds
        if not left.is_reported:
            left.is_reported = True
            logger.warning(
                "one caller has used more than %d Idempotency-Keys within %g s: further ones are kept for a short time "
                "only, until it uses fewer",
                self._keys_max,
                self._seconds,
            )
        return None


@dataclass(slots=True)
class _Left:
    """How many keys a caller had left at a time."""

    count: float
    at: float
    is_reported: bool = False


def id_of(scope: str, namespace: str, idempotency_key: str) -> str:
    """Return the id of the invalidation for this caller's key.

    Ids are in the log and on the channel. An id reveals neither its key nor its caller.
    """
    key = hashlib.sha256(scope.encode()).digest()
    return hashlib.blake2b(f"{namespace} {idempotency_key}".encode(), key=key, digest_size=20).hexdigest()


@functools.lru_cache(maxsize=256)
def _scope_of_token(digest: bytes) -> str:
    """Return a name for a token, from which a short token cannot be guessed cheaply.

    Ids and the keys of receipts are derived from the scope, and a Redis user with read rights sees them. A plain hash
    would let such a user try millions of tokens a second, so this one takes some 50 ms and 16 MiB. Its salt is fixed,
    because all processes have to agree on the scope.
    """
    return "token " + hashlib.scrypt(digest, salt=_SALT, n=2**14, r=8, p=1, dklen=32).hex()

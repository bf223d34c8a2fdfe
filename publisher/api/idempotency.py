"""Idempotency keys: each is scoped to its caller, and determines the id of one invalidation."""

import asyncio
import functools
import hashlib
from typing import Final

from starlette.requests import Request

from ...shared.process.tokens import Tokens

__all__ = ["Scopes", "id_of"]

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

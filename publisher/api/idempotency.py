"""Idempotency keys: each belongs to the caller that chose it, and stands for the id of one invalidation."""

import asyncio
import functools
import hashlib
from typing import Final

from starlette.requests import Request

from ...shared.process.tokens import Tokens

__all__ = ["Scopes", "id_of"]

_SALT: Final = b"broadcache: the scope of a token"


class Scopes:
    """Tells callers apart, so that a key used by one of them never voids the invalidation of another.

    A caller is a token. Where the API takes no tokens, all callers are one, and its scope is `source`.
    """

    def __init__(self, tokens: Tokens, *, source: str) -> None:
        self._tokens = tokens
        self._source = source

    async def scope_of(self, request: Request) -> str:
        """Return the scope of the request's caller. It is the same in every process, and after a restart."""
        header = request.headers.get("authorization", "").encode("latin-1")
        digest = self._tokens.digest_of_header(header)
        if digest is None:
            return self._source
        return await asyncio.to_thread(_scope_of_token, digest)


def id_of(scope: str, namespace: str, idempotency_key: str) -> str:
    """Return the id of the invalidation that this caller's key stands for.

    Ids are in the log and on the channel. None reveals its key, or who chose it.
    """
    key = hashlib.sha256(scope.encode()).digest()
    return hashlib.blake2b(f"{namespace} {idempotency_key}".encode(), key=key, digest_size=20).hexdigest()


@functools.lru_cache(maxsize=256)
def _scope_of_token(digest: bytes) -> str:
    """Return a name for a token, from which a short token cannot be guessed cheaply.

    A user with read rights on Redis sees what is derived from the scope: ids, and the keys of receipts. A plain hash
    would let such a user try millions of tokens a second, so this one takes some 50 ms and 16 MiB. Its salt is fixed:
    all processes have to agree on the scope.
    """
    return "token " + hashlib.scrypt(digest, salt=_SALT, n=2**14, r=8, p=1, dklen=32).hex()

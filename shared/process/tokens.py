"""Bearer tokens: several at a time, for rotation, each with the right to read or to read and write."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from ..errors import InvalidSettings

__all__ = ["Authorization", "Right", "Tokens"]

Right: TypeAlias = Literal["ro", "rw"]
"""`ro` permits reading (GET, HEAD), `rw` permits every request."""

# The characters of RFC 6750's b64token. None of them is a colon, so `ro:` can only be a right.
_GRAMMAR: Final = re.compile(r"(?:(?P<right>ro|rw):)?(?P<token>[A-Za-z0-9._~+/-]+=*)", re.ASCII)


class Authorization(NamedTuple):
    """The Authorization headers of one request, compared with the valid tokens.

    Shape:  `right` is what the request may do; None unless it has exactly one such header, with a valid bearer token.
            `headers` is how many it has.
    """

    right: Right | None
    headers: int


class Tokens:
    """The valid tokens.

    Shape:  each is `TOKEN` or `rw:TOKEN` (read and write) or `ro:TOKEN` (read only); without `has_rights`, each is
            `TOKEN`. `variable` is the setting that they come from; errors name it.
    Raises: InvalidSettings, which never shows a token.
    """

    def __init__(self, texts: Iterable[str], *, variable: str = "BROADCACHE_TOKENS", has_rights: bool = True) -> None:
        self._rights: Final[dict[bytes, Right]] = {}
        forms = "TOKEN, rw:TOKEN or ro:TOKEN, each" if has_rights else "tokens, each"
        for number, text in enumerate(texts, start=1):
            match = _GRAMMAR.fullmatch(text)
            if match is None or (match["right"] and not has_rights):
                raise InvalidSettings(
                    f"{variable}: expected {forms} of letters, digits and ._~+/-, but number {number} is different "
                    "(it is secret and not shown); correct it"
                )
            digest = _digest(match["token"].encode())
            if digest in self._rights:
                raise InvalidSettings(
                    f"{variable}: expected different tokens, but number {number} repeats an earlier one; remove it"
                )
            self._rights[digest] = "ro" if match["right"] == "ro" else "rw"

    def __len__(self) -> int:
        return len(self._rights)

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"

    def is_same(self, other: "Tokens") -> bool:
        """Whether both accept the same tokens with the same rights."""
        return self._rights == other._rights

    def authorize(self, headers: Iterable[tuple[bytes, bytes]]) -> Authorization:
        """Compare the Authorization header among `headers`, whose names are in lower case, with the tokens."""
        given = [value for name, value in headers if name == b"authorization"]
        digest = self.digest_of_header(given[0]) if len(given) == 1 else None
        return Authorization(None if digest is None else self._rights[digest], len(given))

    def digest_of_header(self, authorization: bytes) -> bytes | None:
        """Return the digest of the token in `Bearer TOKEN`; None without a valid token.

        The digest is as secret as the token: a short token can be guessed from it.
        """
        scheme, _, token = authorization.partition(b" ")
        return self._valid(token.strip()) if scheme.lower() == b"bearer" else None

    def _valid(self, token: bytes) -> bytes | None:
        """Return the digest of `token`; None when it is not valid.

        All tokens are compared, as digests and each in constant time, so that the duration reveals nothing about them.
        """
        digest = _digest(token)
        found: bytes | None = None
        for known in self._rights:
            if hmac.compare_digest(known, digest):
                found = known
        return found


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()

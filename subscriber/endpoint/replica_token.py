"""The token of a replica: callers need it to invalidate over HTTP."""

import os
from typing import Final

from ...shared.process.tokens import Tokens

__all__ = ["replica_tokens"]

_VARIABLE: Final = "BROADCACHE_REPLICA_TOKEN"


def replica_tokens(replica_token: str | None = None) -> Tokens:
    """Return the valid tokens: those between the commas of `replica_token`, else of BROADCACHE_REPLICA_TOKEN.

    Shape:  an empty text means no token; then every caller is accepted.
    Raises: InvalidSettings, which never shows a token.
    """
    text = (replica_token or os.environ.get(_VARIABLE) or "").strip()
    items = [item.strip() for item in text.split(",")] if text else []
    return Tokens(items, variable=_VARIABLE, has_rights=False)

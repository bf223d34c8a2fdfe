"""The settings of a replica's endpoint: which tokens it accepts, and whether it is open without one."""

import os
from collections.abc import Mapping
from typing import Final

from ...shared.errors import InvalidSettings
from ...shared.process.tokens import Tokens

__all__ = ["ALLOW_OPEN_VARIABLE", "TOKEN_VARIABLE", "replica_allow_open", "replica_tokens"]

TOKEN_VARIABLE: Final = "BROADCACHE_REPLICA_TOKEN"  # noqa: S105  (a name)
ALLOW_OPEN_VARIABLE: Final = "BROADCACHE_REPLICA_ALLOW_OPEN"

_TRUE: Final = frozenset({"true", "1"})
_FALSE: Final = frozenset({"false", "0", ""})


def replica_tokens(replica_token: str | None = None) -> Tokens:
    """Return the valid tokens: those between the commas of `replica_token`, else of BROADCACHE_REPLICA_TOKEN.

    Shape:  an empty text means no token; then only callers on this machine are accepted, unless `replica_allow_open`.
    Raises: InvalidSettings, which never shows a token.
    """
    text = (replica_token or os.environ.get(TOKEN_VARIABLE) or "").strip()
    items = [item.strip() for item in text.split(",")] if text else []
    return Tokens(items, variable=TOKEN_VARIABLE, has_rights=False)


def replica_allow_open(*, allow_open: bool | None = None, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether callers on other machines need no token: `allow_open`, else BROADCACHE_REPLICA_ALLOW_OPEN.

    Shape:  the variable is that of `environ`, by default of the process.
    Raises: InvalidSettings.
    """
    if allow_open is not None:
        if not isinstance(allow_open, bool):
            raise InvalidSettings(f"allow_open: expected True or False, got a {type(allow_open).__name__}")
        return allow_open
    text = (os.environ if environ is None else environ).get(ALLOW_OPEN_VARIABLE, "").strip().lower()
    if text not in _TRUE | _FALSE:
        raise InvalidSettings(
            f"{ALLOW_OPEN_VARIABLE}: expected true or false, got a different text (not shown, since it may be secret); "
            "correct it, or leave it out for false"
        )
    return text in _TRUE

"""An older version, which uses the names of database 0 in every database, and its scripts as they were."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest.mock import patch

from tests.support.paths import ROOT

from broadcache.shared.transport.redis import address, log
from broadcache.shared.transport.redis.log import Script
from broadcache.shared.transport.redis.names import Naming

__all__ = ["as_older_version", "without_guard"]

_OLDER: Final = ROOT / "tests" / "support" / "older"


def _script(file_name: str) -> Script:
    text = (_OLDER / file_name).read_bytes()
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


@contextmanager
def as_older_version() -> Iterator[None]:
    """Publishers and subscribers that are constructed in the block are those of an older version.

    Their scripts are those of tests/support/older, as long as the test runs them in another database than 0.
    """

    class OlderNaming(Naming):
        @property
        def has_older_names(self) -> str:  # type: ignore[override]
            return "is older"

    log._APPEND["is older"] = _script("append.lua")  # type: ignore[index]
    log._ECHO["is older"] = _script("echo.lua")  # type: ignore[index]
    with patch.object(address, "Naming", lambda *_: OlderNaming()):
        yield


@contextmanager
def without_guard() -> Iterator[None]:
    """The scripts of this version do not look at the names of older versions: for negative controls."""
    with (
        patch.dict(log._APPEND, {True: Script.read("append.lua")}),
        patch.dict(log._ECHO, {True: Script.read("echo.lua")}),
    ):
        yield

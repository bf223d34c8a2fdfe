"""The names of a namespace's keys and channels in Redis."""

import re
from functools import lru_cache
from typing import Final, NamedTuple

from ...invalidation import DEFAULT_NAMESPACE

__all__ = ["PREFIX_FORM", "Names", "Naming", "check_prefix", "names_of"]

_CHANNEL: Final = "cache-invalidation"
_PREFIX: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:/-]{0,62}[A-Za-z0-9])?")
PREFIX_FORM: Final = (
    "1 to 64 of the characters A-Z a-z 0-9 . _ - : /, the first and the last a letter or digit, without "
    f"{_CHANNEL}, e.g. staging or acme:staging"
)


class Names(NamedTuple):
    """The names of one namespace's keys and channels.

    The keys and the channels for confirmations and questions have `channel` as their hash tag, so that a cluster keeps
    them in one slot, and `channel` too where channels are sharded.
    """

    channel: str
    head: str
    log: str
    receipt_prefix: str
    registry: str
    presence_prefix: str
    confirmed: str
    question: str
    echo_prefix: str


class Naming(NamedTuple):
    """How the names of namespaces are formed: one naming for each database and prefix, since channels are global.

    Shape:  no two namings have a name in common. A prefix does not contain what comes after it, and neither `:` nor `@`
            occurs in a namespace.
    Source: docs/wire-format.md, Names in Redis.
    """

    database: int = 0
    prefix: str = ""

    @property
    def has_older_names(self) -> bool:
        """Whether older versions use other names in this database: those of database 0."""
        return self.database != 0 and not self.prefix

    def channel_of(self, namespace: str) -> str:
        """Return the channel of `namespace`, which is the hash tag of its keys too."""
        channel = f"{self.prefix}:{_CHANNEL}" if self.prefix else _CHANNEL
        if self.database:
            channel = f"{channel}@{self.database}"
        return channel if namespace == DEFAULT_NAMESPACE else f"{channel}:{namespace}"

    @lru_cache(maxsize=1_024)  # noqa: B019  (a naming is a value, of which a process has a few)
    def of(self, namespace: str) -> Names:
        """Return the names of `namespace` in Redis."""
        return _names(self, namespace)


@lru_cache(maxsize=1_024)
def _names(naming: Naming, namespace: str) -> Names:
    channel = naming.channel_of(namespace)
    tag = f"{{{channel}}}"
    return Names(
        channel,
        head=f"{tag}:head",
        log=f"{tag}:log",
        receipt_prefix=f"{tag}:receipt:",
        registry=f"{tag}:replicas",
        presence_prefix=f"{tag}:replica:",
        confirmed=f"{tag}:confirmed",
        question=f"{tag}:question",
        echo_prefix=f"{tag}:echo:",
    )


def names_of(namespace: str) -> Names:
    """Return the names of `namespace` in database 0, without a prefix."""
    return _OF_DATABASE_0.of(namespace)


_OF_DATABASE_0: Final = Naming()


def check_prefix(prefix: object) -> str:
    """Return a prefix that is valid. Raises: ValueError, which does not show it."""
    if isinstance(prefix, str) and _PREFIX.fullmatch(prefix) and _CHANNEL not in prefix:
        return prefix
    raise ValueError(f"expected {PREFIX_FORM}")

"""The names of a namespace's keys and channels in Redis."""

from typing import Final, NamedTuple

from ...invalidation import DEFAULT_NAMESPACE

__all__ = ["Names", "names_of"]

_CHANNEL: Final = "cache-invalidation"


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


def names_of(namespace: str) -> Names:
    """Return the names of `namespace` in Redis."""
    channel = _CHANNEL if namespace == DEFAULT_NAMESPACE else f"{_CHANNEL}:{namespace}"
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
    )

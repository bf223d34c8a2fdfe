"""What a namespace is called in Redis."""

from typing import Final, NamedTuple

from ...invalidation import DEFAULT_NAMESPACE

__all__ = ["Names", "names_of"]

_CHANNEL: Final = "cache-invalidation"


class Names(NamedTuple):
    """What a namespace is called in Redis. All keys carry the channel as their hash tag, so a cluster keeps them,
    and the channel if it is sharded, in one slot. So do the channels on which replicas confirm and are
    asked."""

    channel: str
    head: str
    log: str
    receipt_prefix: str
    registry: str
    presence_prefix: str
    confirmed: str
    question: str


def names_of(namespace: str) -> Names:
    """Return what `namespace` is called in Redis."""
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

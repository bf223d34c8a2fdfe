"""Questions that a publisher sends to all replicas of a namespace, and each replica's answer."""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from .errors import MalformedFrame
from .invalidation import Invalidation, Position, new_id

__all__ = ["Question", "ReplicaAnswer", "counting", "decode_question", "encode_question", "looking_up"]

_NAMES_MAX: Final = 500
"""The most names in one question, so that none blocks a replica for long; more names become several questions."""
_NAMES_BYTES_MAX: Final = 48 * 1_024


class Question(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A question to every replica. It drops nothing. Readers skip unknown fields.

    Shape:  it asks how many entries `keys`, `tags`, `prefixes` and `everything` match, as in an invalidation; and for
            the fingerprint of the value under each key of `entries`. Either part may be empty.
    """

    id: str
    keys: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    everything: bool = False
    entries: tuple[str, ...] = ()

    @property
    def counted(self) -> Invalidation | None:
        """The invalidation whose entries are to be counted; None when there is nothing to count."""
        if not (self.keys or self.tags or self.prefixes or self.everything):
            return None
        return Invalidation(keys=self.keys, tags=self.tags, prefixes=self.prefixes, everything=self.everything)


class ReplicaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's answer to one question.

    Shape:  `count` is how many entries of the replica's caches the question matches, `is_estimate` whether it was
            extrapolated from a sample. `fingerprints` has, for each of the question's `entries`, one item for each
            cache: null when a read would not be served from it, "" when the value has no fingerprint.
    """

    id: str
    position: Position | None = None
    count: int = 0
    is_estimate: bool = False
    fingerprints: tuple[tuple[str | None, ...], ...] = ()


_decoder = msgspec.json.Decoder(Question)


def counting(invalidation: Invalidation) -> list[Question]:
    """Return the questions, one or more, that count the entries an invalidation would drop."""
    keys, tags, prefixes = invalidation.keys, invalidation.tags, invalidation.prefixes
    if len(list(_parts((*keys, *tags, *prefixes)))) <= 1:
        return [Question(id=new_id(), keys=keys, tags=tags, prefixes=prefixes, everything=invalidation.everything)]
    return [
        *(Question(id=new_id(), keys=tuple(part)) for part in _parts(keys)),
        *(Question(id=new_id(), tags=tuple(part)) for part in _parts(tags)),
        *(Question(id=new_id(), prefixes=tuple(part)) for part in _parts(prefixes)),
    ]


def looking_up(keys: Sequence[str]) -> list[Question]:
    """Return the questions, one or more, for the fingerprints of the values under these keys."""
    return [Question(id=new_id(), entries=tuple(part)) for part in _parts(keys)]


def encode_question(question: Question) -> bytes:
    """Write one message for the channel `names_of(namespace).question`."""
    return msgspec.json.encode(question)


def decode_question(frame: bytes) -> Question:
    """Read one message of that channel.

    Shape:  UTF-8 JSON object; unknown fields are skipped.
    Raises: MalformedFrame and nothing else. The replica then does not answer.
    Source: docs/wire-format.md, Questions.
    """
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"invalid question: {error}; it begins {frame[:60]!r}") from error


def _parts(names: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size_bytes = 0
    for name in names:
        name_bytes = len(name.encode()) + 3
        if part and (len(part) >= _NAMES_MAX or size_bytes + name_bytes > _NAMES_BYTES_MAX):
            yield part
            part, size_bytes = [], 0
        part.append(name)
        size_bytes += name_bytes
    if part:
        yield part

"""The wire form: one UTF-8 JSON object per message. Specified in docs/wire-format.md and wire.schema.json."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

from .errors import MalformedFrame
from .invalidation import Invalidation, Position

__all__ = [
    "FRAME_BYTES_MAX",
    "decode",
    "digest_of",
    "encode",
    "encode_tails",
    "encode_unsequenced",
    "frame_at",
    "parts_of",
]

FRAME_BYTES_MAX: Final = 65_536
_VERSION: Final = 1
# The log's script prepends the head to a tail: version, an epoch of 26 characters and a sequence of up to 16 digits.
_HEAD_BYTES_MAX: Final = len('{"v":1,"epoch":"","seq":,') + 26 + 16

_UNSEQUENCED_HEAD: Final = b'{"v":1,'

_NamesField = Literal["keys", "tags", "prefixes"]
_NAMES_FIELDS: Final[tuple[_NamesField, ...]] = ("keys", "tags", "prefixes")

_decoder = msgspec.json.Decoder(Invalidation)
_encoder = msgspec.json.Encoder()


class _Tail(msgspec.Struct, frozen=True):
    """A frame without its head (`v`, `epoch`, `seq`), which only the log can assign."""

    id: str
    namespace: str
    keys: tuple[str, ...]
    tags: tuple[str, ...]
    prefixes: tuple[str, ...]
    everything: bool
    source: str
    sent_at_ms: int | None
    reason: str
    confirm: bool
    traceparent: str | msgspec.UnsetType | None


def decode(frame: bytes, namespace: str | None) -> Invalidation:
    """Read one frame from the channel or the log of `namespace`; None accepts any namespace.

    Shape:  UTF-8 JSON object of at most FRAME_BYTES_MAX (65_536) bytes; unknown fields are skipped.
    Raises: MalformedFrame and nothing else, whatever the bytes. The subscriber then drops everything.
    Source: docs/wire-format.md, version 1.
    """
    if len(frame) > FRAME_BYTES_MAX:
        raise MalformedFrame(f"invalid frame: expected at most {FRAME_BYTES_MAX} bytes, got {len(frame)}")
    try:
        invalidation = _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"invalid frame: {error}; it begins {frame[:60]!r}") from error
    if (
        invalidation.v == _VERSION
        and (invalidation.keys or invalidation.tags or invalidation.prefixes or invalidation.everything)
        and (invalidation.namespace == namespace or not invalidation.namespace or namespace is None)
        and (invalidation.seq is None) == (invalidation.epoch is None)
    ):
        return invalidation
    raise _flaw_of(invalidation, namespace)


def _flaw_of(invalidation: Invalidation, namespace: str | None) -> MalformedFrame:
    """Return the error for a frame that is valid JSON but no valid invalidation."""
    if invalidation.v != _VERSION:
        return MalformedFrame(f"invalid frame: expected version {_VERSION}, got {invalidation.v} at $.v")
    if invalidation.namespace and namespace is not None and invalidation.namespace != namespace:
        return MalformedFrame(
            f"invalid frame: expected namespace {namespace!r}, that of its channel, "
            f"got {invalidation.namespace!r:.100} at $.namespace"
        )
    if (invalidation.seq is None) != (invalidation.epoch is None):
        return MalformedFrame("invalid frame: expected epoch and seq together, got one of them; send both or neither")
    return MalformedFrame("invalid frame: expected at least one of keys, tags, prefixes or everything, got none")


def encode(invalidation: Invalidation) -> bytes:
    """Encode an invalidation that has its position, or that is sent past the log. The inverse of `decode`."""
    return _encoder.encode(invalidation)


def digest_of(frame: bytes) -> str:
    """Return the digest of a whole frame, as the log's scripts compute it: its SHA-1 in hex."""
    return hashlib.sha1(frame, usedforsecurity=False).hexdigest()


def frame_at(position: Position, tail: bytes) -> bytes:
    """Return the frame that the log's script builds from a tail at `position`, byte for byte."""
    return b'{"v":1,"epoch":"%s","seq":%d,%s' % (position.epoch.encode(), position.sequence, tail)


def parts_of(invalidation: Invalidation) -> list[Invalidation]:
    """Return the invalidation itself or, when it is too large for one message, its parts in order.

    Shape: together the parts name all targets; their ids end in `.1`, `.2`, …
    """
    if len(_encode_tail(invalidation)) + _HEAD_BYTES_MAX <= FRAME_BYTES_MAX:
        return [invalidation]
    return list(_split(invalidation))


def encode_tails(invalidation: Invalidation) -> list[bytes]:
    """Encode an invalidation that has no position yet, as one tail or, when it is too large, several.

    Shape: each tail is a frame without its opening brace and head; with its head it is at most FRAME_BYTES_MAX bytes.
           A split invalidation has one for each of `parts_of` it.
    """
    whole = _encode_tail(invalidation)
    if len(whole) + _HEAD_BYTES_MAX <= FRAME_BYTES_MAX:
        return [whole]
    return [_encode_tail(part) for part in _split(invalidation)]


def encode_unsequenced(invalidation: Invalidation) -> list[bytes]:
    """Encode an invalidation that is sent past the log, as one frame or, when it is too large, several.

    Shape: split as by `encode_tails`, so that a part has the same id whichever way it reaches a replica.
    """
    return [_UNSEQUENCED_HEAD + tail for tail in encode_tails(invalidation)]


def _encode_tail(invalidation: Invalidation) -> bytes:
    each = invalidation
    # Spelt out: a loop over the fields would cost more than encoding them.
    tail = _Tail(
        each.id,
        each.namespace,
        each.keys,
        each.tags,
        each.prefixes,
        each.everything,
        each.source,
        each.sent_at_ms,
        each.reason,
        each.confirm,
        each.traceparent,
    )
    return _encoder.encode(tail)[1:]


def _split(invalidation: Invalidation) -> Iterator[Invalidation]:
    empty = msgspec.structs.replace(invalidation, id=f"{invalidation.id}.{'9' * 6}", keys=(), tags=(), prefixes=())
    room_bytes = FRAME_BYTES_MAX - _HEAD_BYTES_MAX - len(_encode_tail(empty))
    parts: list[dict[_NamesField, list[str]]] = []
    left_bytes = 0
    for field in _NAMES_FIELDS:
        names: Sequence[str] = getattr(invalidation, field)
        for name in names:
            size_bytes = len(_encoder.encode(name)) + len(",")
            if size_bytes > left_bytes:
                parts.append({"keys": [], "tags": [], "prefixes": []})
                left_bytes = room_bytes
            parts[-1][field].append(name)
            left_bytes -= size_bytes
    for number, part in enumerate(parts, start=1):
        yield msgspec.structs.replace(
            invalidation,
            id=f"{invalidation.id}.{number}",
            keys=tuple(part["keys"]),
            tags=tuple(part["tags"]),
            prefixes=tuple(part["prefixes"]),
        )

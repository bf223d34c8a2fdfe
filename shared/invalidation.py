"""The invalidation: the order to drop entries, and the targets it may name."""

import os
import re
import time
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple, Self, TypeAlias

import msgspec

from .errors import InvalidNamespace, InvalidTarget

__all__ = [
    "DEFAULT_NAMESPACE",
    "ID_BYTES_MAX",
    "KEY_BYTES_MAX",
    "NAMESPACE_PATTERN",
    "REASON_BYTES_MAX",
    "REQUEST_NAMES_MAX",
    "SCOPE_BYTES_MAX",
    "SOURCE_BYTES_MAX",
    "TAG_BYTES_MAX",
    "Anchor",
    "Everything",
    "Invalidation",
    "Keys",
    "Position",
    "Prefixes",
    "Tags",
    "Target",
    "check_namespace",
    "invalidation_of",
    "new_id",
]

KEY_BYTES_MAX: Final = 1_024
"""The longest key or prefix, in bytes of UTF-8."""
TAG_BYTES_MAX: Final = 256
"""The longest tag, in bytes of UTF-8."""
REQUEST_NAMES_MAX: Final = 10_000
"""The most keys, tags and prefixes that one invalidation may name, together."""
REASON_BYTES_MAX: Final = 1_024
"""The longest reason, in bytes of UTF-8."""
SOURCE_BYTES_MAX: Final = 128
"""The longest source, in bytes of UTF-8."""
ID_BYTES_MAX: Final = 128
"""The longest id of an invalidation, in bytes of UTF-8. Generated ids are ULIDs, 26 bytes long."""
SCOPE_BYTES_MAX: Final = 1_024
"""The longest scope of an id, in bytes of UTF-8."""
DEFAULT_NAMESPACE: Final = "default"

NAMESPACE_PATTERN: Final = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""A regular expression that matches a whole namespace."""

_NAMESPACE = re.compile(NAMESPACE_PATTERN, re.ASCII)
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [one + other for one in _CROCKFORD for other in _CROCKFORD]


class _Named:
    """A target with names: immutable, never empty, equal to another of the same type and names."""

    __slots__ = ("names",)
    __match_args__ = ("names",)
    names: tuple[str, ...]
    _bytes_max = KEY_BYTES_MAX

    def __init__(self, *names: str) -> None:
        kind = type(self).__name__
        if not names:
            raise InvalidTarget(f"expected at least one name in {kind}(...), got none; to drop all, use Everything()")
        if len(names) > REQUEST_NAMES_MAX:
            raise InvalidTarget(
                f"expected at most {REQUEST_NAMES_MAX} names in {kind}(...), got {len(names)}; "
                "publish several times, or name a tag or a prefix"
            )
        for place, name in enumerate(names):
            check_text(name, self._bytes_max, f"{kind}(...)[{place}]")
        object.__setattr__(self, "names", names)

    def __setattr__(self, attribute: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {attribute} cannot be set")

    def __reduce__(self) -> tuple[type[Self], tuple[str, ...]]:
        return type(self), self.names

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.names == self.names

    def __hash__(self) -> int:
        return hash((type(self), self.names))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.names))})"


class Keys(_Named):
    """The entries with exactly these keys: `Keys("product:42", "product:43")`."""

    __slots__ = ()


class Tags(_Named):
    """The entries that were stored with one of these tags: `Tags("catalogue")`."""

    __slots__ = ()
    _bytes_max = TAG_BYTES_MAX


class Prefixes(_Named):
    """The entries whose key begins with one of these strings: `Prefixes("product:")`."""

    __slots__ = ()


class Everything:
    """Every entry of the namespace."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is Everything

    def __hash__(self) -> int:
        return hash(Everything)

    def __repr__(self) -> str:
        return "Everything()"


Target: TypeAlias = Keys | Tags | Prefixes | Everything


class Position(NamedTuple):
    """A place in a namespace's log. Sequences of different epochs cannot be compared.

    Source: the log's script in append.lua, which assigns both.
    """

    epoch: str
    sequence: int

    def reaches(self, other: "Position") -> bool:
        """Whether this position is that of `other` or a later one of the same epoch."""
        return self.epoch == other.epoch and self.sequence >= other.sequence


class Anchor(NamedTuple):
    """A position, and the digest of the log's frame at it: together they tell two histories apart.

    Shape:  `digest` is `wire.digest_of` the frame; empty at sequence 0, which has no frame; None when it is not known.
    """

    epoch: str
    sequence: int
    digest: str | None

    @property
    def position(self) -> Position:
        """The position without the digest."""
        return Position(self.epoch, self.sequence)

    def contradicts(self, other: "Anchor") -> bool:
        """Whether both have the same position but different digests. An unknown digest contradicts nothing."""
        return (
            self.position == other.position and None not in (self.digest, other.digest) and self.digest != other.digest
        )


# The integers that every JSON reader holds exactly, so that no two languages can read one frame differently.
_Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


# `gc=False`: it holds only texts and numbers, so no reference cycle can contain it.
class Invalidation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The order to drop entries. The field names are those of the wire form.

    Shape:  at least one of `keys`, `tags`, `prefixes` is not empty, or `everything` is true.
    Units:  `sent_at_ms` is the sender's Unix clock in milliseconds: for lag, never for order.
    Source: docs/wire-format.md, version 1. The log assigns `epoch` and `seq`; a foreign publisher sends neither.
    """

    v: _Natural = 1
    epoch: str | None = None
    seq: _Natural | None = None
    id: str = ""
    namespace: str = ""
    keys: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    everything: bool = False
    source: str = ""
    sent_at_ms: _Natural | None = None
    reason: str = ""
    confirm: bool = False
    # The only field that is omitted when unset: most frames are never traced.
    traceparent: str | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def position(self) -> Position | None:
        """Its position in the log; None when a foreign publisher sent it past the log."""
        return None if self.epoch is None or self.seq is None else Position(self.epoch, self.seq)


def invalidation_of(
    targets: Iterable[Target],
    *,
    namespace: str = DEFAULT_NAMESPACE,
    reason: str = "",
    source: str = "",
    id: str | None = None,
    confirm: bool = False,
) -> Invalidation:
    """Create an invalidation of these targets, with an id and the time of sending.

    Raises: InvalidTarget when there is no target, when Everything is mixed with others, or when a text is too long;
            InvalidNamespace.
    """
    check_namespace(namespace)
    check_text(reason, REASON_BYTES_MAX, "reason", may_be_empty=True)
    check_text(source, SOURCE_BYTES_MAX, "source", may_be_empty=True)
    if id is not None:
        check_text(id, ID_BYTES_MAX, "id")
    names: dict[type[Target], dict[str, None]] = {}
    everything = False
    for target in targets:
        match target:
            case Keys(named) | Tags(named) | Prefixes(named):
                kind = type(target)
                if kind in names:
                    names[kind].update(dict.fromkeys(named))
                else:
                    names[kind] = dict.fromkeys(named)
            case Everything():
                everything = True
            case _:
                raise InvalidTarget(
                    f"expected Keys, Tags, Prefixes or Everything, got {type(target).__name__}; "
                    'wrap the names: Keys("product:42")'
                )
    count = sum(map(len, names.values()))
    if everything and count:
        raise InvalidTarget(
            f"expected Everything() alone, got {count} more names beside it: it covers them; leave them out"
        )
    if not everything and not count:
        raise InvalidTarget("expected at least one target, got none; to drop all, use Everything()")
    if count > REQUEST_NAMES_MAX:
        raise InvalidTarget(
            f"expected at most {REQUEST_NAMES_MAX} names in one invalidation, got {count}; "
            "publish several times, or name a tag or a prefix"
        )
    return Invalidation(
        id=new_id() if id is None else id,
        namespace=namespace,
        keys=tuple(names.get(Keys, ())),
        tags=tuple(names.get(Tags, ())),
        prefixes=tuple(names.get(Prefixes, ())),
        everything=everything,
        source=source,
        sent_at_ms=time.time_ns() // 1_000_000,
        reason=reason,
        confirm=confirm,
    )


def check_namespace(namespace: object) -> str:
    """Return `namespace` if it is valid. Raises: InvalidNamespace."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise InvalidNamespace(
            "expected a namespace of 1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit, "
            f"got {namespace!r:.100}"
        )
    return namespace


def check_text(text: object, bytes_max: int, where: str, *, may_be_empty: bool = False) -> str:
    """Return `text` if it is a string that fits in a frame. Raises: InvalidTarget."""
    if not isinstance(text, str):
        raise InvalidTarget(f"expected a string, got {type(text).__name__} at {where}")
    if not text and not may_be_empty:
        raise InvalidTarget(f"expected a string that is not empty, got '' at {where}")
    try:
        size_bytes = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidTarget(f"expected text that UTF-8 can hold, got a lone surrogate at {where}") from error
    if size_bytes > bytes_max:
        raise InvalidTarget(f"expected at most {bytes_max} bytes of UTF-8, got {size_bytes} at {where}")
    return text


def new_id() -> str:
    """Return a ULID: 26 characters that sort by the millisecond of creation, with 80 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    first, last, pairs = random >> 40, random & 0xFF_FFFF_FFFF, _PAIRS
    # Spelt out, and two characters at a time, because each publish draws one.
    return (
        f"{pairs[milliseconds >> 40 & 1023]}{pairs[milliseconds >> 30 & 1023]}{pairs[milliseconds >> 20 & 1023]}"
        f"{pairs[milliseconds >> 10 & 1023]}{pairs[milliseconds & 1023]}"
        f"{pairs[first >> 30]}{pairs[first >> 20 & 1023]}{pairs[first >> 10 & 1023]}{pairs[first & 1023]}"
        f"{pairs[last >> 30]}{pairs[last >> 20 & 1023]}{pairs[last >> 10 & 1023]}{pairs[last & 1023]}"
    )

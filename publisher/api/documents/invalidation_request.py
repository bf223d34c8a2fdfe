"""The request bodies of POST /invalidations and POST /invalidations/preview."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Final, Self, TypeAlias

import msgspec
from msgspec import Meta

from ....shared.confirmation import CONFIRM_SECONDS_MAX, Confirm
from ....shared.errors import InvalidNamespace, InvalidSettings, InvalidTarget
from ....shared.invalidation import (
    DEFAULT_NAMESPACE,
    KEY_BYTES_MAX,
    NAMESPACE_PATTERN,
    REASON_BYTES_MAX,
    REQUEST_NAMES_MAX,
    TAG_BYTES_MAX,
    Everything,
    Keys,
    Prefixes,
    Tags,
    Target,
    check_namespace,
    check_text,
)
from .problems import BODY_UNREADABLE, INVALIDATION_INVALID, Flaw, Problem

__all__ = ["ConfirmRequest", "PreviewRequest", "PublishRequest"]

_FLAWS_MAX: Final = 20
"""How many errors of one request are listed: a small request must not cause a large response."""
_SHOWN_CHARACTERS_MAX: Final = 60
"""How much of an invalid value is shown."""

# These limits are for the OpenAPI document. The targets check them, with better error texts.
_NAMES = {"maxItems": REQUEST_NAMES_MAX}
_Key: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": KEY_BYTES_MAX})]
_Tag: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": TAG_BYTES_MAX})]


class ConfirmRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to wait for replicas. `timeout_seconds` begins when the log has accepted the invalidation."""

    timeout_seconds: Annotated[
        float,
        Meta(
            description="How long to wait for replicas that have not confirmed.",
            extra_json_schema={"exclusiveMinimum": 0, "maximum": CONFIRM_SECONDS_MAX},
        ),
    ] = 1.0


class PreviewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The targets: `everything` of a namespace, or at least one key, tag or prefix."""

    namespace: Annotated[
        str,
        Meta(
            description="The namespace of the entries.",
            extra_json_schema={"pattern": f"^{NAMESPACE_PATTERN}$"},
        ),
    ] = DEFAULT_NAMESPACE
    keys: Annotated[
        tuple[_Key, ...],
        Meta(description="Drop the entries with exactly these keys.", extra_json_schema=_NAMES),
    ] = ()
    tags: Annotated[
        tuple[_Tag, ...],
        Meta(description="Drop the entries with one of these tags.", extra_json_schema=_NAMES),
    ] = ()
    prefixes: Annotated[
        tuple[_Key, ...],
        Meta(description="Drop the entries whose key begins with one of these.", extra_json_schema=_NAMES),
    ] = ()
    everything: Annotated[
        bool, Meta(description="Drop every entry of the namespace. Excludes keys, tags and prefixes.")
    ] = False
    reason: Annotated[
        str,
        Meta(
            description="Why, for readers of the history or a log.",
            extra_json_schema={"maxLength": REASON_BYTES_MAX},
        ),
    ] = ""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Decode a request body. Raises: Problem and nothing else, whatever the bytes; it points at the error."""
        try:
            return msgspec.json.decode(body, type=cls)
        except msgspec.ValidationError as error:
            raise Problem(INVALIDATION_INVALID, errors=(_flaw_of(str(error), cls),)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem(
                BODY_UNREADABLE,
                f"the request body is not one JSON object in UTF-8 ({len(body)} bytes): {error}",
            ) from None

    def targets(self) -> list[Target]:
        """Return the targets. Raises: InvalidTarget; `flaws` says where in the body."""
        targets: list[Target] = []
        if self.keys:
            targets.append(Keys(*self.keys))
        if self.tags:
            targets.append(Tags(*self.tags))
        if self.prefixes:
            targets.append(Prefixes(*self.prefixes))
        if self.everything:
            targets.append(Everything())
        return targets

    def flaws(self) -> tuple[Flaw, ...]:
        """Return the errors in this request, each with its place in the body."""
        return tuple(islice(self._all_flaws(), _FLAWS_MAX))

    def _all_flaws(self) -> Iterator[Flaw]:
        try:
            check_namespace(self.namespace)
        except InvalidNamespace as error:
            yield Flaw(pointer="/namespace", detail=f"{error} at /namespace")
        count = len(self.keys) + len(self.tags) + len(self.prefixes)
        if not count and not self.everything:
            yield Flaw(
                pointer="",
                detail="expected at least one of keys, tags or prefixes, got none; to drop all, send everything: true",
            )
        if count and self.everything:
            yield Flaw(
                pointer="/everything",
                detail=f"expected everything alone, got {count} names beside it at /everything; leave them out",
            )
        if count > REQUEST_NAMES_MAX:
            yield Flaw(
                pointer="",
                detail=f"expected at most {REQUEST_NAMES_MAX} keys, tags and prefixes together, got {count}; "
                "send several requests, or use a tag or a prefix",
            )
        yield from self._more_flaws()
        texts = [
            *((name, KEY_BYTES_MAX, f"/keys/{place}") for place, name in enumerate(self.keys)),
            *((name, TAG_BYTES_MAX, f"/tags/{place}") for place, name in enumerate(self.tags)),
            *((name, KEY_BYTES_MAX, f"/prefixes/{place}") for place, name in enumerate(self.prefixes)),
            (self.reason, REASON_BYTES_MAX, "/reason"),
        ]
        for text, bytes_max, pointer in texts:
            try:
                check_text(text, bytes_max, pointer, may_be_empty=pointer == "/reason")
            except InvalidTarget as error:
                yield Flaw(pointer=pointer, detail=str(error))

    def _more_flaws(self) -> Iterator[Flaw]:
        """Yield the errors in fields that only one kind of request has."""
        yield from ()


class PublishRequest(PreviewRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The entries that every replica drops: `everything` of a namespace, or at least one key, tag or prefix."""

    confirm: Annotated[
        ConfirmRequest | None,
        Meta(description="Wait until every registered replica has applied it, and list which have."),
    ] = None

    def confirmation(self) -> Confirm | None:
        """Return how to wait for replicas, if at all. Raises: InvalidSettings; `flaws` says where in the body."""
        return None if self.confirm is None else Confirm(timeout_seconds=self.confirm.timeout_seconds)

    def _more_flaws(self) -> Iterator[Flaw]:
        try:
            self.confirmation()
        except InvalidSettings as error:
            yield Flaw(pointer="/confirm/timeout_seconds", detail=f"{error} at /confirm/timeout_seconds")


def _flaw_of(message: str, request: type[msgspec.Struct]) -> Flaw:
    """Convert an error of msgspec: expected, got, and where as a JSON pointer."""
    problem, _, place = message.partition(" - at `")
    _, is_unknown, unknown = problem.partition("Object contains unknown field `")
    if is_unknown:
        where = ConfirmRequest if place else request
        fields = ", ".join(where.__struct_fields__)
        detail = f"expected no fields but {fields}, got {_cut(unknown.removesuffix('`'))!r}"
        return Flaw(pointer="/confirm" if place else "", detail=f"{detail} at /confirm" if place else detail)
    pointer = "".join(f"/{step}" for step in re.findall(r"\w+", place))
    expected, _, got = problem.replace("`", "").replace("Expected", "expected").partition(", got ")
    if not got:
        expected, got = "expected a value of the documented type", expected
    return Flaw(pointer=pointer, detail=f"{expected}, got {got} at {pointer or 'the top of the body'}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else f"{text[:_SHOWN_CHARACTERS_MAX]}…"

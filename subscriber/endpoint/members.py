"""The subscribers whose routes one application has: its routes speak for all of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary, ref

from ...shared.errors import InvalidSettings, MalformedFrame
from ...shared.invalidation import Position
from ...shared.wire import decode
from ..cache.local_cache import LocalCache
from ..following.applied import Applied
from ..following.state import STATES_WORST_FIRST, State
from ..metrics import Measurable
from .access import Access
from .replica_token import TOKEN_VARIABLE

__all__ = [
    "Member",
    "Served",
    "apply_to",
    "members_of",
    "one_access_of",
    "run_by",
    "state_of",
    "subscribers_of",
    "with_others",
]


class Served(Measurable, Protocol):
    """A subscriber, as far as its routes need it."""

    @property
    def caches_by_namespace(self) -> Mapping[str, LocalCache]:
        """The followed caches by namespace."""
        ...

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here."""
        ...

    def restart_if_forked(self) -> None:
        """Start again, if this process was forked from one that runs the subscriber in a thread."""
        ...

    def apply(self, body: bytes) -> Applied:
        """Apply the invalidation in the body of an HTTP request."""
        ...


class Member:
    """A subscriber and the access that its routes were made with. The endpoints of its routes are its methods.

    Shape:  `has_warned` is whether the log says that its POST is open.
    """

    def __init__(self, subscriber: Served, access: Access) -> None:
        self.subscriber: Final = subscriber
        self.access: Final = access
        self.has_warned = False


def members_of(app: object, member: Member) -> tuple[Member, ...]:
    """Return those whose routes `app` has, directly or in what it includes and mounts, in the order of its routes.

    A second route of the same path is never called: the first one has to speak for both. Two routers of one subscriber
    are two members. `member`, whose route was called, is among them in any case.
    """
    found = dict.fromkeys(_members_in(app, set()))
    return tuple(found) if member in found else (member, *found)


def _members_in(node: object, seen: set[int]) -> Iterator[Member]:
    """Walk the tree of routes. Starlette's have `routes` and `endpoint`; FastAPI's inclusions have a router."""
    if id(node) in seen:
        return
    seen.add(id(node))
    owner = getattr(getattr(node, "endpoint", None), "__self__", None)
    if isinstance(owner, Member):
        yield owner
    router = getattr(node, "original_router", None)
    for route in getattr(node if router is None else router, "routes", None) or ():
        yield from _members_in(route, seen)


def one_access_of(members: Sequence[Member]) -> Access:
    """Return what a caller of these members needs. It may do what each of them permits.

    Raises: InvalidSettings when they expect different tokens: a request has one, and it is for all of them.
    """
    first = members[0]
    for other in members:
        if not other.access.tokens.is_same(first.access.tokens):
            one, two = (_name_of(each) for each in (first, other))
            raise InvalidSettings(
                f"expected one replica_token for all subscribers of an application, got different ones for {one} and "
                f"{two}: one POST /cache-invalidation is for both, and has one token; give both the same "
                f"replica_token, or leave it out and set {TOKEN_VARIABLE}"
            )
    return Access(first.access.tokens, all(each.access.allow_open for each in members))


def _name_of(member: Member) -> str:
    namespaces = ", ".join(member.subscriber.caches_by_namespace)
    return f"replica {member.subscriber.replica_id} ({namespaces})"


def subscribers_of(members: Sequence[Member]) -> list[Served]:
    """Return the subscribers of these members, each once."""
    return list({id(each.subscriber): each.subscriber for each in members}.values())


def state_of(subscribers: Sequence[Served]) -> State:
    """Return the state of all of them: `coherent` only when each is."""
    states = {each.state for each in subscribers}
    return next(state for state in STATES_WORST_FIRST if state in states)


@contextmanager
def run_by(app: object, subscribers: Iterable[Served]) -> Iterator[None]:
    """Remember that a server runs `app`, which has the routes of these subscribers, in its lifespan."""
    for each in subscribers:
        _apps[each] = ref(app)
    try:
        yield
    finally:
        for each in subscribers:
            _apps.pop(each, None)


def with_others(subscribers: Sequence[Served], running: Iterable[Served], app: object) -> list[Served]:
    """Return these, and those of the `running` ones of this process that no other application speaks for.

    The routes of some may be hidden from `members_of`: behind a middleware that was mounted, say. And some have none.
    An application that a server runs besides is another service.
    """
    others = [each for each in running if each not in subscribers]
    return [*subscribers, *(each for each in others if each not in _apps or _apps[each]() in (None, app))]


_apps: Final[WeakKeyDictionary[Served, "ref[object]"]] = WeakKeyDictionary()


def apply_to(subscribers: Sequence[Served], body: bytes) -> dict[str, Any]:
    """Apply the invalidation in `body` to each subscriber that it concerns; return the response as JSON types.

    Shape:  that of `Applied.as_dict`, and `replicas`, with what each of them did. `replica` is the first that applied
            it. `state` is that of all subscribers, `dropped` the sum. `positions` shows the first of a namespace.
    """
    results = [each.apply(body) for each in _concerned(subscribers, body)]
    applied = [each for each in results if each.outcome != "not followed"] or results
    documents = [each.as_dict() for each in applied]
    namespaces = {each.namespace for each in applied}
    positions: dict[str, Any] = {}
    for each in reversed(documents):
        positions.update(each["positions"])
    return {
        **documents[0],
        "state": state_of(subscribers),
        "namespace": applied[0].namespace if len(namespaces) == 1 else None,
        "dropped": sum(each.dropped for each in applied),
        "positions": positions,
        "replicas": [{name: value for name, value in each.items() if name != "id"} for each in documents],
    }


def _concerned(subscribers: Sequence[Served], body: bytes) -> Sequence[Served]:
    """Return those that follow the namespace of the message; all if it names none, or if none follows it."""
    try:
        namespace = decode(body, None).namespace
    except MalformedFrame:
        return subscribers  # it means everything
    return [each for each in subscribers if namespace in each.caches_by_namespace] or subscribers

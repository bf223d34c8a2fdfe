"""What became of an invalidation that was posted to a replica."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ...shared.invalidation import Position
from .follower import State

__all__ = ["Applied", "ApplyOutcome"]

ApplyOutcome: TypeAlias = Literal["applied", "not followed", "cleared"]
"""`applied`; of a namespace that is `not followed` here, so that there was nothing to drop; or everything was
`cleared`, because the body was empty or could not be read."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What `Subscriber.apply` did. Reads are right whatever it says.

    Shape:  `namespace` is None when it was for all that are followed. `dropped` counts the entries that were removed on
            the spot and, for everything, those that there were. Entries that a prefix names, or a tag of more than 64
            entries, are dead as well, and not in it: the sweep finds them. `state` is the subscriber's.
            `positions` are those of the namespaces concerned; what is posted does not move them.
    """

    replica: str
    state: State
    outcome: ApplyOutcome
    id: str | None
    namespace: str | None
    dropped: int
    positions: Mapping[str, Position | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON types: what POST /cache-invalidation answers."""
        positions = {namespace: each and each._asdict() for namespace, each in self.positions.items()}
        return {**asdict(self), "positions": positions}

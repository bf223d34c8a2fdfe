"""Passes on what was posted here to the other processes of the same address. Blocks: not for an event loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from .calls import Call, call_all
from .listening import Listener, inodes_of, listeners, network, serving
from .messages import Answer, Question, packed
from .own_socket import own_socket
from .places import found

__all__ = ["PassedOn", "Silent", "pass_on"]

_SECONDS_MAX: Final = 1.0
"""How long the answers may take: half of what a fan-out allows an address."""


class Silent(NamedTuple):
    """A process that serves the address, or may, and has not applied what was passed on."""

    pid: int | None
    why: str


class PassedOn(NamedTuple):
    """The other processes of one address.

    Shape:  `doubt` is why there may be others; None if there are none.
    """

    answers: tuple[Answer, ...] = ()
    silent: tuple[Silent, ...] = ()
    doubt: str | None = None


def pass_on(body: bytes, server: tuple[str, int | None] | None = None) -> PassedOn:
    """Pass on the bytes of a request to the other processes of its address, once: they pass on nothing.

    Shape:  `server` is the local address of the connection, if it is known.
    """
    problem = own_socket.settled_problem()
    try:
        own = serving(listeners(own_socket.descriptors), server)
    except (OSError, AttributeError) as error:  # the platform has not what it takes
        return PassedOn(doubt=_doubt(str(error)))
    if not own:
        return PassedOn(doubt=_doubt(problem or "this process has no socket that listens"))
    names = tuple(dict.fromkeys(each.name for each in own))
    question = packed(Question(names, network(), any(each.may_have_twins for each in own)), body)
    sockets = [each for each in found() if each.address != own_socket.address]
    calls = call_all(sockets, question, _SECONDS_MAX) if sockets else []
    answers = [call.answer for call in calls if call.answer is not None and call.answer.is_concerned]
    return PassedOn(
        answers=tuple(sorted((each for each in answers if each.error is None), key=lambda each: each.pid)),
        silent=(
            *(Silent(each.pid, each.error) for each in answers if each.error is not None),
            *(_silent(call) for call in calls if _may_serve(call, own)),
        ),
        doubt=None if problem is None else _doubt(problem),
    )


def _may_serve(call: Call, own: Sequence[Listener]) -> bool:
    """Whether a process that has not answered may serve the address, by what it has open."""
    if call.answer is not None or call.is_gone:
        return False
    if call.peer is None or call.peer.pid is None:
        return True
    inodes = inodes_of(call.peer.pid)
    if inodes is None:
        return Path(f"/proc/{call.peer.pid}").exists() or not Path("/proc/self").exists()
    return any(each.may_have_twins or each.inode in inodes for each in own)


def _silent(call: Call) -> Silent:
    return Silent(None if call.peer is None else call.peer.pid, call.problem)


def _doubt(why: str) -> str:
    return (
        "other processes may serve the same address, and it is not known whether they have applied it: "
        f"{why}; expected Unix sockets in a directory that this user alone can enter, and a list of the descriptors of "
        "a process"
    )

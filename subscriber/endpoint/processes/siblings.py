"""Passes on what was posted here to the other processes of the same address. Blocks: not for an event loop."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from ....shared.wire import FRAME_BYTES_MAX
from .calls import Call, call_all
from .listening import Listener, inodes_listening_at, inodes_of, listeners, network, serving
from .messages import Answer, Question, packed
from .own_socket import own_socket
from .places import Hidden, found, hidden

__all__ = ["PassedOn", "Silent", "pass_on"]

_SECONDS_MAX: Final = 1.0
"""How long the answers may take: half of what a fan-out allows an address."""
_REMOVED: Final = "its socket for other processes was removed, or may not be used; it binds another one within seconds"


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
        if not own:
            return PassedOn(doubt=_doubt(problem or "this process has no socket that listens"))
        names = tuple(dict.fromkeys(each.name for each in own))
        # More than the largest message means everything, however long it is.
        question = packed(
            Question(names, network(), any(each.may_have_twins for each in own)), body[: FRAME_BYTES_MAX + 1]
        )
        unreachable = hidden()
        sockets = [each for each in found() if each.address != own_socket.address]
        calls = call_all(sockets, question, _SECONDS_MAX) if sockets else []
        if unreachable:  # others have ended meanwhile, or were being bound
            unreachable = [each for each in hidden() if each in unreachable]
    except (OSError, AttributeError) as error:  # the platform has not what it takes, or no descriptor is left
        return PassedOn(doubt=_doubt(str(error)))
    answers = [call.answer for call in calls if call.answer is not None and call.answer.is_concerned]
    return PassedOn(
        answers=tuple(sorted((each for each in answers if each.error is None), key=lambda each: each.pid)),
        silent=(
            *(Silent(each.pid, each.error) for each in answers if each.error is not None),
            *(_silent(call) for call in calls if _may_serve(call, own)),
            *(Silent(each.pid, _REMOVED) for each in unreachable if _is_of(each, own)),
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


def _is_of(each: Hidden, own: Sequence[Listener]) -> bool:
    """Whether a socket that cannot be called is that of a process here which may serve the address."""
    if each.pid == os.getpid():
        return False
    inodes = inodes_of(each.pid)
    if inodes is None or each.inode not in inodes:
        return False
    twins = inodes_listening_at({listener.port for listener in own if listener.may_have_twins})
    return not inodes.isdisjoint({*twins, *(listener.inode for listener in own)})


def _silent(call: Call) -> Silent:
    return Silent(None if call.peer is None else call.peer.pid, call.problem)


def _doubt(why: str) -> str:
    return (
        "other processes may serve the same address, and it is not known whether they have applied it: "
        f"{why}; expected Unix sockets in a directory that this user alone can enter, and a list of the descriptors of "
        "a process"
    )

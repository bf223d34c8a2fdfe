"""Where processes find each other's sockets: nothing of another user is entered, followed or believed."""

import errno
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcache.subscriber.endpoint.processes import calls, places
from broadcache.subscriber.endpoint.processes.calls import call_all
from broadcache.subscriber.endpoint.processes.messages import (
    Answer,
    Question,
    packed,
    packed_answer,
    received_question,
)
from broadcache.subscriber.endpoint.processes.places import Bound, CannotBind, Found, Peer

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets; /proc")
MESSAGE = packed(Question(("127.0.0.1:80",), "", may_have_twins=False), b"{}")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only directory in which sockets may be; it does not exist yet. Its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="b") as parent:
        own = Path(parent).resolve() / f"broadcache-{os.geteuid()}"
        monkeypatch.setattr(places, "_folders", lambda: [own])
        yield own
        Path(parent).chmod(0o700)


@pytest.fixture
def bound() -> Iterator[list[Bound]]:
    """What is closed in the end."""
    kept: list[Bound] = []
    yield kept
    for each in kept:
        each.socket.close()


def readable_by_all(folder: Path) -> None:
    folder.chmod(0o755)


def test_a_socket_is_in_a_directory_that_this_user_alone_can_enter(folder: Path, bound: list[Bound]) -> None:
    bound.append(places.bind())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert places.found() == [Found(bound[0].address, Path(bound[0].address))]
    assert Path(bound[0].address).name.startswith(f"{os.getpid()}-")
    bound.append(places.bind())
    assert {each.address for each in places.found()} == {each.address for each in bound}


def other_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def symlink(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(0o700)
    folder.symlink_to(elsewhere)


def readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def shared_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    folder.parent.chmod(0o777)


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch()


def a_long_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = folder.parent / ("x" * 100)
    long.mkdir(0o700)
    monkeypatch.setattr(places, "_folders", lambda: [long / f"broadcache-{os.geteuid()}"])


UNUSABLE = [other_users, symlink, readable, shared_parent, a_file, a_long_path]


@on_linux
@pytest.mark.parametrize("spoil", UNUSABLE)
def test_a_directory_that_may_be_another_users_is_not_used_but_an_abstract_name(
    spoil: object, folder: Path, bound: list[Bound], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(spoil)
    spoil(folder, monkeypatch)
    before = sorted(folder.parent.rglob("*"))
    bound.append(places.bind())
    assert bound[0].path is None
    assert sorted(folder.parent.rglob("*")) == before
    assert Found(bound[0].address, None) in places.found()
    assert [each for each in places.found() if each.path is not None] == []


@pytest.mark.parametrize("spoil", UNUSABLE)
def test_without_any_place_the_reasons_are_told(spoil: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(spoil)
    spoil(folder, monkeypatch)
    monkeypatch.setattr(sys, "platform", "other")
    with pytest.raises(CannotBind, match=r"no socket could be bound: .*broadcache-\d+: .+"):
        places.bind()


def test_a_platform_without_unix_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(CannotBind, match="this platform has no Unix sockets"):
        places.bind()


def test_a_stale_socket_is_removed_and_one_that_is_being_bound_is_not(folder: Path, bound: list[Bound]) -> None:
    bound += [places.bind(), places.bind()]
    bound[0].socket.close()  # as if its process had been killed
    unfinished = folder / f".1-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as early:
        early.bind(str(unfinished))  # and does not listen yet
        threading.Thread(target=answer_once, args=(bound[1],)).start()
        called = call_all(places.found(), MESSAGE, 5)
    assert sorted(call.is_gone for call in called) == [False, True]
    assert [each.address for each in places.found()] == [bound[1].address]
    assert unfinished.exists()
    os.utime(unfinished, (0, 0))  # its process ended long ago
    places.found()
    assert not unfinished.exists()


@on_linux
@pytest.mark.parametrize("spoil", [shutil.rmtree, readable_by_all, lambda folder: folder.rename(f"{folder}x")])
def test_a_socket_that_cannot_be_reached_any_more_is_seen(
    spoil: Callable[[Path], object], folder: Path, bound: list[Bound]
) -> None:
    bound.append(places.bind())
    assert places.is_there(bound[0])
    assert os.getpid() not in [each.pid for each in places.hidden()]
    spoil(folder)
    assert (places.is_there(bound[0]), places.found()) == (False, [])
    hidden = [each for each in places.hidden() if each.pid == os.getpid()]
    assert [(each.pid, each.inode) for each in hidden] == [(os.getpid(), os.fstat(bound[0].socket.fileno()).st_ino)]


def test_without_descriptors_nothing_is_taken_for_missing(
    folder: Path, bound: list[Bound], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound.append(places.bind())

    def exhausted(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", exhausted)
    assert places.is_there(bound[0])
    with pytest.raises(OSError, match="Too many open files"):
        places.found()
    monkeypatch.undo()
    found = [Found(bound[0].address, bound[0].path)]
    monkeypatch.setattr(socket, "socket", exhausted)
    [call] = call_all(found, MESSAGE, 0.02)
    assert (call.is_gone, call.answer) == (False, None)
    assert "it could not be called: [Errno 24]" in call.problem


def answer_once(bound: Bound) -> None:
    connection, _ = bound.socket.accept()
    with connection:
        received_question(connection)
        connection.sendall(packed_answer(Answer(pid=7, is_concerned=True, outcome="applied")))


def test_a_socket_of_another_user_is_not_told(
    folder: Path, bound: list[Bound], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound.append(places.bind())
    monkeypatch.setattr(calls, "peer_of", lambda _: Peer(os.geteuid() + 1, 7))
    [call] = call_all(places.found(), MESSAGE, 5)
    assert (call.is_gone, call.answer) == (True, None)
    bound[0].socket.settimeout(5)
    connection, _ = bound[0].socket.accept()
    with connection:
        connection.settimeout(5)
        assert connection.recv(1) == b"", "nothing was sent to it"


def test_a_process_that_does_not_answer_is_named_by_its_pid(folder: Path, bound: list[Bound]) -> None:
    bound.append(places.bind())
    [call] = call_all(places.found(), MESSAGE, 0.05)
    assert (call.is_gone, call.answer, call.problem) == (False, None, "it did not answer in time")
    assert call.peer == Peer(os.geteuid(), os.getpid())


def test_one_whose_queue_is_full_is_tried_until_the_time_is_up(folder: Path, bound: list[Bound]) -> None:
    bound.append(places.bind())
    bound[0].socket.listen(0)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(bound[0].address)
        called = call_all(places.found() * 3, MESSAGE, 0.05)
    assert all(call.answer is None and not call.is_gone for call in called)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400\r\n\r\n", b"bch1" + b"\xff" * 8, b"bch1\0\0\0\2\0\0\0\0[]"])
def test_one_that_answers_anything_else_has_not_applied_it(folder: Path, bound: list[Bound], answer: bytes) -> None:
    bound.append(places.bind())

    def serve() -> None:
        for _ in range(2):
            connection, _ = bound[0].socket.accept()
            with connection:
                received_question(connection)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    [call] = call_all(places.found(), MESSAGE, 5)
    thread.join(5)
    assert (call.answer, call.is_gone) == (None, False)
    assert call.problem

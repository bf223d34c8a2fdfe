"""Which addresses a process serves, by its descriptors."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broadcache.subscriber.endpoint.processes.listening import Listener, inodes_of, listeners, serving

pytestmark = pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs a list of descriptors")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def opened(before: list[Listener]) -> list[Listener]:
    return [each for each in listeners() if each not in before]


def test_what_listens_and_what_is_bound_is_found_and_no_connection(stack: ExitStack, tmp_path: Path) -> None:
    before = listeners()
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = tcp.getsockname()[1]
    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    stack.enter_context(tcp.accept()[0])
    bound = stack.enter_context(socket.socket())
    bound.bind(("127.0.0.1", 0))
    unix = stack.enter_context(socket.socket(socket.AF_UNIX))
    unix.bind(str(tmp_path / "service"))
    unix.listen()
    udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    udp.bind(("127.0.0.1", 0))
    found = {each.name: each.is_listening for each in opened(before)}
    assert found == {
        f"127.0.0.1:{port}": True,
        f"127.0.0.1:{bound.getsockname()[1]}": False,
        f"unix:{tmp_path}/service": True,
    }
    assert opened(before)[0].inode in (inodes_of(os.getpid()) or {opened(before)[0].inode})
    assert f"127.0.0.1:{port}" not in {each.name for each in listeners([tcp.fileno()])}


def test_a_default_timeout_changes_no_socket(stack: ExitStack) -> None:
    one, other = socket.socketpair()
    stack.enter_context(one)
    stack.enter_context(other)
    socket.setdefaulttimeout(5)
    try:
        listeners()
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(one.fileno())
    assert os.get_blocking(other.fileno())


def listener(host: str, port: int | None = 80) -> Listener:
    return Listener(f"{host}:{port}", host, port, is_listening=True, inode=1, may_have_twins=False)


@pytest.mark.parametrize(
    ("host", "server", "accepts"),
    [
        ("127.0.0.2", ("127.0.0.2", 80), True),
        ("127.0.0.1", ("127.0.0.2", 80), False),
        ("127.0.0.2", ("127.0.0.2", 81), False),
        ("0.0.0.0", ("10.0.0.7", 80), True),
        ("0.0.0.0", ("::ffff:10.0.0.7", 80), True),
        ("0.0.0.0", ("fd00::7", 80), False),
        ("::", ("fd00::7", 80), True),
        ("::", ("10.0.0.7", 80), True),
        ("fe80::1", ("fe80::1%eth0", 80), True),
        ("127.0.0.1", ("testserver", 80), False),
        ("127.0.0.1", ("/run/app.sock", None), False),
    ],
)
def test_a_listener_accepts_what_it_is_bound_to(host: str, server: tuple[str, int | None], accepts: bool) -> None:
    assert listener(host).accepts(*server) == accepts


def test_the_address_of_a_request_says_which_one_is_meant_else_all_are() -> None:
    one, other, path = listener("127.0.0.1"), listener("0.0.0.0", 9100), listener("/run/app.sock", None)
    later = one._replace(name="later", is_listening=False)
    found = [one, other, path, later]
    assert serving(found, ("127.0.0.1", 80)) == [one]
    assert serving(found, ("10.0.0.7", 9100)) == [other]
    assert serving(found, ("/run/app.sock", None)) == [path]
    assert serving(found, ("web.example", 443)) == [one, other, path]
    assert serving(found, None) == [one, other, path]
    assert serving([later], None) == []

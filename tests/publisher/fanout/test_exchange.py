"""One request to one address: every way in which a peer may answer, or not."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from tests.support.pods import Behaviour, Pods, answers, hangs, resets, says

from broadcache.publisher.fanout.exchange import exchange
from broadcache.publisher.fanout.response import HttpResponse, NoResponse

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    async with Pods(1) as pods:
        yield pods


async def ask(
    host: str,
    port: int,
    *,
    method: bytes = b"POST",
    target: bytes = b"/x?y=1",
    body: bytes = b"hello",
    headers: tuple[tuple[bytes, bytes], ...] = ((b"Host", b"pod"),),
    timeout_seconds: float = 30,
    answer_bytes_max: int = 1_000,
) -> HttpResponse:
    return await exchange(
        host,
        port,
        method=method,
        target=target,
        headers=headers,
        body=body,
        tls=None,
        connect_timeout_seconds=20,
        timeout_seconds=timeout_seconds,
        answer_bytes_max=answer_bytes_max,
    )


async def test_the_request_arrives_as_it_was_given(pods: Pods) -> None:
    answer = await ask(
        pods[0].host,
        pods.port,
        method=b"REFRESH",
        target=b"/a%2Fb%252541//x/?q=%20a+b&z=%26",
        headers=((b"Host", b"pod"), (b"x-Twice", b"1"), (b"X-twice", b"2"), (b"X-Bytes", b"caf\xe9")),
    )
    assert answer.status_code == 200
    [received] = pods[0].received
    assert (received.method, received.target, received.body) == (
        "REFRESH",
        "/a%2Fb%252541//x/?q=%20a+b&z=%26",
        b"hello",
    )
    assert received.headers == (
        ("Host", "pod"),
        ("x-Twice", "1"),
        ("X-twice", "2"),
        ("X-Bytes", "caf\xe9"),
        ("Connection", "close"),
        ("Content-Length", "5"),
    )


@pytest.mark.parametrize(("method", "length"), [(b"POST", "0"), (b"PURGE", "0"), (b"GET", None), (b"DELETE", None)])
async def test_a_body_of_no_bytes_is_said_to_be_one_where_a_body_is_expected(
    pods: Pods, method: bytes, length: str | None
) -> None:
    await ask(pods[0].host, pods.port, method=method, body=b"")
    assert pods[0].received[0].header("content-length") == length


@pytest.mark.parametrize(
    ("behaviour", "status", "body"),
    [
        (answers(204), 204, b""),
        (answers(500, b"broken"), 500, b"broken"),
        (answers(302, b"", "Location: http://127.0.0.1:1/"), 302, b""),
        (answers(200, b"x" * 5_000), 200, b"x" * 1_000),
        (says(b"HTTP/1.1 200 OK\r\n\r\nuntil the end"), 200, b"until the end"),
        (says(b"HTTP/1.0 200 OK\r\n\r\n"), 200, b""),
        (says(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 201 OK\r\nContent-Length: 0\r\n\r\n"), 201, b""),
        (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), 200, b"abc"),
        # Cut short after its head: what it says of the request has been said.
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"), 200, b"abc"),
    ],
)
async def test_an_answer_counts_once_its_head_has_come(
    pods: Pods, behaviour: Behaviour, status: int, body: bytes
) -> None:
    pods[0].behaviour = behaviour
    assert await ask(pods[0].host, pods.port) == (status, body, None)


async def test_an_answer_to_head_has_no_body(pods: Pods) -> None:
    pods[0].behaviour = answers(200, b"not sent")
    assert await ask(pods[0].host, pods.port, method=b"HEAD", body=b"") == (200, b"", None)


async def test_an_answer_whose_body_never_ends_counts_when_the_time_is_up(pods: Pods) -> None:
    async def begins(received: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await asyncio.Event().wait()

    pods[0].behaviour = begins
    assert await ask(pods[0].host, pods.port, timeout_seconds=0.3) == (200, b"abc", None)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (resets, "the connection was closed before the answer"),
        (says(b""), "the connection was closed before the answer"),
        (says(b"HTTP/1.1 200"), "the connection was closed before the answer"),
        (says(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "the answer is not HTTP/1.1"),
        (says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000), "the answer is not HTTP/1.1"),
        (hangs, "no answer within 0.3 s"),
    ],
)
async def test_what_may_have_arrived_is_not_said_to_be_repeatable(
    pods: Pods, behaviour: Behaviour, problem: str
) -> None:
    pods[0].behaviour = behaviour
    with pytest.raises(NoResponse, match=problem) as failure:
        await ask(pods[0].host, pods.port, timeout_seconds=0.3)
    assert not failure.value.may_be_repeated


async def test_a_refused_connection_may_be_tried_again(pods: Pods) -> None:
    await pods.remove(pods[0].host)
    with pytest.raises(NoResponse, match="connection refused") as failure:
        await ask(pods[0].host, pods.port)
    assert failure.value.may_be_repeated


async def test_a_connection_that_is_not_made_in_time_may_be_tried_again() -> None:
    # A full backlog: the kernel answers no more handshakes.
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        with pytest.raises(NoResponse, match="no connection within") as failure:
            await exchange(
                "127.0.0.1",
                full.getsockname()[1],
                method=b"POST",
                target=b"/",
                headers=((b"Host", b"pod"),),
                body=b"",
                tls=None,
                connect_timeout_seconds=0.2,
                timeout_seconds=20,
                answer_bytes_max=1,
            )
        assert failure.value.may_be_repeated


async def test_a_request_that_is_none_is_refused_before_anybody_is_called(pods: Pods) -> None:
    for method, headers in ((b"BAD METHOD", ()), (b"GET", ((b"Host", b"a"), (b"X", b"a\r\nSmuggled: 1")))):
        with pytest.raises(NoResponse, match="the request cannot be sent"):
            await ask(pods[0].host, pods.port, method=method, headers=headers)
    assert pods[0].connections == 0


async def test_a_caller_that_gives_up_leaves_no_connection(pods: Pods) -> None:
    arrived = asyncio.Event()

    async def never(received: object, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.Event().wait()

    pods[0].behaviour = never
    asking = asyncio.create_task(ask(pods[0].host, pods.port))
    await arrived.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_seconds_to_wait_are_read_only_when_they_are_a_number(pods: Pods) -> None:
    for value, seconds in (("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("9" * 400, None)):
        pods[0].behaviour = answers(503, b"", f"Retry-After: {value}")
        assert (await ask(pods[0].host, pods.port)).retry_after_seconds == seconds


def test_the_web_servers_own_event_loop_is_as_good_as_the_standard_one() -> None:
    async def told() -> tuple[int, bytes]:
        async with Pods(1) as pods:
            pods[0].behaviour = answers(201, b"told")
            answer = await ask(pods[0].host, pods.port)
            return answer.status_code, pods[0].received[0].body

    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(told()) == (201, b"hello")

"""The fan-out over HTTP: every address is told, each has its own outcome, and nothing else is called."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tests.publisher.fanout.test_fanout_policy import (
    IP_LITERALS,
    MALFORMED_PORTS,
    MALFORMED_SERVICES,
    REFUSED_ADDRESSES,
    SERVICES_NOT_ALLOWED,
)
from tests.support.command_line import ask, running
from tests.support.fanout_scene import (
    SERVICE,
    Held,
    Scene,
    exchanged,
    in_turn,
    reply_of,
    request_of,
    scene,
)
from tests.support.pods import Pods, Received, answers, hangs, resets
from tests.support.tls_proxy import new_authority
from tests.support.waiting import until
from tests.support.web_server import web_server

from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.fanout.broadcaster import Broadcaster, Limits
from broadcache.publisher.fanout.discovery import DnsDiscovery
from broadcache.publisher.fanout.policy import FanoutPolicy

pytestmark = pytest.mark.anyio

NETWORKS = ("127.0.0.0/8",)


def broadcaster_of(stage: Scene, limits: Limits | None = None, **options: Any) -> Broadcaster:
    """A broadcaster without a web server in front of it."""
    return Broadcaster(
        DnsDiscovery([stage.dns.address]),
        FanoutPolicy([f"{SERVICE}:*"], networks=NETWORKS),
        limits=limits or Limits(connect_timeout_seconds=20, timeout_seconds=30, deadline_seconds=50),
        **options,
    )


# The answer


async def test_every_address_is_told_and_each_has_its_own_outcome() -> None:
    async with scene(3) as stage:
        stage.pods[1].behaviour = answers(204)
        reply = await stage.send("POST", "/cache-invalidation?x=1", body=b"hello")
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        answer = reply.json
        elapsed_ms = answer.pop("elapsedMs")
        latencies_ms = [response.pop("latencyMs") for response in answer["responses"]]
        assert all(0 < latency_ms <= elapsed_ms for latency_ms in latencies_ms)
        assert answer == {
            "responses": [
                {
                    "statusCode": status,
                    "address": stage.url(index, "/cache-invalidation?x=1"),
                    "error": None,
                    "attempts": 1,
                }
                for index, status in enumerate((200, 204, 200))
            ],
            "total": 3,
            "succeeded": 3,
            "failed": 0,
            "complete": True,
            "discovery": "dns",
            "bodyDropped": False,
            "notes": [],
        }
        assert [pod.received[0].body for pod in stage.pods.all] == [b"hello"] * 3


@pytest.mark.parametrize(("rest", "arrives"), [("", "/"), ("/", "/"), ("?a=1", "/?a=1"), ("/?a=1", "/?a=1")])
async def test_a_path_may_end_with_the_port_and_is_not_redirected(rest: str, arrives: str) -> None:
    async with scene(1) as stage:
        assert (await stage.send("POST", rest)).status == 200
        assert [received.target for received in stage.pods[0].received] == [arrives]


@pytest.mark.parametrize("status", [200, 299])
async def test_any_status_of_the_two_hundreds_is_a_success(status: int) -> None:
    async with scene(2) as stage:
        stage.pods[0].behaviour = answers(status)
        assert (await stage.send()).status == 200


@pytest.mark.parametrize("status", [300, 304, 404, 500])
@pytest.mark.parametrize("failure_status", [400, 502])
async def test_one_address_that_does_not_succeed_makes_the_answer_the_failure_status(
    status: int, failure_status: int
) -> None:
    async with scene(2, fanout_failure_status=failure_status) as stage:
        stage.pods[0].behaviour = answers(status)
        reply = await stage.send()
        assert reply.status == failure_status
        assert reply.statuses == [status, 200]
        assert (reply.json["succeeded"], reply.json["failed"], reply.errors) == (1, 1, [None, None])


async def test_a_head_request_is_answered_by_a_header() -> None:
    async with scene(3) as stage:
        stage.pods[2].behaviour = answers(500)
        reply = await stage.send("HEAD")
        assert (reply.status, reply.body) == (400, b"")
        assert reply.headers["x-broadcache-fanout"] == "total=3, succeeded=2, failed=1, complete=true"
        assert [pod.received[0].method for pod in stage.pods.all] == ["HEAD"] * 3


# What arrives


FORWARDED = ["POST", "PUT", "PATCH", "OPTIONS", "PURGE", "BAN", "REFRESH", "FOOBAR", "QUERY", "M-SEARCH", "post"]


@pytest.mark.parametrize("method", FORWARDED)
async def test_any_method_arrives_with_its_body(method: str) -> None:
    async with scene(2) as stage:
        reply = await stage.send(method, "/x", "Content-Type: text/plain", "Content-Encoding: gzip", body=b"\0\xffbody")
        assert reply.status == 200
        assert reply.json["bodyDropped"] is False
        for pod in stage.pods.all:
            [received] = pod.received
            assert (received.method, received.body) == (method, b"\0\xffbody")
            assert received.header("content-type") == "text/plain"
            assert received.header("content-encoding") == "gzip"
            assert received.header("content-length") == "6"


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "TRACE"])
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
async def test_a_body_without_a_meaning_is_dropped_and_that_is_said(method: str, framing: str) -> None:
    async with scene(1) as stage:
        body = b"hello" if "Length" in framing else b"5\r\nhello\r\n0\r\n\r\n"
        reply = await stage.send(method, "/x", "Content-Type: text/plain", framing, body=body)
        assert reply.status == 200
        assert method == "HEAD" or reply.json["bodyDropped"] is True
        [received] = stage.pods[0].received
        assert (received.method, received.body) == (method, b"")
        for name in ("content-type", "content-length", "transfer-encoding"):
            assert received.header(name) is None


async def test_a_method_that_opens_a_tunnel_is_refused() -> None:
    async with scene(1) as stage:
        reply = await stage.send("CONNECT")
        reply.problem(403, "fanout-refused", "method-not-allowed")
        stage.assert_nobody_was_called()


async def test_only_the_methods_that_are_named_are_sent() -> None:
    async with scene(1, fanout_methods=("PURGE",)) as stage:
        (await stage.send("POST")).problem(403, "fanout-refused", "method-not-allowed")
        stage.assert_nobody_was_called()
        assert (await stage.send("PURGE")).status == 200


async def test_a_chunked_body_arrives_with_its_length_and_an_empty_one_is_said_to_be_empty() -> None:
    async with scene(1) as stage:
        chunked = b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nX-Trailer: 1\r\n\r\n"
        assert (await stage.send("POST", "/x", "Transfer-Encoding: chunked", body=chunked)).status == 200
        assert (await stage.send("POST", "/x", "Content-Type: text/plain")).status == 200
        whole, empty = stage.pods[0].received
        assert (whole.body, whole.header("content-length"), whole.header("transfer-encoding")) == (b"hello", "5", None)
        assert (empty.body, empty.header("content-length"), empty.header("content-type")) == (b"", "0", "text/plain")


@pytest.mark.parametrize(
    "rest", ["/a%2Fb%252541//x/?q=%20a+b&z=%26", "/../%2e%2e/./", "/;p=1,2/@:'()*!$~[]|^`{}", "/x?a?b=/c&&=", "//"]
)
async def test_path_and_query_arrive_byte_for_byte(rest: str) -> None:
    async with scene(1) as stage:
        reply = await stage.send("GET", rest)
        assert reply.status == 200
        assert [received.target for received in stage.pods[0].received] == [rest]
        assert reply.json["responses"][0]["address"] == stage.url(0, rest)


async def test_headers_that_come_twice_arrive_twice_and_in_their_order() -> None:
    async with scene(1) as stage:
        await stage.send("POST", "/x", "X-Key: b", "Accept: */*", "x-key: a", "X-Bytes: caf\xe9", "X-Empty:")
        headers = stage.pods[0].received[0].headers
        kept = [
            (name.lower(), value)
            for name, value in headers
            if name.lower() in {"x-key", "accept", "x-bytes", "x-empty"}
        ]
        assert kept == [("x-key", "b"), ("accept", "*/*"), ("x-key", "a"), ("x-bytes", "caf\xe9"), ("x-empty", "")]
        # Nothing is added in the caller's name.
        assert not {"user-agent", "accept-encoding", "content-type"} & {name.lower() for name, _ in headers}


HOP_BY_HOP = (
    *("Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: X-Sum", "Upgrade: h2c"),
    *("Proxy-Authorization: Basic eA==", "Proxy-Authenticate: Basic", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    *("X-Private: secret", "x-PRIVATE-too: secret", "Expect: 100-continue"),
)


async def test_what_belongs_to_the_connection_stays_here() -> None:
    async with scene(1) as stage:
        named = ("Connection: close, X-Private", "connection: X-Private-Too, upgrade", "X-Kept: 1")
        assert (await stage.send("POST", "/x", *HOP_BY_HOP, *named, body=b"b")).status == 200
        [received] = stage.pods[0].received
        for header in HOP_BY_HOP:
            assert received.header(header.partition(":")[0]) is None
        assert (received.header("connection"), received.header("x-kept")) == ("close", "1")


async def test_the_headers_tell_where_a_request_has_been() -> None:
    async with scene(1) as stage:
        await stage.send("POST")
        await stage.send(
            *("POST", "/x", "Host: cache.example"),
            *("Via: 1.0 edge", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: example"),
        )
        first, second = stage.pods[0].received
        assert first.header("via") == "1.1 broadcache"
        assert first.header("x-forwarded-for") == "127.0.0.1"
        assert first.header("x-forwarded-proto") == "http"
        assert first.header("x-forwarded-host") == "broadcaster.test"
        assert second.header("via") == "1.0 edge, 1.1 broadcache"
        assert second.header("x-forwarded-for") == "192.0.2.1, 127.0.0.1"
        assert second.header("x-forwarded-proto") == "https"
        assert second.header("x-forwarded-host") == "example"


@pytest.mark.parametrize(
    ("mode", "expected"), [("address", "{host}:{port}"), ("service", "web.test:{port}"), ("original", "cache.example")]
)
async def test_the_host_header_says_what_was_asked_for(mode: str, expected: str) -> None:
    async with scene(2, fanout_host=mode) as stage:
        await stage.send("POST", "/x", "Host: cache.example")
        for pod in stage.pods.all:
            assert pod.received[0].header("host") == expected.format(host=pod.host, port=stage.pods.port)


@pytest.mark.parametrize("is_asked_for", [False, True])
async def test_credentials_are_sent_on_only_when_that_is_asked_for(is_asked_for: bool) -> None:
    async with scene(1, fanout_forward_authorization=is_asked_for) as stage:
        await stage.send("POST", "/x", "Authorization: Bearer swordfish", "Cookie: session=1")
        [received] = stage.pods[0].received
        assert received.header("authorization") == ("Bearer swordfish" if is_asked_for else None)
        assert received.header("cookie") == ("session=1" if is_asked_for else None)


async def test_a_cookie_of_a_pod_is_never_sent_to_anybody() -> None:
    async with scene(2, fanout_forward_authorization=True) as stage:
        for pod in stage.pods.all:
            pod.behaviour = answers(200, b"", "Set-Cookie: session=1; Path=/")
        reply = await stage.send()
        assert "set-cookie" not in reply.headers
        await stage.send()
        assert [received.header("cookie") for pod in stage.pods.all for received in pod.received] == [None] * 4


async def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    async with scene(2) as stage:
        stage.dns.a(SERVICE, stage.pods[0].host)
        for status in (301, 302, 303, 307, 308):
            stage.pods[0].behaviour = answers(status, b"", f"Location: {stage.url(1)}")
            reply = await stage.send("GET")
            assert (reply.status, reply.statuses) == (400, [status])
            assert reply.json["responses"][0]["address"] == stage.url(0)
        assert stage.pods[1].connections == 0


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(2) as stage:
        stage.dns.a(SERVICE, stage.pods[0].host)
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, stage.url(1, ""))
        assert (await stage.send()).status == 200
        assert stage.pods.received == [1, 0]


# Who is called


async def test_a_named_port_is_where_srv_records_say_and_may_differ_from_pod_to_pod() -> None:
    async with scene(1) as stage, Pods(hosts=["127.0.0.3"]) as others:
        targets = {"one.web.test": (stage.pods[0].host, stage.pods.port), "two.web.test": ("127.0.0.3", others.port)}
        stage.dns.srv(
            f"_http._tcp.{SERVICE}",
            [(target, port) for target, (_, port) in targets.items()],
            glue={target: [host] for target, (host, _) in targets.items()},
        )
        reply = await stage.send("POST", path=f"/{SERVICE}/http/x?y=1")
        assert reply.status == 200
        assert [response["address"] for response in reply.json["responses"]] == [
            f"http://{host}:{port}/x?y=1" for host, port in targets.values()
        ]
        assert reply.json["discovery"] == "srv"
        assert (stage.pods.received, others.received) == ([1], [1])


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_named_port_leads_only_to_numbers_that_are_allowed(is_allowed: bool) -> None:
    async with Pods(1) as pods:
        more = (f"{SERVICE}:{pods.port}",) if is_allowed else (f"{SERVICE}:{pods.port + 1}",)
        async with scene(1, fanout_allow=(f"{SERVICE}:http", *more)) as stage:
            stage.dns.srv(
                f"_http._tcp.{SERVICE}", [(f"one.{SERVICE}", pods.port)], glue={f"one.{SERVICE}": [pods[0].host]}
            )
            reply = await stage.send("POST", path=f"/{SERVICE}/http/x")
            if is_allowed:
                assert reply.statuses == [200]
            else:
                detail = reply.problem(403, "fanout-refused", "port-not-allowed")["detail"]
                assert f"got {pods.port} for its port 'http'" in detail
            assert pods.received == ([1] if is_allowed else [0])


async def test_a_target_of_another_domain_is_refused_before_anything_is_called() -> None:
    async with scene(1) as stage:
        rows = [(f"one.{SERVICE}", stage.pods.port), ("evil.example", stage.pods.port)]
        stage.dns.srv(f"_http._tcp.{SERVICE}", rows, glue={name: [stage.pods[0].host] for name, _ in rows})
        reply = await stage.send("POST", path=f"/{SERVICE}/http/x")
        reply.problem(403, "fanout-refused", "alias-leaves-service")
        stage.assert_nobody_was_called()


CROSS_SITE = [
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site",),
    ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
    ("Sec-Fetch-Site: cross-site", "Origin: http://broadcaster.test"),
    ("Origin: http://evil.example",),
    ("Origin: null",),
    ("Origin: http://[broadcaster.test",),
    ("Origin: http://broadcaster.test", "Origin: http://evil.example"),
    ("Origin: http://broadcaster.test:81",),
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS", "HEAD"])
async def test_a_web_page_of_another_site_calls_no_replica(method: str, headers: tuple[str, ...]) -> None:
    async with scene(1) as stage:
        reply = await stage.send(method, "/cache-invalidation", *headers, "Content-Type: text/plain", body=b"")
        if method == "HEAD":
            assert reply.status == 403
        else:
            reply.problem(403, "cross-site")
        stage.assert_nobody_was_called()


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Sec-Fetch-Site: none",),
        ("Sec-Fetch-Site: same-origin", "Origin: https://broadcaster.test"),
        ("Origin: http://broadcaster.test",),
        ("Origin: http://BROADCASTER.test",),
    ],
)
async def test_programs_and_pages_of_this_site_call_replicas(headers: tuple[str, ...]) -> None:
    async with scene(1) as stage:
        assert (await stage.send("POST", "/x", *headers)).statuses == [200]


async def test_a_service_of_two_address_families_is_called_once_a_pod() -> None:
    async with scene(2) as stage:
        stage.dns.aaaa(SERVICE, "fd00::2", "fd00::3")
        reply = await stage.send()
        assert (reply.status, reply.json["total"], reply.json["complete"]) == (200, 2, True)
        assert stage.pods.received == [1, 1]


async def test_a_service_without_addresses_is_not_found() -> None:
    async with scene(1) as stage:
        stage.dns.a(SERVICE)
        (await stage.send()).problem(404, "service-not-found")
        (await stage.send("POST", path=f"/{SERVICE}/http")).problem(404, "service-not-found")
        stage.assert_nobody_was_called()


@pytest.mark.parametrize("failure", ["SERVFAIL", "REFUSED"])
async def test_a_name_server_that_fails_is_not_a_service_that_is_missing(failure: Any) -> None:
    async with scene(1) as stage:
        for family in ("A", "AAAA"):
            stage.dns.fails(SERVICE, family, failure)
        (await stage.send()).problem(502, "resolver-failed")
        stage.assert_nobody_was_called()
        for family in ("A", "AAAA"):
            stage.dns.heals(SERVICE, family)
        assert (await stage.send()).status == 200


async def test_a_name_server_that_is_silent_is_a_timeout() -> None:
    async with scene(1) as stage:
        for family in ("A", "AAAA"):
            stage.dns.is_silent(SERVICE, family)
        (await stage.send()).problem(504, "resolver-timed-out")
        stage.assert_nobody_was_called()


async def test_a_list_that_was_cut_off_is_said_to_be_incomplete() -> None:
    async with scene(3) as stage:
        stage.dns.a(SERVICE, *stage.pods.hosts, *(f"127.0.1.{n}" for n in range(1, 101)))
        stage.dns.truncates_tcp_at(3)
        reply = await stage.send()
        assert (reply.status, reply.json["total"], reply.json["complete"]) == (200, 3, False)
        assert "cut off after 3 records" in reply.json["notes"][0]
        head = await stage.send("HEAD")
        assert head.headers["x-broadcache-fanout"].endswith("complete=false")


async def test_a_family_that_is_not_known_makes_the_answer_incomplete() -> None:
    async with scene(2) as stage:
        stage.dns.fails(SERVICE, "AAAA", "SERVFAIL")
        reply = await stage.send()
        assert (reply.status, reply.json["total"], reply.json["complete"]) == (200, 2, False)


async def test_a_pod_that_comes_up_during_the_round_is_called_too() -> None:
    async with scene(3) as stage:
        stage.dns.a(SERVICE, *stage.pods.hosts[:2])

        async def comes_up(received: Received, writer: asyncio.StreamWriter) -> None:
            stage.dns.a(SERVICE, *stage.pods.hosts)
            await answers()(received, writer)

        stage.pods[0].behaviour = comes_up
        reply = await stage.send()
        assert reply.statuses == [200, 200, 200]
        assert stage.pods.received == [1, 1, 1]
        assert reply.json["notes"] == ["addresses that appeared during the broadcast, and were called too: 1"]


async def test_a_second_look_that_fails_spoils_nothing_and_is_said() -> None:
    async with scene(2) as stage:

        async def breaks(received: Received, writer: asyncio.StreamWriter) -> None:
            stage.dns.fails(SERVICE, "A", "SERVFAIL")
            stage.dns.fails(SERVICE, "AAAA", "SERVFAIL")
            await answers()(received, writer)

        stage.pods[0].behaviour = breaks
        reply = await stage.send()
        assert (reply.status, reply.statuses) == (200, [200, 200])
        assert "replicas that started during the broadcast may be missing" in reply.json["notes"][0]


# One that fails


@contextlib.contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """Something that listens and takes no connection: its backlog is full, and the kernel answers no handshake."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind((host, port))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect((host, port))
        yield


async def test_one_dead_one_refusing_one_hanging_one_slow_and_one_failing_pod_spoil_nothing_for_the_others() -> None:
    async with scene(20, fanout_connect_timeout_seconds=1.5, fanout_timeout_seconds=4) as stage:
        dead, refusing, hanging, slow, failing = range(2, 17, 3)
        await stage.pods.remove(stage.pods[dead].host)
        await stage.pods.remove(stage.pods[refusing].host)
        stage.pods[hanging].behaviour = hangs
        stage.pods[failing].behaviour = answers(500)
        others = [index for index in range(20) if index not in {dead, refusing, hanging, slow, failing}]

        async def is_slow(received: Received, writer: asyncio.StreamWriter) -> None:
            await until(lambda: all(stage.pods[index].received for index in others), "the others are called meanwhile")
            await answers()(received, writer)

        stage.pods[slow].behaviour = is_slow
        with black_hole(stage.pods[dead].host, stage.pods.port):
            reply = await stage.send()
        assert reply.status == 400
        assert [response["address"] for response in reply.json["responses"]] == [stage.url(n) for n in range(20)]
        expected = {dead: None, refusing: None, hanging: None, failing: 500}
        assert reply.statuses == [expected.get(index, 200) for index in range(20)]
        assert "no connection within" in (reply.errors[dead] or "")
        assert reply.errors[refusing] == "connection refused"
        assert reply.errors[hanging] == "no answer within 4 s"
        assert [index for index, error in enumerate(reply.errors) if error] == [dead, refusing, hanging]
        assert (reply.json["total"], reply.json["succeeded"], reply.json["failed"]) == (20, 16, 4)
        assert [stage.pods[index].received[0].body for index in others] == [b""] * len(others)


async def test_who_has_not_been_called_by_the_deadline_is_named_as_such() -> None:
    limits: dict[str, Any] = {"fanout_timeout_seconds": 0.5, "fanout_deadline_seconds": 0.5, "fanout_concurrency": 1}
    async with scene(3, **limits) as stage:
        stage.pods[0].behaviour = hangs
        reply = await stage.send()
        assert reply.statuses[0] is None
        assert reply.attempts[2] == 0
        assert reply.errors[2] == "not tried: the deadline of 0.5 s had passed"
        assert stage.pods[2].connections == 0


# Trying again


async def test_a_pod_that_refused_and_now_listens_gets_a_post_too() -> None:
    async with scene(1) as stage, contextlib.AsyncExitStack() as stack:
        host = stage.pods[0].host
        await stage.pods.remove(host)
        received: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        listeners: list[socket.socket] = []

        def listens_before_the_next_attempt() -> float:
            listeners.append(socket.create_server((host, stage.pods.port)))
            return 0.0

        async with broadcaster_of(stage, uniform=listens_before_the_next_attempt) as broadcaster:
            broadcasting = asyncio.create_task(broadcaster.broadcast(stage.request("POST", headers=((b"X", b"1"),))))
            await until(lambda: listeners, "the first attempt is over")
            server = await asyncio.start_server(serve, sock=listeners[0])
            stack.callback(server.close)
            broadcast = await broadcasting
        assert [(outcome.status_code, outcome.attempts) for outcome in broadcast.outcomes] == [(200, 2)]
        assert len(received) == 1


@pytest.mark.parametrize(
    ("method", "headers", "attempts"),
    [
        ("POST", (), 1),
        ("PURGE", (), 1),
        ("PATCH", (), 1),
        ("PUT", (), 2),
        ("DELETE", (), 2),
        ("QUERY", (), 2),
        ("POST", ("Idempotency-Key: 1",), 2),
    ],
)
@pytest.mark.parametrize("how", ["reset", "503"])
async def test_what_may_have_been_acted_on_is_sent_again_only_when_that_is_harmless(
    method: str, headers: tuple[str, ...], attempts: int, how: str
) -> None:
    async with scene(2) as stage:
        first = resets if how == "reset" else answers(503)
        stage.pods[0].behaviour = in_turn(first, answers(201))
        reply = await stage.send(method, "/x", *headers)
        assert stage.pods.received == [attempts, 1]
        assert reply.attempts == [attempts, 1]
        if attempts == 2:
            assert (reply.status, reply.statuses) == (200, [201, 200])
        else:
            assert (reply.status, reply.statuses) == (400, [None if how == "reset" else 503, 200])


async def test_a_request_is_sent_three_times_at_most() -> None:
    async with scene(1) as stage:
        stage.pods[0].behaviour = answers(503)
        assert (await stage.send("GET")).attempts == [3]
        assert stage.pods.received == [3]


async def test_a_pod_that_wants_to_wait_longer_than_there_is_time_is_not_asked_again() -> None:
    async with scene(1) as stage:
        stage.pods[0].behaviour = in_turn(answers(503, b"", "Retry-After: 100"), answers())
        reply = await stage.send("GET")
        assert (reply.statuses, reply.attempts) == ([503], [1])


@pytest.mark.parametrize("status", [404, 500, 501])
async def test_an_answer_that_says_no_is_not_asked_for_again(status: int) -> None:
    async with scene(1) as stage:
        stage.pods[0].behaviour = answers(status)
        assert (await stage.send("GET")).attempts == [1]


# Bounds


async def test_no_more_addresses_are_called_at_a_time_than_allowed() -> None:
    async with scene(6, fanout_concurrency=2) as stage:
        held = Held(answers())
        for pod in stage.pods.all:
            pod.behaviour = held.behave
        sending = asyncio.create_task(stage.send())
        await until(lambda: held.arrived >= 2, "two are called")
        for _ in range(3):  # whoever was called with them would have arrived by the time that others are answered
            assert (await stage.send("GET", path="/health/live")).status == 200
        assert sum(pod.connections for pod in stage.pods.all) == 2
        held.released.set()
        assert (await sending).json["succeeded"] == 6


async def test_one_broadcast_more_than_allowed_is_told_to_come_again() -> None:
    async with scene(1, fanout_broadcasts_max=1) as stage:
        held = Held(answers())
        stage.pods[0].behaviour = held.behave
        sending = asyncio.create_task(stage.send())
        await until(lambda: held.arrived, "the first is under way")
        refused = await stage.send()
        refused.problem(429, "broadcasts-too-many")
        assert refused.headers["retry-after"] == "1"
        held.released.set()
        assert (await sending).status == 200
        assert (await stage.send()).status == 200
        assert stage.pods.received == [2]


@pytest.mark.parametrize("framing", ["Content-Length: 1025", "Transfer-Encoding: chunked"])
async def test_a_body_that_is_too_large_is_sent_to_nobody(framing: str) -> None:
    async with scene(1, request_bytes_max=1_024) as stage:
        body = b"b" * 1_025 if "Length" in framing else b"401\r\n" + b"b" * 1_025 + b"\r\n0\r\n\r\n"
        (await stage.send("POST", "/x", framing, body=body)).problem(413, "body-too-large")
        stage.assert_nobody_was_called()
        assert stage.dns.queries == []
        assert (await stage.send("POST", "/x", body=b"b" * 1_024)).status == 200


async def test_no_more_of_an_answer_is_read_than_is_wanted() -> None:
    async with scene(1) as stage:
        written_bytes = 0

        async def never_ends(received: Received, writer: asyncio.StreamWriter) -> None:
            nonlocal written_bytes
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                written_bytes += 65_536

        stage.pods[0].behaviour = never_ends
        assert (await stage.send()).statuses == [200]
        assert written_bytes < 2**26  # what buffers hold on the way, and not what fits into the time


# Callers that leave, and servers that end


async def test_a_caller_that_leaves_leaves_no_pod_untold() -> None:
    async with scene(5, fanout_concurrency=1) as stage:
        held = Held(answers())
        for pod in stage.pods.all:
            pod.behaviour = held.behave
        _, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        writer.write(request_of("POST", f"{stage.path}/x"))
        await until(lambda: held.arrived == 1, "the first is called")
        writer.transport.abort()
        assert (await stage.send("GET", path="/health/live")).status == 200
        held.released.set()
        await until(lambda: stage.pods.received == [1] * 5, "all are told")


async def test_a_caller_that_is_cancelled_leaves_no_pod_untold_and_leaving_waits_for_them() -> None:
    async with scene(5) as stage:
        held = Held(answers())
        for pod in stage.pods.all:
            pod.behaviour = held.behave
        limits = Limits(connect_timeout_seconds=20, timeout_seconds=30, deadline_seconds=50, concurrency=1)
        async with broadcaster_of(stage, limits) as broadcaster:
            calling = asyncio.create_task(broadcaster.broadcast(stage.request()))
            await until(lambda: held.arrived == 1, "the first is called")
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            held.released.set()
        assert stage.pods.received == [1] * 5


async def test_a_caller_that_leaves_before_all_of_its_request_has_come_begins_nothing() -> None:
    async with scene(1) as stage:
        _, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        writer.write(request_of("POST", f"{stage.path}/x", ["Content-Length: 100"], b"half"))
        await writer.drain()
        writer.transport.abort()
        assert (await stage.send("GET", path="/health/live")).status == 200
        stage.assert_nobody_was_called()


@pytest.mark.parametrize("caller", ["waits", "leaves"])
async def test_a_server_that_ends_carries_out_what_is_under_way(caller: str) -> None:
    async with scene(3, fanout_concurrency=1) as stage:
        held = Held(answers())
        for pod in stage.pods.all:
            pod.behaviour = held.behave
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        writer.write(request_of("POST", f"{stage.path}/x"))
        await until(lambda: held.arrived == 1, "the first is called")
        if caller == "leaves":
            writer.transport.abort()
        stage.server.should_exit = True

        async def is_closed() -> bool:
            try:
                _, another = await asyncio.open_connection("127.0.0.1", stage.port)
            except ConnectionError:
                return True
            another.transport.abort()
            return False

        while not await is_closed():
            await asyncio.sleep(0.01)
        assert held.arrived == 1
        held.released.set()
        if caller == "waits":
            assert reply_of(await reader.read()).json["succeeded"] == 3
            writer.transport.abort()
        await until(lambda: stage.pods.received == [1, 1, 1], "all are told")


# What is refused


async def test_a_broadcast_that_comes_back_is_not_sent_again() -> None:
    async with scene(1) as stage:
        for via in ("1.1 broadcache", "1.0 edge, 1.1 broadcache (comment)", "HTTP/1.1 broadcache"):
            (await stage.send("POST", "/x", f"Via: {via}")).problem(508, "broadcast-loop")
        stage.assert_nobody_was_called()
        assert (await stage.send("POST", "/x", "Via: 1.1 broadcache-of-others")).status == 200


async def test_a_fan_out_that_finds_itself_ends_after_one_hop() -> None:
    async with scene(1) as stage:
        stage.dns.a("web.test", "127.0.0.1")
        reply = await stage.send("POST", path=f"/{SERVICE}/{stage.port}/{SERVICE}/{stage.pods.port}/x")
        assert (reply.status, reply.statuses) == (400, [508])
        stage.assert_nobody_was_called()


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.9", "0.0.0.0", "224.0.0.1"])
async def test_one_address_that_may_not_be_called_refuses_the_whole_broadcast(address: str) -> None:
    async with scene(2) as stage:
        stage.dns.a(SERVICE, stage.pods[0].host, address, stage.pods[1].host)
        rule = "address-not-allowed" if address == "10.0.0.9" else "address-refused"
        problem = (await stage.send()).problem(403, "fanout-refused", rule)
        assert address in problem["detail"]
        stage.assert_nobody_was_called()


async def test_no_refused_address_is_called_whatever_record_names_it() -> None:
    async with scene(2, fanout_networks=()) as stage:
        count = 0
        for form in REFUSED_ADDRESSES:
            try:
                address = ipaddress.ip_address(form)
            except ValueError:
                continue
            if "%" in form:
                continue
            stage.dns.a(SERVICE, *([form] if address.version == 4 else []))
            stage.dns.aaaa(SERVICE, *([form] if address.version == 6 else []))
            (await stage.send()).problem(403, "fanout-refused", "address-refused")
            count += 1
        assert count >= 35
        stage.assert_nobody_was_called()


async def test_an_alias_of_something_outside_is_not_followed() -> None:
    async with scene(1) as stage:
        stage.dns.a(SERVICE)
        stage.dns.cname(SERVICE, "elsewhere.example")
        stage.dns.a("elsewhere.example", stage.pods[0].host)
        (await stage.send()).problem(403, "fanout-refused", "alias-leaves-service")
        stage.assert_nobody_was_called()


def hostile_paths(port: int) -> Iterator[tuple[str, set[str | None]]]:
    """Every form of the tables, as it can be written in a request line, with the rules that may refuse it."""
    for forms, rules in (
        (IP_LITERALS, {"ip-literal"}),
        (MALFORMED_SERVICES, {"ip-literal", None}),
        (SERVICES_NOT_ALLOWED, {"service-not-allowed", "ip-literal"}),
    ):
        for form in forms:
            yield f"/{_written(form)}/{port}/latest/meta-data/", {*rules}
    for form in MALFORMED_PORTS:
        yield f"/web/{_written(form)}/x", {None}


def _written(form: str) -> str:
    return quote(form.encode("utf-8", "surrogatepass"), safe="%[]:@!$&'()*+,;=-._~\\^`{}|<>\"")


async def test_no_form_of_an_address_reaches_a_name_server_or_a_pod() -> None:
    async with scene(1, fanout_allow=("web:*", "web.prod.svc.cluster.local:*", "localhost:80", "web.test:*")) as stage:
        table = list(hostile_paths(stage.pods.port))
        assert len({path for path, _ in table}) >= 120
        let_through = []
        for path, rules in table:
            for method in ("GET", "POST"):
                reply = await stage.send(method, path=path)
                if reply.status not in (403, 422) or reply.json.get("rule") not in rules:
                    let_through.append((method, path, reply.status, reply.body))
        assert let_through == []
        assert stage.dns.queries == []
        stage.assert_nobody_was_called()
        # The negative control: what is allowed does reach both.
        assert (await stage.send()).status == 200
        assert stage.dns.queries
        assert stage.pods.received == [1]


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/", "http://web.test/web.test/1/x", "//web.test/1/x"])
async def test_a_target_with_a_host_of_its_own_names_no_service(target: str) -> None:
    async with scene(1) as stage:
        assert (await stage.send("GET", path=target)).status in (403, 404, 422)
        stage.assert_nobody_was_called()
        assert stage.dns.queries == []


@pytest.mark.parametrize("port", ["0", "65536", "-1", "0x50", "%38%30", "*", "http!"])
async def test_a_port_that_is_none_is_named_as_such(port: str) -> None:
    async with scene(1) as stage:
        (await stage.send("POST", path=f"/{SERVICE}/{port}/x")).problem(422, "service-invalid")


async def test_a_service_or_port_that_is_not_allowed_is_refused_by_name() -> None:
    async with scene(1, fanout_allow=("web.test:8080",)) as stage:
        (await stage.send("POST", path="/web.test/8081")).problem(403, "fanout-refused", "port-not-allowed")
        (await stage.send("POST", path="/webb.test/8080")).problem(403, "fanout-refused", "service-not-allowed")
        assert stage.dns.queries == []


async def test_a_fan_out_that_is_off_says_so() -> None:
    async with scene(1, fanout_allow=()) as stage:
        for path in (stage.path, f"{stage.path}/x", "/127.0.0.1/80", "/anything/at%20all"):
            (await stage.send("POST", path=path)).problem(403, "fanout-refused", "fan-out-off")
        stage.assert_nobody_was_called()


async def test_a_broadcast_takes_a_token_that_may_write_whatever_its_method() -> None:
    async with scene(1, tokens=("rw:writer", "ro:reader")) as stage:
        for method in ("GET", "HEAD", "POST", "PURGE"):
            assert (await stage.send(method)).status == 401
            assert (await stage.send(method, "/x", "Authorization: Bearer reader")).status == 403
        (await stage.send("GET", "/x", "Authorization: Bearer reader")).problem(403, "right-missing")
        stage.assert_nobody_was_called()
        assert stage.dns.queries == []
        assert (await stage.send("GET", "/x", "Authorization: Bearer writer")).status == 200
        assert stage.pods[0].received[0].header("authorization") is None


async def test_the_paths_of_the_api_stay_its_own(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, fanout_allow=("invalidations:*", "health:*", "web.test:*"))
    async with web_server(create_app(settings)) as (port, _):

        async def send(method: str, path: str) -> Any:
            return reply_of(await exchanged(port, request_of(method, path)))

        assert (await send("GET", "/health/live")).json == {"status": "live"}
        (await send("DELETE", "/invalidations")).problem(405, "method-not-allowed")
        (await send("BAN", "/invalidations")).problem(405, "method-not-allowed")
        for path in ("/invalidations/80", "/health/80/x", "/health/live/x", "/openapi.json/80", "/web.test"):
            (await send("POST", path)).problem(404, "not-found")
        # The negative control: what is nobody's is the fan-out's.
        (await send("POST", "/elsewhere/80")).problem(403, "fanout-refused", "service-not-allowed")


# What is written down


async def test_every_broadcast_leaves_one_line_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(2) as stage:
        stage.pods[1].behaviour = answers(500)
        with caplog.at_level(logging.INFO, "broadcache.fanout"):
            await stage.send("PURGE", "/cache?token=swordfish", "Authorization: Bearer swordfish", body=b"swordfish")
            await stage.send("POST", path="/elsewhere/80/x?token=swordfish")
        done, refused = (record.getMessage() for record in caplog.records if record.name == "broadcache.fanout")
        assert done.startswith(
            f"broadcast PURGE '/cache' to {SERVICE}:{stage.pods.port} for 127.0.0.1: 1 of 2 succeeded in "
        )
        assert done.endswith(f"; failed: {stage.url(1, '/cache')} (500)")
        assert refused.startswith("broadcast refused: POST '/elsewhere/80/x' for 127.0.0.1: ")
        assert "swordfish" not in caplog.text


# TLS


@pytest.mark.parametrize(("name", "is_right"), [("web.test", True), ("other.test", False)])
async def test_a_certificate_has_to_be_for_the_service(name: str, is_right: bool, tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "authority", name)
    tls = authority.server_context(wants_client_certificate=False)
    async with scene(2, tls=tls, fanout_scheme="https", fanout_ca_file=str(authority.ca_file)) as stage:
        reply = await stage.send()
        assert reply.json["responses"][0]["address"] == stage.url(0).replace("http:", "https:")
        if is_right:
            assert (reply.status, reply.statuses) == (200, [200, 200])
        else:
            assert (reply.status, reply.statuses, stage.pods.received) == (400, [None, None], [0, 0])
            assert all("TLS failed" in (error or "") for error in reply.errors)


async def test_a_name_for_certificates_may_be_given(tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "authority", "other.test")
    tls = authority.server_context(wants_client_certificate=False)
    options: dict[str, Any] = {
        "fanout_scheme": "https",
        "fanout_ca_file": str(authority.ca_file),
        "fanout_tls_name": "other.test",
    }
    async with scene(1, tls=tls, **options) as stage:
        assert (await stage.send()).statuses == [200]


# The process


async def test_the_command_serves_what_the_environment_allows() -> None:
    async with scene(2) as stage:
        stage.pods[1].behaviour = answers(500)
        variables = {
            "BROADCACHE_FANOUT_ALLOW": f"{SERVICE}:{stage.pods.port},other:http",
            "BROADCACHE_FANOUT_NETWORKS": "127.0.0.0/8",
            "BROADCACHE_FANOUT_NAMESERVERS": stage.dns.address,
            "BROADCACHE_FANOUT_FAILURE_STATUS": "502",
            "BROADCACHE_FANOUT_CONNECT_TIMEOUT_SECONDS": "20",
            "BROADCACHE_FANOUT_TIMEOUT_SECONDS": "30",
            "HTTP_PROXY": "http://127.0.0.1:9",
        }

        def broadcast() -> None:
            with running("serve", "--fanout-only", "--port", "0", **variables) as command:
                url = command.url()
                status, answer = ask("PURGE", f"{url}{stage.path}/cache-invalidation?x=1", {"everything": True})
                assert (status, [response["statusCode"] for response in answer["responses"]]) == (502, [200, 500]), (
                    answer
                )
                status, answer = ask("POST", f"{url}/{SERVICE}/{stage.pods.port + 1}")
                assert (status, answer["rule"]) == (403, "port-not-allowed")
                code, log = command.end(signal.SIGTERM)
                assert code == 0
                assert "broadcast PURGE '/cache-invalidation'" in log

        await asyncio.to_thread(broadcast)
        assert [json.loads(pod.received[0].body) for pod in stage.pods.all] == [{"everything": True}] * 2

"""What is known to go wrong where one request is fanned out to all pods of a service, and does not here.

The numbers are those of the list that this was built against: 26 defects of a broadcaster that many have copied.
"""

import asyncio
from typing import Any

import pytest
from tests.support.fanout_scene import SERVICE, Held, request_of, scene
from tests.support.pods import Received, answers, hangs, resets
from tests.support.tls_proxy import new_authority
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def test_defect_01_one_pod_that_gives_no_answer_takes_the_answers_of_all_others_away() -> None:
    async with scene(4) as stage:
        await stage.pods.remove(stage.pods[1].host)
        stage.pods[2].behaviour = resets
        reply = await stage.send()
        assert (reply.status, reply.statuses) == (400, [200, None, None, 200])
        assert [error is None for error in reply.errors] == [True, False, False, True]


async def test_defect_02_one_pod_that_hangs_holds_the_answer_up_for_minutes() -> None:
    async with scene(2, fanout_timeout_seconds=0.5, fanout_connect_timeout_seconds=0.5) as stage:
        stage.pods[0].behaviour = hangs
        reply = await stage.send()
        assert (reply.statuses[0], reply.errors[0]) == (None, "no answer within 0.5 s")


async def test_defect_03_a_name_server_that_fails_is_told_as_a_service_that_is_not_there() -> None:
    async with scene(1) as stage:
        (await stage.send("POST", path="/web.test/http")).problem(404, "service-not-found")
        for family in ("A", "AAAA"):
            stage.dns.fails(SERVICE, family, "SERVFAIL")
        (await stage.send()).problem(502, "resolver-failed")


@pytest.mark.parametrize("host", ["169.254.169.254", "127.0.0.1", "localhost", "2130706433", "[::1]", "elsewhere.test"])
async def test_defect_04_any_host_can_be_called(host: str) -> None:
    async with scene(1) as stage:
        stage.dns.a("elsewhere.test", *stage.pods.hosts)
        assert (await stage.send("GET", path=f"/{host}/{stage.pods.port}/latest/meta-data/")).status == 403
        stage.assert_nobody_was_called()


async def test_defect_05_redirects_lead_to_any_host() -> None:
    async with scene(2) as stage:
        stage.dns.a(SERVICE, stage.pods[0].host)
        stage.pods[0].behaviour = answers(302, b"", f"Location: {stage.url(1)}")
        reply = await stage.send()
        assert (reply.status, reply.statuses, stage.pods.received) == (400, [302], [1, 0])


async def test_defect_06_a_cookie_of_one_pod_is_sent_to_all_later() -> None:
    async with scene(1) as stage:
        stage.pods[0].behaviour = answers(200, b"", "Set-Cookie: session=1")
        await stage.send()
        await stage.send()
        assert [received.header("cookie") for received in stage.pods[0].received] == [None, None]


async def test_defect_07_headers_of_the_connection_go_on() -> None:
    async with scene(1) as stage:
        await stage.send("POST", "/x", "Connection: close, X-Own", "X-Own: 1", "Keep-Alive: 5", "TE: x", "Upgrade: h2c")
        [received] = stage.pods[0].received
        assert [received.header(name) for name in ("x-own", "keep-alive", "te", "upgrade")] == [None] * 4
        assert received.header("connection") == "close"


async def test_defect_08_a_chunked_request_without_a_body_to_forward_fails_for_all() -> None:
    async with scene(2) as stage:
        reply = await stage.send("DELETE", "/x", "Transfer-Encoding: chunked", body=b"2\r\nhi\r\n0\r\n\r\n")
        assert (reply.status, reply.statuses) == (200, [200, 200])
        assert stage.pods[0].received[0].header("transfer-encoding") is None


async def test_defect_09_an_expectation_is_handed_on_and_waited_for_at_each_pod() -> None:
    async with scene(1) as stage:
        assert (await stage.send("POST", "/x", "Expect: 100-continue", body=b"hello")).status == 200
        assert (stage.pods[0].received[0].header("expect"), stage.pods[0].received[0].body) == (None, b"hello")


async def test_defect_10_answers_are_not_read_and_connections_stay_open() -> None:
    async with scene(2) as stage:
        closed: list[bytes] = []

        async def answers_and_waits(received: Received, writer: asyncio.StreamWriter) -> None:
            await answers(200, b"x" * 1_000_000)(received, writer)
            try:
                await writer.drain()
                while not writer.transport.is_closing():
                    await asyncio.sleep(0.005)
                await writer.wait_closed()
            except OSError:
                pass
            closed.append(received.body)

        for pod in stage.pods.all:
            pod.behaviour = answers_and_waits
        assert (await stage.send()).status == 200
        await until(lambda: len(closed) == 2, "both connections are closed")


async def test_defect_11_a_body_is_dropped_and_nobody_is_told() -> None:
    async with scene(1) as stage:
        assert (await stage.send("DELETE", body=b"hello")).json["bodyDropped"] is True
        assert (await stage.send("DELETE")).json["bodyDropped"] is False
        assert (await stage.send("POST", body=b"hello")).json["bodyDropped"] is False


async def test_defect_12_a_path_is_decoded_twice() -> None:
    async with scene(1) as stage:
        await stage.send("GET", "/a%2Fb%2541%252541//?q=%2541")
        assert stage.pods[0].received[0].target == "/a%2Fb%2541%252541//?q=%2541"


async def test_defect_13_encrypted_pods_cannot_be_called_by_their_addresses(tmp_path: Any) -> None:
    authority = new_authority(tmp_path / "authority", SERVICE)
    tls = authority.server_context(wants_client_certificate=False)
    async with scene(1, tls=tls, fanout_scheme="https", fanout_ca_file=str(authority.ca_file)) as stage:
        assert (await stage.send()).statuses == [200]


async def test_defect_14_the_host_header_is_an_address_that_nobody_serves() -> None:
    async with scene(1, fanout_host="service") as stage:
        await stage.send()
        assert stage.pods[0].received[0].header("host") == f"{SERVICE}:{stage.pods.port}"


async def test_defect_15_a_pod_of_two_address_families_is_called_twice() -> None:
    async with scene(2) as stage:
        stage.dns.aaaa(SERVICE, "fd00::2", "fd00::3")
        assert (await stage.send()).json["total"] == 2


async def test_defect_16_a_virtual_address_hides_all_pods_but_one_and_the_answer_says_all_is_well() -> None:
    async with scene(1) as stage:
        # What a service that is not headless looks like: its ports' records lead back to it.
        for name in (SERVICE, f"_http._tcp.{SERVICE}"):
            stage.dns.srv(name, [(SERVICE, stage.pods.port)])
        for port in (stage.pods.port, "http"):
            reply = await stage.send("POST", path=f"/{SERVICE}/{port}/x")
            assert (reply.json["total"], reply.json["complete"]) == (1, False)
            assert "one virtual address" in reply.json["notes"][0]


async def test_defect_17_a_pod_that_is_not_ready_and_is_published_is_told_all_the_same() -> None:
    async with scene(2) as stage:

        async def is_not_ready(received: Received, writer: asyncio.StreamWriter) -> None:
            await answers(503 if received.target == "/health" else 200)(received, writer)

        stage.pods[1].behaviour = is_not_ready
        assert (await stage.send("POST", "/health")).statuses == [200, 503]
        assert (await stage.send("POST", "/cache-invalidation")).statuses == [200, 200]


async def test_defect_18_a_long_list_is_cut_off_where_a_datagram_ends() -> None:
    async with scene(100) as stage:
        reply = await stage.send()
        assert (reply.status, reply.json["succeeded"], reply.json["complete"]) == (200, 100, True)
        assert stage.pods.received == [1] * 100
        assert "tcp" in {query.transport for query in stage.dns.queries}


async def test_defect_19_proxies_of_the_environment_hear_what_was_meant_for_pods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scene(2) as stage:
        stage.dns.a(SERVICE, stage.pods[0].host)
        monkeypatch.setenv("HTTP_PROXY", stage.url(1, ""))
        monkeypatch.setenv("http_proxy", stage.url(1, ""))
        assert (await stage.send()).status == 200
        assert stage.pods.received == [1, 0]


@pytest.mark.parametrize("port", ["0", "65536", "-1", "99999999999"])
async def test_defect_20_a_port_that_is_none_makes_the_server_fail(port: str) -> None:
    async with scene(1) as stage:
        (await stage.send("POST", path=f"/{SERVICE}/{port}/x")).problem(422, "service-invalid")


async def test_defect_21_nothing_is_bounded() -> None:
    async with scene(1, fanout_broadcasts_max=1, request_bytes_max=1_024, tokens=("swordfish",)) as stage:
        token = "Authorization: Bearer swordfish"
        assert (await stage.send()).status == 401
        (await stage.send("POST", "/x", token, body=b"b" * 1_025)).problem(413, "body-too-large")
        held = Held(answers())
        stage.pods[0].behaviour = held.behave
        sending = asyncio.create_task(stage.send("POST", "/x", token))
        await until(lambda: held.arrived, "one is under way")
        (await stage.send("POST", "/x", token)).problem(429, "broadcasts-too-many")
        held.released.set()
        assert (await sending).status == 200


async def test_defect_22_a_caller_that_leaves_leaves_half_of_the_pods_untold() -> None:
    async with scene(3, fanout_concurrency=1) as stage:
        held = Held(answers())
        for pod in stage.pods.all:
            pod.behaviour = held.behave
        _, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        writer.write(request_of("POST", f"{stage.path}/x"))
        await until(lambda: held.arrived == 1, "the first is called")
        writer.transport.abort()
        assert (await stage.send("GET", path="/health/live")).status == 200
        held.released.set()
        await until(lambda: stage.pods.received == [1, 1, 1], "all are told")


async def test_defect_23_the_answer_does_not_say_how_many_how_long_and_how_often() -> None:
    async with scene(2) as stage:
        answer = (await stage.send()).json
        assert (answer["total"], answer["succeeded"], answer["failed"]) == (2, 2, 0)
        assert answer["elapsedMs"] > 0
        assert [response["attempts"] for response in answer["responses"]] == [1, 1]
        assert all(response["latencyMs"] > 0 for response in answer["responses"])


async def test_defect_24_a_header_is_kept_back_only_in_one_spelling() -> None:
    async with scene(1) as stage:
        await stage.send("POST", "/x", "hOsT: a.test", "CONNECTION: close", "kEEP-aLIVE: 5", "AUTHORIZATION: Bearer x")
        [received] = stage.pods[0].received
        assert received.header("host") == f"{stage.pods[0].host}:{stage.pods.port}"
        assert [received.header(name) for name in ("keep-alive", "authorization")] == [None, None]


async def test_defect_25_a_request_does_not_say_where_it_has_been_and_can_go_round_for_ever() -> None:
    async with scene(1) as stage:
        await stage.send()
        assert stage.pods[0].received[0].header("via") == "1.1 broadcache"
        assert stage.pods[0].received[0].header("x-forwarded-for") == "127.0.0.1"
        stage.dns.a(SERVICE, "127.0.0.1")
        reply = await stage.send("POST", path=f"/{SERVICE}/{stage.port}{stage.path}/x")
        assert (reply.statuses, stage.pods.received) == ([508], [1])


async def test_defect_26_a_head_request_learns_nothing() -> None:
    async with scene(2) as stage:
        stage.pods[1].behaviour = answers(500)
        reply = await stage.send("HEAD")
        assert (reply.status, reply.body) == (400, b"")
        assert reply.headers["x-broadcache-fanout"] == "total=2, succeeded=1, failed=1, complete=true"

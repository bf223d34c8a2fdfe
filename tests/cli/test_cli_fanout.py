"""`broadcache fanout`, as it is typed."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import anyio.to_thread
import pytest
from tests.support.dns_server import DnsServer
from tests.support.pods import Pods, answers

pytestmark = pytest.mark.anyio

APPLIED = answers(200, b'{"replica":"web-1","outcome":"applied","dropped":3}')


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    async with Pods(3) as pods:
        yield pods


@pytest.fixture
async def dns(pods: Pods) -> AsyncIterator[DnsServer]:
    async with DnsServer() as dns:
        dns.a("web.test", *pods.hosts)
        yield dns


async def fanout(
    dns: DnsServer, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {
        "BROADCACHE_FANOUT_NETWORKS": "127.0.0.0/8",
        "BROADCACHE_FANOUT_NAMESERVERS": dns.address,
        "COLUMNS": "120",
        **environment,
    }
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "broadcache", "fanout", *arguments],
            env={**os.environ, **variables},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    )


async def test_without_a_path_each_replica_is_asked_for_its_status(pods: Pods, dns: DnsServer) -> None:
    run = await fanout(dns, "web.test", str(pods.port))
    assert run.returncode == 0, run.stderr
    assert [(each.method, each.target) for pod in pods.all for each in pod.received] == [
        ("GET", "/cache-invalidation")
    ] * 3
    for host in pods.hosts:
        assert f"{host}:{pods.port}" in run.stdout
    assert "3 of 3 succeeded" in run.stdout


async def test_a_body_is_posted_as_json_with_the_token_of_the_replicas(pods: Pods, dns: DnsServer) -> None:
    pods[0].behaviour = APPLIED
    body = '{"keys":["product:42"]}'
    run = await fanout(dns, "web.test", str(pods.port), "-d", body, BROADCACHE_REPLICA_TOKEN="new,old")
    assert run.returncode == 0, run.stderr
    for pod in pods.all:
        [received] = pod.received
        assert (received.method, received.body) == ("POST", body.encode())
        assert received.header("authorization") == "Bearer new"
        assert received.header("content-type") == "application/json"
    assert '"replica":"web-1"' in run.stdout


async def test_the_processes_of_an_address_are_counted_and_the_silent_ones_named(pods: Pods, dns: DnsServer) -> None:
    told = [{"pid": 7, "outcome": "applied"}, {"pid": 8, "outcome": "applied"}]
    silent = {"pid": 9, "outcome": None, "error": "no answer"}
    pods[0].behaviour = answers(200, json.dumps({"replica": "web-1", "processes": told, "doubt": None}).encode())
    pods[1].behaviour = answers(500, json.dumps({"replica": "web-2", "processes": [told[0], silent]}).encode())
    pods[2].behaviour = answers(200, json.dumps({"replica": "web-3", "processes": told[:1], "doubt": "why"}).encode())
    run = await fanout(dns, "web.test", str(pods.port), "-X", "POST")
    assert run.returncode == 1
    assert "applied by 2 of 2 processes" in run.stdout
    assert "applied by 1 of 2 processes; process 9: no answer" in run.stdout
    assert "applied by 1 of 1 process; there may be others" in run.stdout


async def test_the_token_of_the_replicas_is_sent_to_no_other_path(pods: Pods, dns: DnsServer) -> None:
    run = await fanout(dns, "web.test", str(pods.port), "/status", BROADCACHE_REPLICA_TOKEN="secret")
    assert run.returncode == 0
    assert [each.header("authorization") for pod in pods.all for each in pod.received] == [None] * 3


async def test_one_that_fails_is_shown_and_makes_the_exit_code_1(pods: Pods, dns: DnsServer) -> None:
    pods[1].behaviour = answers(500, b"\x1b[2Jbroken")
    await pods.remove(pods[2].host)
    run = await fanout(dns, "web.test", str(pods.port), "/x?y=%20", "-X", "BAN", "-H", "X-Why: because")
    assert run.returncode == 1
    assert "500" in run.stdout
    assert "connection refused" in run.stdout
    assert "1 of 3 succeeded" in run.stdout
    assert "\x1b[2J" not in run.stdout
    [received] = pods[0].received
    assert (received.method, received.target, received.header("x-why")) == ("BAN", "/x?y=%20", "because")


async def test_json_is_what_the_api_answers_with_each_body(pods: Pods, dns: DnsServer) -> None:
    pods[0].behaviour = APPLIED
    run = await fanout(dns, "web.test", str(pods.port), "-d", "@-", "--json", stdin='{"everything":true}')
    answer = json.loads(run.stdout)
    assert (answer["total"], answer["succeeded"], answer["complete"], answer["discovery"]) == (3, 3, True, "dns")
    assert json.loads(answer["responses"][0]["body"])["dropped"] == 3
    assert pods[2].received[0].body == b'{"everything":true}'


async def test_addresses_can_be_named_instead_of_a_service_in_dns(pods: Pods, dns: DnsServer) -> None:
    run = await fanout(dns, "web", "http", "--address", f"{pods[1].host}:{pods.port}")
    assert run.returncode == 0, run.stderr
    assert pods.received == [0, 1, 0]
    assert dns.queries == []


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("127.1", "80"), 2, "broadcache: service: expected the DNS name of a service, got '127.1'"),
        (("nope nope", "80"), 2, "broadcache: service: expected the name of a service"),
        (("web.test", "0"), 2, "broadcache: port: expected a number from 1 to 65535"),
        (("web.test", "*"), 2, "broadcache: port: expected a number from 1 to 65535"),
        (("missing.test", "80"), 1, "expected addresses for missing.test"),
        (("web.test", "80", "no-slash"), 2, "expected a percent-encoded path"),
        (("web.test", "80", "-H", "nothing"), 2, "expected NAME: VALUE"),
        (("web.test", "80", "-d", "@/does/not/exist"), 2, "expected a file that can be read"),
        (("web.test", "80", "--network", "10.0.0.0/8"), 1, "127.0.0.2"),
        (("web.test", "80", "--nameserver", "dns.example"), 2, "BROADCACHE_FANOUT_NAMESERVERS: expected an IP address"),
    ],
)
async def test_what_cannot_be_done_is_reported_and_no_address_is_called(
    pods: Pods, dns: DnsServer, arguments: tuple[str, ...], code: int, problem: str
) -> None:
    run = await fanout(dns, *arguments)
    assert (run.returncode, run.stdout) == (code, "")
    assert problem in run.stderr
    assert pods.received == [0, 0, 0]

"""Discovery, on a real name server: who is found, what is said when it may not be all, and what is refused."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import dns.asyncresolver
import dns.nameserver
import pytest
from tests.support.dns_server import DnsServer, Failure, Query
from tests.support.waiting import until

from broadcache.publisher.fanout.addresses import (
    AliasRefused,
    Discovered,
    ReplicaAddress,
    ResolverFailed,
    ResolverTimedOut,
    ServiceNotFound,
)
from broadcache.publisher.fanout.discovery import DnsDiscovery, ListDiscovery
from broadcache.shared.errors import InvalidSettings

pytestmark = pytest.mark.anyio

SOON_SECONDS = 0.3  # a timeout, for what never answers
LATE_SECONDS = 20.0  # a timeout, for what must answer however busy the machine is


@pytest.fixture
async def server() -> AsyncIterator[DnsServer]:
    async with DnsServer() as server:
        yield server


@pytest.fixture
def discovery(server: DnsServer, tmp_path: Path) -> DnsDiscovery:
    return discovery_of(server, tmp_path)


def discovery_of(
    server: DnsServer, directory: Path, resolv_conf: str = "", timeout_seconds: float = LATE_SECONDS
) -> DnsDiscovery:
    """Ask `server` alone, with the search list of `resolv_conf` and not with this machine's."""
    path = directory / "resolv.conf"
    path.write_text(resolv_conf or "search .\n")
    return DnsDiscovery([server.address], timeout_seconds=timeout_seconds, resolv_conf=str(path))


def plain_resolver(server: DnsServer) -> dns.asyncresolver.Resolver:
    """The library as it comes, for negative controls."""
    resolver = dns.asyncresolver.Resolver(configure=False)
    host, port = server.address.split(":")
    resolver.nameservers = [dns.nameserver.Do53Nameserver(host, int(port))]
    return resolver


def hosts(discovered: Discovered) -> list[str]:
    return [address.host for address in discovered.addresses]


def texts(discovered: Discovered) -> list[str]:
    return [str(address) for address in discovered.addresses]


# Addresses


async def test_an_address_is_written_as_in_a_url() -> None:
    assert str(ReplicaAddress("10.0.0.7", 80)) == "10.0.0.7:80"
    assert str(ReplicaAddress("fd00::7", 80)) == "[fd00::7]:80"


async def test_a_service_is_each_of_its_ipv4_addresses_in_the_servers_order(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", "127.0.0.9", "127.0.0.2", "127.0.0.5", "127.0.0.2")
    assert await discovery.discover("web.test", 8080) == Discovered(
        (ReplicaAddress("127.0.0.9", 8080), ReplicaAddress("127.0.0.2", 8080), ReplicaAddress("127.0.0.5", 8080)),
        "dns",
        True,
        (),
    )


async def test_a_service_with_ipv6_alone_is_found(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.aaaa("web.test", "fd00:0:0::7", "fd00::0008")
    found = await discovery.discover("web.test", 80)
    assert texts(found) == ["[fd00::7]:80", "[fd00::8]:80"]
    assert found.is_complete


async def test_a_replica_with_both_families_is_called_once(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", "127.0.0.2", "127.0.0.3")
    server.aaaa("web.test", "fd00::2", "fd00::3")
    found = await discovery.discover("web.test", 80)
    assert hosts(found) == ["127.0.0.2", "127.0.0.3"]
    assert found.is_complete
    # The negative control: who takes all addresses of the name calls each replica twice.
    both = await plain_resolver(server).resolve_name("web.test")
    assert len(list(both.addresses())) == 4


@pytest.mark.parametrize(
    ("four", "six", "expected"),
    [
        (["127.0.0.2"], ["fd00::2", "fd00::3"], ["fd00::2", "fd00::3"]),
        (["127.0.0.2", "127.0.0.3", "127.0.0.4"], ["fd00::2"], ["127.0.0.2", "127.0.0.3", "127.0.0.4"]),
    ],
)
async def test_families_that_cannot_be_paired_give_the_larger_one_and_are_not_called_complete(
    server: DnsServer, discovery: DnsDiscovery, four: list[str], six: list[str], expected: list[str]
) -> None:
    server.a("web.test", *four)
    server.aaaa("web.test", *six)
    found = await discovery.discover("web.test", 80)
    assert hosts(found) == expected
    assert not found.is_complete
    assert f"{len(four)} IPv4 and {len(six)} IPv6 addresses, which cannot be paired" in found.notes[0]


async def test_changing_answers_are_seen_at_once(server: DnsServer, discovery: DnsDiscovery) -> None:
    answers = [["127.0.0.2"], ["127.0.0.2", "127.0.0.3"], ["127.0.0.3"]]
    current = iter(answers)
    server.a("web.test", lambda: next(current))
    for expected in answers:
        assert hosts(await discovery.discover("web.test", 80)) == expected
    server.a("web.test", "127.0.0.4")
    assert hosts(await discovery.discover("web.test", 80)) == ["127.0.0.4"]


async def test_names_are_matched_in_any_case(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("Web.Test", "127.0.0.2")
    assert hosts(await discovery.discover("wEB.tEST", 80)) == ["127.0.0.2"]


# What is not there, and what cannot be known


async def test_an_unknown_name_is_not_found(discovery: DnsDiscovery) -> None:
    with pytest.raises(ServiceNotFound, match=r"expected addresses for web\.test, got none \(tried web\.test\.\)"):
        await discovery.discover("web.test", 80)


async def test_a_name_with_other_records_alone_is_not_found(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv("web.test", [("pod.web.test", 80)])
    with pytest.raises(ServiceNotFound):
        await discovery.discover("web.test", 80)


@pytest.mark.parametrize("service", ["", ".", "@", "a..b", "x" * 64, ".".join(["x" * 60] * 5), "\\"])
async def test_what_is_no_name_is_not_found(discovery: DnsDiscovery, service: str) -> None:
    with pytest.raises(ServiceNotFound):
        await discovery.discover(service, 80)


@pytest.mark.parametrize("failure", ["SERVFAIL", "REFUSED"])
async def test_a_name_server_that_fails_is_not_a_missing_service(
    server: DnsServer, discovery: DnsDiscovery, failure: Failure
) -> None:
    for kind in ("A", "AAAA"):
        server.fails("web.test", kind, failure)
    with pytest.raises(ResolverFailed, match=failure) as raised:
        await discovery.discover("web.test", 80)
    assert not isinstance(raised.value, ResolverTimedOut)


async def test_no_addresses_in_one_family_and_a_failure_in_the_other_is_a_failure(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.fails("web.test", "A", "SERVFAIL")
    with pytest.raises(ResolverFailed):
        await discovery.discover("web.test", 80)


async def test_a_name_server_that_never_answers_times_out(server: DnsServer, tmp_path: Path) -> None:
    for kind in ("A", "AAAA"):
        server.is_silent("web.test", kind)
    discovery = discovery_of(server, tmp_path, timeout_seconds=SOON_SECONDS)
    with pytest.raises(ResolverTimedOut, match=r"no answer to A of web\.test in 0\.3 s from Do53:127\.0\.0\.1@"):
        await discovery.discover("web.test", 80)
    assert server.queries.count(Query("web.test", "A", "udp")) >= 2, "one lost packet must not decide"


async def test_silence_in_one_family_and_a_failure_in_the_other_is_a_failure(server: DnsServer, tmp_path: Path) -> None:
    server.is_silent("web.test", "A")
    server.fails("web.test", "AAAA", "REFUSED")
    with pytest.raises(ResolverFailed) as raised:
        await discovery_of(server, tmp_path, timeout_seconds=SOON_SECONDS).discover("web.test", 80)
    assert not isinstance(raised.value, ResolverTimedOut)


async def test_a_port_without_a_name_server_fails_at_once(tmp_path: Path) -> None:
    async with DnsServer() as server:
        discovery = discovery_of(server, tmp_path)
    with pytest.raises(ResolverFailed) as raised:
        await discovery.discover("web.test", 80)
    assert not isinstance(raised.value, ResolverTimedOut)


async def test_a_second_name_server_answers_for_a_silent_or_failing_first_one(
    server: DnsServer, tmp_path: Path
) -> None:
    server.a("web.test", "127.0.0.2")
    async with DnsServer() as first:
        first.is_silent("web.test", "A")
        first.fails("web.test", "AAAA", "SERVFAIL")
        discovery = DnsDiscovery(
            [first.address, server.address], timeout_seconds=1.0, resolv_conf=str(tmp_path / "none")
        )
        assert hosts(await discovery.discover("web.test", 80)) == ["127.0.0.2"]


@pytest.mark.parametrize("fault", ["SERVFAIL", "silence"])
async def test_one_family_that_fails_leaves_the_other_and_is_said(
    server: DnsServer, tmp_path: Path, fault: str
) -> None:
    server.a("web.test", "127.0.0.2", "127.0.0.3")
    if fault == "silence":
        server.is_silent("web.test", "AAAA")
    else:
        server.fails("web.test", "AAAA", "SERVFAIL")
    timeout_seconds = SOON_SECONDS if fault == "silence" else LATE_SECONDS
    found = await discovery_of(server, tmp_path, timeout_seconds=timeout_seconds).discover("web.test", 80)
    assert hosts(found) == ["127.0.0.2", "127.0.0.3"]
    assert not found.is_complete
    assert "no answer to AAAA of web.test" in found.notes[0]


# Truncation

MANY = [f"127.0.{n // 200}.{n % 200 + 1}" for n in range(300)]


async def test_more_addresses_than_a_datagram_holds_come_by_tcp_and_are_complete(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", *MANY)
    found = await discovery.discover("web.test", 80)
    assert hosts(found) == MANY
    assert found.is_complete
    assert Query("web.test", "A", "udp") in server.queries
    assert Query("web.test", "A", "tcp") in server.queries


async def test_sixty_addresses_fit_into_one_datagram(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", *MANY[:60])
    assert hosts(await discovery.discover("web.test", 80)) == MANY[:60]
    assert "tcp" not in {query.transport for query in server.queries}


async def test_an_answer_that_is_cut_off_over_tcp_is_not_called_complete(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", *MANY)
    server.truncates_tcp_at(250)
    found = await discovery.discover("web.test", 80)
    assert hosts(found) == MANY[:250]
    assert not found.is_complete
    assert "A of web.test was cut off after 250 records" in found.notes[0]
    # The negative control: the library alone takes the cut list for a success.
    assert len(await plain_resolver(server).resolve("web.test", "A")) == 250


async def test_an_answer_that_is_cut_off_to_nothing_is_a_failure_and_no_missing_service(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", *MANY)
    server.truncates_tcp_at(0)
    with pytest.raises(ResolverFailed, match="cut off after 0 records"):
        await discovery.discover("web.test", 80)


async def test_more_addresses_than_a_message_holds_are_not_called_complete(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", *(f"127.1.{n // 250}.{n % 250 + 1}" for n in range(4_500)))
    found = await discovery.discover("web.test", 80)
    assert 3_000 < len(found.addresses) < 4_500
    assert not found.is_complete


async def test_a_long_answer_from_a_server_without_tcp_is_a_failure(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", *MANY)
    await server.refuses_tcp()
    with pytest.raises(ResolverFailed):
        await discovery.discover("web.test", 80)


# Search domains

SEARCH = "search ns.svc.cluster.test svc.cluster.test cluster.test\nnameserver 127.0.0.254\noptions ndots:5\n"


@pytest.mark.parametrize("service", ["web", "web.ns", "web.ns.svc", "web.ns.svc.cluster.test"])
async def test_a_short_name_is_looked_for_in_the_search_domains(
    server: DnsServer, tmp_path: Path, service: str
) -> None:
    server.a("web.ns.svc.cluster.test", "127.0.0.2")
    server.srv("_http._tcp.web.ns.svc.cluster.test", [("pod.web.ns.svc.cluster.test", 81)])
    server.a("pod.web.ns.svc.cluster.test", "127.0.0.2")
    discovery = discovery_of(server, tmp_path, SEARCH)
    assert texts(await discovery.discover(service, 80)) == ["127.0.0.2:80"]
    assert texts(await discovery.discover(service, "http")) == ["127.0.0.2:81"]


async def test_the_nearest_search_domain_wins_in_both_families(server: DnsServer, tmp_path: Path) -> None:
    server.a("web.ns.svc.cluster.test", "127.0.0.2")
    server.aaaa("web.svc.cluster.test", "fd00::9", "fd00::a")
    found = await discovery_of(server, tmp_path, SEARCH).discover("web", 80)
    assert hosts(found) == ["127.0.0.2"]
    assert found.is_complete


async def test_a_failure_in_a_search_domain_does_not_lead_to_the_service_of_another(
    server: DnsServer, tmp_path: Path
) -> None:
    server.fails("web.ns.svc.cluster.test", "A", "SERVFAIL")
    server.fails("web.ns.svc.cluster.test", "AAAA", "SERVFAIL")
    server.a("web.svc.cluster.test", "127.0.0.9")
    with pytest.raises(ResolverFailed):
        await discovery_of(server, tmp_path, SEARCH).discover("web", 80)


async def test_a_name_with_a_last_dot_is_not_searched_for(server: DnsServer, tmp_path: Path) -> None:
    server.a("web.ns.svc.cluster.test", "127.0.0.2")
    discovery = discovery_of(server, tmp_path, SEARCH)
    with pytest.raises(ServiceNotFound):
        await discovery.discover("web.", 80)
    assert {query.name for query in server.queries} == {"web"}


async def test_a_name_with_enough_dots_is_tried_as_it_stands_first(server: DnsServer, tmp_path: Path) -> None:
    server.a("web.test", "127.0.0.2")
    discovery = discovery_of(server, tmp_path, "search ns.test\noptions ndots:1\n")
    assert hosts(await discovery.discover("web.test", 80)) == ["127.0.0.2"]
    assert {query.name for query in server.queries} == {"web.test"}


async def test_a_name_without_dots_is_looked_for_in_the_search_domains_first(server: DnsServer, tmp_path: Path) -> None:
    server.a("web", "127.0.0.9")
    server.a("web.ns.test", "127.0.0.2")
    assert hosts(await discovery_of(server, tmp_path, "search ns.test\n").discover("web", 80)) == ["127.0.0.2"]


async def test_a_search_domain_that_makes_the_name_too_long_is_passed_over(server: DnsServer, tmp_path: Path) -> None:
    long = ".".join(["x" * 60] * 3)
    server.a(f"{long}.test", "127.0.0.2")
    discovery = discovery_of(server, tmp_path, f"search {long} test\noptions ndots:9\n")
    assert hosts(await discovery.discover(long, 80)) == ["127.0.0.2"]


async def test_the_name_servers_of_the_system_are_asked_when_none_are_given(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("search ns.test\nnameserver 127.0.0.1\n")
    discovery = DnsDiscovery(resolv_conf=str(path), timeout_seconds=SOON_SECONDS)
    with pytest.raises(ResolverFailed, match=r"127\.0\.0\.1"):
        await discovery.discover("web", 80)


@pytest.mark.parametrize("content", [None, "", "nameserver nonsense\n"])
async def test_a_machine_without_resolv_conf_needs_name_servers_and_no_more(
    server: DnsServer, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "resolv.conf"
    if content is not None:
        path.write_text(content)
    server.a("web.test", "127.0.0.2")
    given = DnsDiscovery([server.address], timeout_seconds=LATE_SECONDS, resolv_conf=str(path))
    assert hosts(await given.discover("web.test", 80)) == ["127.0.0.2"]
    with pytest.raises(ResolverFailed, match="expected name servers in"):
        await DnsDiscovery(resolv_conf=str(path)).discover("web.test", 80)


# Aliases


async def test_an_alias_within_the_services_own_domain_is_followed(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.cname("web.ns.test", "pods.web.ns.test")
    server.a("pods.web.ns.test", "127.0.0.2", "127.0.0.3")
    assert hosts(await discovery.discover("web.ns.test", 80)) == ["127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize("target", ["db.other.test", "ns.test.example", "test", "unknown.example", "xns.test"])
async def test_an_alias_out_of_the_services_own_domain_is_refused(
    server: DnsServer, discovery: DnsDiscovery, target: str
) -> None:
    server.cname("web.ns.test", target)
    if target != "unknown.example":
        server.a(target, "127.0.0.2")
    with pytest.raises(AliasRefused, match=rf"web\.ns\.test\. .* {target}\., which is outside of ns\.test\."):
        await discovery.discover("web.ns.test", 80)


async def test_an_alias_that_leaves_the_domain_and_comes_back_is_refused(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.cname("web.ns.test", "db.other.test")
    server.cname("db.other.test", "secret.ns.test")
    server.a("secret.ns.test", "127.0.0.2")
    with pytest.raises(AliasRefused):
        await discovery.discover("web.ns.test", 80)


async def test_an_alias_in_a_search_domain_is_judged_by_the_name_that_was_found(
    server: DnsServer, tmp_path: Path
) -> None:
    server.cname("web.ns.svc.cluster.test", "web.other.svc.cluster.test")
    server.a("web.other.svc.cluster.test", "127.0.0.2")
    with pytest.raises(AliasRefused, match=r"outside of ns\.svc\.cluster\.test\."):
        await discovery_of(server, tmp_path, SEARCH).discover("web", 80)


async def test_a_single_label_is_no_alias(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web", "127.0.0.2")
    server.cname("evil", "evil.example")
    server.a("evil.example", "127.0.0.3")
    assert hosts(await discovery.discover("web", 80)) == ["127.0.0.2"]
    with pytest.raises(AliasRefused):
        await discovery.discover("evil.", 80)


async def test_aliases_in_a_circle_are_a_failure(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.cname("web.test", "www.test")
    server.cname("www.test", "web.test")
    with pytest.raises(ResolverFailed):
        await discovery.discover("web.test", 80)


async def test_the_alias_of_a_named_port_is_refused_when_it_leaves_the_domain(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.cname("_http._tcp.web.ns.test", "_http._tcp.db.other.test")
    server.srv("_http._tcp.db.other.test", [("pod.db.other.test", 80)], glue={"pod.db.other.test": ["127.0.0.2"]})
    with pytest.raises(AliasRefused):
        await discovery.discover("web.ns.test", "http")


async def test_a_target_that_is_an_alias_out_of_its_domain_is_refused(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    rows = [("pod.web.test", 80), ("good.web.test", 80)]
    server.srv("_http._tcp.web.test", rows, glue={"good.web.test": ["127.0.0.3"]})
    server.cname("pod.web.test", "evil.example")
    server.a("evil.example", "127.0.0.2")
    with pytest.raises(AliasRefused):
        await discovery.discover("web.test", "http")


async def test_an_external_name_that_is_seen_through_a_named_port_is_refused(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.srv("_http._tcp.web.ns.test", [("evil.example", 0)], glue={"evil.example": ["127.0.0.2"]})
    with pytest.raises(AliasRefused, match=r"evil\.example"):
        await discovery.discover("web.ns.test", "http")


@pytest.mark.parametrize("target", ["evil.example", "web.evil.example", "test", "web.testing", "pod.web.ns.other"])
@pytest.mark.parametrize("number", [80, 6379])
async def test_a_target_outside_the_services_own_domain_is_refused_with_all_others(
    server: DnsServer, discovery: DnsDiscovery, target: str, number: int
) -> None:
    rows = [("pod.web.ns.test", 80), (target, number)]
    server.srv("_http._tcp.web.ns.test", rows, glue={name: ["127.0.0.2"] for name, _ in rows})
    with pytest.raises(AliasRefused, match=re.escape(f"SRV target {target}.")):
        await discovery.discover("web.ns.test", "http")
    # Looked up on its own it would be found: it is refused because of its name.
    server.srv("_http._tcp.web.ns.test", rows[:1], glue={rows[0][0]: ["127.0.0.2"]})
    assert texts(await discovery.discover("web.ns.test", "http")) == ["127.0.0.2:80"]


# Virtual addresses


async def test_one_address_that_stands_for_all_replicas_is_not_called_complete(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", "127.0.0.2")
    server.srv("web.test", [("WEB.test", 80), ("web.test", 443)])
    found = await discovery.discover("web.test", 80)
    assert hosts(found) == ["127.0.0.2"]
    assert not found.is_complete
    assert "virtual address" in found.notes[0]
    assert "headless" in found.notes[0]


async def test_a_virtual_address_is_recognised_behind_a_named_port_too(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", "127.0.0.2")
    server.srv("_http._tcp.web.test", [("WEB.test", 80)])
    found = await discovery.discover("web.test", "http")
    assert (found.addresses, found.is_complete) == ((("127.0.0.2", 80),), False)
    assert "virtual address" in found.notes[0]
    server.srv("_http._tcp.web.test", [("127-0-0-2.web.test", 80)], glue={"127-0-0-2.web.test": ["127.0.0.2"]})
    assert (await discovery.discover("web.test", "http")).is_complete


async def test_the_only_replica_of_a_headless_service_is_complete(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", "127.0.0.2")
    server.srv("web.test", [("127-0-0-2.web.test", 80)])
    assert (await discovery.discover("web.test", 80)).is_complete


@pytest.mark.parametrize("fault", ["NXDOMAIN", "SERVFAIL", "silence"])
async def test_one_address_is_not_called_virtual_without_a_proof(server: DnsServer, tmp_path: Path, fault: str) -> None:
    server.a("web.test", "127.0.0.2")
    if fault == "silence":
        server.is_silent("web.test", "SRV")
    else:
        server.fails("web.test", "SRV", "NXDOMAIN" if fault == "NXDOMAIN" else "SERVFAIL")
    timeout_seconds = SOON_SECONDS if fault == "silence" else LATE_SECONDS
    found = await discovery_of(server, tmp_path, timeout_seconds=timeout_seconds).discover("web.test", 80)
    assert found == Discovered((ReplicaAddress("127.0.0.2", 80),), "dns", True, ())


async def test_several_addresses_do_not_wait_for_what_only_one_would_need(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", "127.0.0.2", "127.0.0.3")
    server.is_silent("web.test", "SRV")
    # Were it waited for, it would take LATE_SECONDS.
    async with asyncio.timeout(LATE_SECONDS / 2):
        assert (await discovery.discover("web.test", 80)).is_complete


# Named ports


async def test_a_named_port_pairs_each_replica_with_its_own_port(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv(
        "_http._tcp.web.test",
        [("b.web.test", 8081), ("a.web.test", 8080)],
        glue={"a.web.test": ["127.0.0.2"], "b.web.test": ["127.0.0.3"]},
    )
    found = await discovery.discover("web.test", "http")
    assert found == Discovered((ReplicaAddress("127.0.0.3", 8081), ReplicaAddress("127.0.0.2", 8080)), "srv", True, ())
    assert {query.rdtype for query in server.queries} == {"SRV"}, "what came along is not asked for again"


async def test_targets_that_come_without_addresses_are_looked_up(server: DnsServer, discovery: DnsDiscovery) -> None:
    rows = [(f"pod-{n}.web.test", 8000 + n) for n in range(100)]
    server.srv("_http._tcp.web.test", rows, glue={"pod-0.web.test": ["127.0.1.0"]})
    for n in range(1, 100):
        server.a(f"pod-{n}.web.test", f"127.0.1.{n}")
    found = await discovery.discover("web.test", "http")
    assert texts(found) == [f"127.0.1.{n}:{8000 + n}" for n in range(100)]
    assert found.is_complete


async def test_replicas_that_share_a_target_are_all_called(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv(
        "_http._tcp.web.test",
        [("shared.web.test", 80), ("shared.web.test", 81)],
        glue={"shared.web.test": ["127.0.0.2", "127.0.0.3"]},
    )
    found = await discovery.discover("web.test", "http")
    assert texts(found) == ["127.0.0.2:80", "127.0.0.3:80", "127.0.0.2:81", "127.0.0.3:81"]


@pytest.mark.parametrize("has_glue", [True, False])
async def test_a_target_with_both_families_is_called_once(
    server: DnsServer, discovery: DnsDiscovery, has_glue: bool
) -> None:
    addresses = {"a.web.test": ["127.0.0.2", "fd00::2"], "b.web.test": ["fd00::3"]}
    server.srv("_http._tcp.web.test", [("a.web.test", 80), ("b.web.test", 80)], glue=addresses if has_glue else None)
    server.a("a.web.test", "127.0.0.2")
    server.aaaa("a.web.test", "fd00::2")
    server.aaaa("b.web.test", "fd00::3")
    found = await discovery.discover("web.test", "http")
    assert texts(found) == ["127.0.0.2:80", "[fd00::3]:80"]
    assert found.is_complete


@pytest.mark.parametrize(("six", "is_complete"), [(["fd00::2", "fd00::3"], True), (["fd00::2"], False)])
async def test_targets_that_are_named_by_address_are_paired_by_their_number(
    server: DnsServer, discovery: DnsDiscovery, six: list[str], is_complete: bool
) -> None:
    glue = {f"x{address.replace('.', '-').replace(':', '-')}x.web.test": [address] for address in six}
    glue |= {"127-0-0-2.web.test": ["127.0.0.2"], "127-0-0-3.web.test": ["127.0.0.3"]}
    server.srv("_http._tcp.web.test", [(target, 80) for target in glue], glue=glue)
    found = await discovery.discover("web.test", "http")
    assert hosts(found) == ["127.0.0.2", "127.0.0.3"]
    assert found.is_complete == is_complete


async def test_a_target_that_says_there_is_no_service_is_ignored(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv("_http._tcp.web.test", [(".", 80), ("a.web.test", 80)], glue={"a.web.test": ["127.0.0.2"]})
    server.srv("_http._tcp.off.test", [(".", 0)])
    found = await discovery.discover("web.test", "http")
    assert hosts(found) == ["127.0.0.2"]
    assert found.is_complete
    with pytest.raises(ServiceNotFound):
        await discovery.discover("off.test", "http")


async def test_a_row_without_a_port_is_left_out_and_said(server: DnsServer, discovery: DnsDiscovery) -> None:
    glue = {"a.web.test": ["127.0.0.2"], "b.web.test": ["127.0.0.3"]}
    server.srv("_http._tcp.web.test", [("a.web.test", 80), ("b.web.test", 0)], glue=glue)
    found = await discovery.discover("web.test", "http")
    assert hosts(found) == ["127.0.0.2"]
    assert found.notes == ("1 SRV records of web.test have no port and were left out.",)
    assert not found.is_complete


async def test_an_address_that_two_targets_share_is_called_once(server: DnsServer, discovery: DnsDiscovery) -> None:
    glue = {"a.web.test": ["127.0.0.2"], "b.web.test": ["127.0.0.2", "127.0.0.3"]}
    server.srv("_http._tcp.web.test", [(target, 80) for target in glue], glue=glue)
    assert texts(await discovery.discover("web.test", "http")) == ["127.0.0.2:80", "127.0.0.3:80"]


async def test_a_named_port_without_records_is_not_found_and_says_why(
    server: DnsServer, discovery: DnsDiscovery
) -> None:
    server.a("web.test", "127.0.0.2")
    with pytest.raises(ServiceNotFound, match="unnamed ports have no SRV records"):
        await discovery.discover("web.test", "http")
    server.a("_http._tcp.web.test", "127.0.0.2")
    with pytest.raises(ServiceNotFound, match="unnamed ports have no SRV records"):
        await discovery.discover("web.test", "http")


async def test_a_named_port_whose_lookup_fails_is_not_missing(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.fails("_http._tcp.web.test", "SRV", "SERVFAIL")
    with pytest.raises(ResolverFailed, match=r"SRV of _http\._tcp\.web\.test"):
        await discovery.discover("web.test", "http")


async def test_rows_that_are_cut_off_are_not_called_complete(server: DnsServer, discovery: DnsDiscovery) -> None:
    glue = {f"pod-{n}.web.test": [f"127.0.1.{n}"] for n in range(1, 101)}
    server.srv("_http._tcp.web.test", [(target, 80) for target in glue], glue=glue)
    server.truncates_tcp_at(60)
    found = await discovery.discover("web.test", "http")
    assert len(found.addresses) == 60
    assert not found.is_complete
    assert "SRV of _http._tcp.web.test was cut off after 60 records" in found.notes[0]


async def test_targets_without_addresses_are_left_out_and_named(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv("_http._tcp.web.test", [("a.web.test", 80), *((f"gone-{n}.web.test", 80) for n in range(7))])
    server.a("a.web.test", "127.0.0.2")
    found = await discovery.discover("web.test", "http")
    assert hosts(found) == ["127.0.0.2"]
    assert not found.is_complete
    assert "7 of 8 targets have no known address and were left out: gone-0.web.test" in found.notes[0]
    assert "gone-4.web.test and 2 more" in found.notes[0]


async def test_a_target_that_cannot_be_looked_up_leaves_the_others(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.srv("_http._tcp.web.test", [("a.web.test", 80), ("b.web.test", 80)])
    server.a("a.web.test", "127.0.0.2")
    server.fails("b.web.test", "A", "SERVFAIL")
    found = await discovery.discover("web.test", "http")
    assert hosts(found) == ["127.0.0.2"]
    assert not found.is_complete
    assert "A of b.web.test" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("fault", "error"), [("SERVFAIL", ResolverFailed), ("silence", ResolverTimedOut), ("absence", ServiceNotFound)]
)
async def test_targets_none_of_which_has_an_address_are_an_error(
    server: DnsServer, tmp_path: Path, fault: str, error: type[Exception]
) -> None:
    server.srv("_http._tcp.web.test", [("a.web.test", 80), ("b.web.test", 80)])
    for kind in ("A", "AAAA"):
        if fault == "silence":
            server.is_silent("a.web.test", kind)
        elif fault == "SERVFAIL":
            server.fails("a.web.test", kind, "SERVFAIL")
    timeout_seconds = SOON_SECONDS if fault == "silence" else LATE_SECONDS
    with pytest.raises(error):
        await discovery_of(server, tmp_path, timeout_seconds=timeout_seconds).discover("web.test", "http")


@pytest.mark.parametrize("port", ["", "-", "a.b", "x" * 63, "http/2", "_http", 0, 65_536, "0", "70000", -1])
async def test_what_is_no_port_is_not_found(server: DnsServer, discovery: DnsDiscovery, port: int | str) -> None:
    with pytest.raises(ServiceNotFound, match="expected a port"):
        await discovery.discover("web.test", port)
    assert not server.queries


async def test_a_port_number_may_come_as_text(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", "127.0.0.2")
    assert texts(await discovery.discover("web.test", "8080")) == ["127.0.0.2:8080"]


async def test_a_port_that_makes_the_name_too_long_is_not_found(server: DnsServer, discovery: DnsDiscovery) -> None:
    with pytest.raises(ServiceNotFound):
        await discovery.discover(".".join(["x" * 60] * 4), "h" * 60)


# Lists


async def test_a_list_gives_its_addresses_once_each_in_order() -> None:
    discovery = ListDiscovery({"Replicas": ("127.0.0.1:8101", "127.0.0.2", "[::1]:80", "0:0::2", "127.0.0.1:8101")})
    found = await discovery.discover("rEPLICAS", 9000)
    assert found.how == "list"
    assert found.is_complete
    assert texts(found) == ["127.0.0.1:8101", "127.0.0.2:9000", "[::1]:80", "[::2]:9000"]


async def test_a_list_serves_a_named_port_only_where_each_entry_has_a_port() -> None:
    discovery = ListDiscovery({"all": ("127.0.0.1:8101", "127.0.0.2:8102"), "some": ("127.0.0.1:8101", "127.0.0.2")})
    assert texts(await discovery.discover("all", "http")) == ["127.0.0.1:8101", "127.0.0.2:8102"]
    with pytest.raises(ServiceNotFound, match="expected a port number for some, got 'http'"):
        await discovery.discover("some", "http")


async def test_a_service_in_no_list_is_asked_of_the_other_discovery() -> None:
    inner = ListDiscovery({"other": ("127.0.0.9",)})
    outer = ListDiscovery({"web": ("127.0.0.2",)}, inner)
    assert texts(await outer.discover("other", 80)) == ["127.0.0.9:80"]
    with pytest.raises(ServiceNotFound, match="expected one of the services other, got missing"):
        await outer.discover("missing", 80)


async def test_an_empty_list_has_no_addresses() -> None:
    with pytest.raises(ServiceNotFound):
        await ListDiscovery({"web": ()}).discover("web", 80)


BAD_ADDRESSES = ["", "localhost", "dns.test:53", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:x", "10.0.0", "010.0.0.1"]
BAD_ADDRESSES += ["[::1", "::1]:53", "[10.0.0.1]]:53", " 10.0.0.1", "10.0.0.1:53 ", "[::1]53", "https://10.0.0.1"]


@pytest.mark.parametrize("text", BAD_ADDRESSES)
async def test_what_is_no_address_is_refused_when_the_discovery_is_built(text: str) -> None:
    with pytest.raises(InvalidSettings, match="expected an IP address"):
        DnsDiscovery([text])
    with pytest.raises(InvalidSettings, match="expected an IP address"):
        ListDiscovery({"web": [text]})


async def test_a_service_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="each service once"):
        ListDiscovery({"web": (), "WEB": ()})


@pytest.mark.parametrize("timeout_seconds", [0, -1, float("nan"), float("inf")])
async def test_a_timeout_that_is_none_is_refused(timeout_seconds: float) -> None:
    with pytest.raises(InvalidSettings, match="timeout_seconds"):
        DnsDiscovery(timeout_seconds=timeout_seconds)


async def test_a_name_server_without_a_port_listens_on_53(tmp_path: Path) -> None:
    discovery = DnsDiscovery(["127.0.0.254"], timeout_seconds=SOON_SECONDS, resolv_conf=str(tmp_path / "none"))
    with pytest.raises(ResolverFailed, match=r"127\.0\.0\.254.*53"):
        await discovery.discover("web.test", 80)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
async def test_a_name_server_may_have_an_ipv6_address(tmp_path: Path) -> None:
    try:
        async with DnsServer("::1") as server:
            server.a("web.test", *MANY)
            assert hosts(await discovery_of(server, tmp_path).discover("web.test", 80)) == MANY
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")


# Cancellation


def open_sockets() -> set[str]:
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("the platform does not tell which sockets are open")
    names = set()
    for link in links.iterdir():
        try:
            names.add(str(link.readlink()))
        except OSError:
            continue  # Closed meanwhile, such as the one that lists.
    return {name for name in names if name.startswith("socket:")}


async def by_number(discovery: DnsDiscovery) -> Discovered:
    return await discovery.discover("web.test", 80)


async def by_name(discovery: DnsDiscovery) -> Discovered:
    return await discovery.discover("web.test", "http")


@pytest.mark.parametrize(
    ("look_up", "question"),
    [
        (by_number, Query("web.test", "A", "udp")),
        (by_name, Query("_http._tcp.web.test", "SRV", "udp")),
        (by_name, Query("pod.web.test", "AAAA", "udp")),
        (by_number, Query("web.test", "AAAA", "tcp")),
    ],
)
async def test_a_cancelled_discovery_leaves_no_task_and_no_socket(
    server: DnsServer,
    discovery: DnsDiscovery,
    look_up: Callable[[DnsDiscovery], Awaitable[Discovered]],
    question: Query,
) -> None:
    server.srv("_http._tcp.web.test", [("pod.web.test", 80)])
    if question.transport == "tcp":
        server.aaaa("web.test", *(f"fd00::{n:x}" for n in range(1, 300)))
        server.is_silent_over_tcp()
    else:
        server.is_silent(question.name, question.rdtype)
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    discovering = asyncio.ensure_future(look_up(discovery))
    await until(lambda: question in server.queries, "the question")
    assert open_sockets() != sockets, "the negative control: a discovery has sockets while it waits"
    discovering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await discovering
    await until(lambda: open_sockets() <= sockets, "the end of the sockets")
    await until(lambda: asyncio.all_tasks() <= tasks, "the end of the tasks")


async def test_a_finished_discovery_leaves_no_task_and_no_socket(server: DnsServer, discovery: DnsDiscovery) -> None:
    server.a("web.test", *MANY)
    server.is_silent("web.test", "SRV")
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    await discovery.discover("web.test", 80)
    await until(lambda: open_sockets() <= sockets, "the end of the sockets")
    await until(lambda: asyncio.all_tasks() <= tasks, "the end of the tasks")


async def test_many_discoveries_at_once_get_each_their_own_answer(server: DnsServer, discovery: DnsDiscovery) -> None:
    for n in range(1, 51):
        server.a(f"web-{n}.test", f"127.0.0.{n}", f"127.0.1.{n}")
    found = await asyncio.gather(*(discovery.discover(f"web-{n}.test", 80) for n in range(1, 51)))
    assert [hosts(each) for each in found] == [[f"127.0.0.{n}", f"127.0.1.{n}"] for n in range(1, 51)]

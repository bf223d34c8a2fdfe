"""The doctor: each thing that is wrong is found and named, nothing else is, and all is well again when it is mended."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import run
from tests.support.dns_server import DnsServer
from tests.support.paths import ROOT
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, new_cache, reached
from tests.support.topologies import asked, cluster_of_three, watched
from tests.support.waiting import until, wait_until

from broadcache.publisher import Publisher
from broadcache.publisher.doctor.diagnosis import Diagnosis
from broadcache.publisher.doctor.facts import DeliveryFacts, LogFacts, NamespaceFacts, ServerFacts
from broadcache.publisher.doctor.fanout_check import look_up
from broadcache.publisher.doctor.findings import Finding
from broadcache.publisher.doctor.namespace_checks import examine_namespace
from broadcache.publisher.doctor.rights import rights_of
from broadcache.publisher.doctor.server_checks import examine_server, unreachable
from broadcache.publisher.fanout.addresses import Discovered, ReplicaAddress
from broadcache.shared import InvalidNamespace, InvalidSettings, Keys, LinkLost, Position
from broadcache.shared.presence import Presence, ReplicaPresence
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio

PAGES = ROOT / "docs"
PATIENT: dict[str, Any] = {**FAST, "echo_timeout_seconds": 10.0}
"""Numbers for a replica whose presence stays, however slow the machine is."""
DOCTOR = ("+ping", "+info", "+config|get", "+time", "+acl|whoami", "+mget", "+pubsub|numsub", "+xlen")
MEASURED = {"reachable", "delivery"}
"""Whose severity is a matter of how busy the machine is."""


async def findings_of(url: str, *, namespaces: Sequence[str] = ("default",), **options: Any) -> list[Finding]:
    options = {"timeout_seconds": 10.0, "patience_seconds": 0.0, **options}
    return await Diagnosis(url, namespaces=namespaces, **options).findings()


async def found(url: str, check: str, **options: Any) -> Finding:
    [finding] = [each for each in await findings_of(url, **options) if each.check == check]
    return finding


def page_rights(user: str) -> list[str]:
    """The rights that docs/redis.md gives to a user."""
    text = (PAGES / "redis.md").read_text(encoding="utf-8")
    rights = re.search(rf"^ACL SETUSER {user} on >\S+((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert rights is not None
    return rights[1].replace("\\", "").split()


BOTH = list(dict.fromkeys([*page_rights("replica"), *page_rights("publisher"), *DOCTOR]))


def allow(server: EmbeddedServer, rights: Sequence[str]) -> str:
    asked(server.port, "ACL", "SETUSER", "alice", "reset", "on", ">secret", *rights)
    return f"redis://alice:secret@127.0.0.1:{server.port}"


@asynccontextmanager
async def replica(url: str) -> AsyncIterator[Subscriber]:
    async with Subscriber(url, caches={"default": new_cache()}, replica_id="r1", **PATIENT) as subscriber:
        yield subscriber


def register(server: EmbeddedServer, presence: object, *, replica: str = "r1", namespace: str = "default") -> None:
    """Register a replica as an echo does, in a registry that lists every replica; None is no presence."""
    names = names_of(namespace)
    if presence is not None:
        asked(server.port, "SET", names.presence_prefix + replica, json.dumps(presence))
    asked(server.port, "ZADD", names.registry, int(time.time() * 1_000) + 60_000, replica, "9e15", " since=0")
    asked(server.port, "HSET", names.head, "lease_ms", 60_000)


# --- a server that is well, one that is away, and one that does not let us in ----------------------------------------


async def test_where_all_is_well_nothing_else_is_said(own_server: EmbeddedServer) -> None:
    asked(own_server.port, "CONFIG", "SET", "maxmemory", "100mb")
    asked(own_server.port, "CONFIG", "SET", "appendonly", "yes")
    async with replica(own_server.url) as subscriber, Publisher(own_server.url) as publisher:
        await reached(subscriber, await publisher.publish(Keys("key")))
        await make_registry_old(own_server.url, "default")
        findings = await findings_of(own_server.url, patience_seconds=20.0)
    assert {each.check for each in findings if each.severity != "ok"} - MEASURED == set()
    assert {each.check for each in findings} > MEASURED
    measured = {name for each in findings for name in each.measured}
    assert {"round_trip_p50_ms", "round_trip_max_ms", "delivery_p50_ms", "delivery_max_ms"} <= measured


async def test_looking_changes_nothing_and_no_replica_notices(own_server: EmbeddedServer) -> None:
    url = allow(own_server, ["+@all", "~*", "&*", "-eval", "-del"])  # rights are tried, and nothing is cleaned up
    async with replica(own_server.url) as subscriber, Publisher(own_server.url) as publisher:
        await reached(subscriber, await publisher.publish(Keys("key")))
        before = subscriber.stats(), set(asked(own_server.port, "KEYS", "*"))
        await findings_of(own_server.url)
        await findings_of(url)
        # Whatever had been published meanwhile would have come before this.
        await reached(subscriber, await publisher.publish(Keys("other")))
        stats, keys = subscriber.stats(), set(asked(own_server.port, "KEYS", "*"))
    # Two publishes, and nothing else, were heard; and a receipt for the second is all that there is more.
    assert (stats.received, stats.lost) == ({**before[0].received, "applied": 2}, 0)
    assert {key for key in keys - before[1] if b":receipt:" not in key} == set()


async def test_a_server_that_does_not_answer_is_one_problem_and_all_is_well_when_it_does(
    own_server: EmbeddedServer,
) -> None:
    own_server.pause()
    [frozen] = await findings_of(own_server.url, timeout_seconds=0.3)
    own_server.resume()
    assert (frozen.check, frozen.severity) == ("reachable", "problem")
    assert "within 0.3 s" in frozen.what
    assert (await found(own_server.url, "reachable")).severity != "problem"
    own_server.kill()
    [gone] = await findings_of(own_server.url)
    assert (gone.check, gone.severity) == ("reachable", "problem")
    assert "start the server" in gone.remedy
    own_server.restart()
    assert (await found(own_server.url, "reachable")).severity != "problem"


async def test_a_server_that_freezes_while_it_is_looked_at_is_a_problem(own_server: EmbeddedServer) -> None:
    def freeze() -> float:
        own_server.pause()
        return time.time()

    [frozen] = await findings_of(own_server.url, timeout_seconds=0.5, wall_clock=freeze)
    assert (frozen.check, frozen.severity) == ("reachable", "problem")
    assert "it answered before" in frozen.remedy


async def test_a_wrong_password_is_named_and_never_shown(own_server: EmbeddedServer) -> None:
    right = allow(own_server, ["+@all", "~*", "&*"])
    [refused] = await findings_of(right.replace("secret", "hush"))
    assert (refused.check, refused.severity) == ("reachable", "problem")
    assert "password" in refused.remedy
    assert "hush" not in str(refused)
    assert (await found(right, "reachable")).severity != "problem"


@pytest.mark.parametrize("kind", ["", "+cluster"])
async def test_what_keeps_a_user_out_is_known_from_the_server_whatever_the_names(
    own_server: EmbeddedServer, kind: str
) -> None:
    url = allow(own_server, ["+@all", "-client|setname", "~*", "&*"]).replace("redis://", f"redis{kind}://")
    for wrong, remedy in ((url, "right that is named"), (url.replace("secret", "hush"), "correct the user")):
        [refused] = await findings_of(wrong)
        assert remedy in refused.remedy
    away = LinkLost("expected a connection to redis://password.permission.svc:6379, got: connection refused")
    assert unreachable("here", away).remedy.startswith("start the server")


async def test_a_user_who_may_not_even_connect_is_told_the_right(own_server: EmbeddedServer) -> None:
    [refused] = await findings_of(allow(own_server, [each for each in BOTH if each != "+client|setname"]))
    assert "client|setname" in refused.what
    assert "Rights" in refused.remedy


# --- settings of the server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "settings", "mended", "severity", "names"),
    [
        ("eviction", {"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, "noeviction", "warning", "allkeys-lru"),
        ("eviction", {"maxmemory": "1gb", "maxmemory-policy": "volatile-lru"}, "noeviction", "info", "volatile-lru"),
        ("eviction", {"maxmemory-policy": "allkeys-lru"}, "noeviction", "info", "without maxmemory"),
        ("memory", {"maxmemory": "500kb"}, "1gb", "problem", "(2"),
        ("output-buffer", {"client-output-buffer-limit": "pubsub 1kb 1kb 1"}, "", "problem", "1024 1024 1"),
        ("output-buffer", {"client-output-buffer-limit": "pubsub 1mb 1mb 1"}, "", "warning", "a burst"),
        ("output-buffer", {"client-output-buffer-limit": "pubsub 0 0 0"}, "", "warning", "without end"),
        ("timeout", {"timeout": "5"}, "0", "warning", "5 s of silence"),
        ("timeout", {"timeout": "3600"}, "0", "info", "3600 s of silence"),
        ("persistence", {"save": ""}, "3600 1", "info", "none"),
        ("min-replicas", {"min-replicas-to-write": "1"}, "0", "problem", "NOREPLICAS"),
    ],
)
async def test_a_setting_that_costs_something_is_named_until_it_is_mended(
    own_server: EmbeddedServer, check: str, settings: dict[str, str], mended: str, severity: str, names: str
) -> None:
    for name, value in settings.items():
        asked(own_server.port, "CONFIG", "SET", name, value)
    findings = await findings_of(own_server.url)
    [finding] = [each for each in findings if each.check == check]
    assert (finding.severity, bool(finding.why), bool(finding.remedy)) == (severity, True, True)
    assert names in finding.what
    # Nothing else is mistaken for a fault: rights in particular, of which some commands are refused now.
    others = {each.check for each in findings if each.severity in {"warning", "problem"}} - MEASURED - {check}
    assert others == {"replicas"}
    asked(own_server.port, "CONFIG", "SET", [*settings][-1], mended or "pubsub 32mb 8mb 60")
    assert (await found(own_server.url, check)).severity == "ok"


@pytest.mark.parametrize(
    ("info", "is_old"),
    [
        ({"redis_version": "6.0.16"}, True),
        ({"redis_version": "5.0.7"}, True),
        ({"redis_version": "6.2.0"}, False),
        ({"redis_version": "10.0.1"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "7.0.1"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5"}, False),
    ],
)
def test_a_server_that_is_too_old_is_a_problem(info: dict[str, str], is_old: bool) -> None:
    [finding] = [each for each in examine_server(ServerFacts(label="redis://a", info=info)) if each.check == "version"]
    assert finding.severity == ("problem" if is_old else "ok")
    assert finding.what.endswith(info.get("valkey_version", info["redis_version"]))
    assert ("or newer" in finding.remedy) == is_old


def snapshot(status: str) -> dict[str, str]:
    return {"aof_enabled": "0", "rdb_last_bgsave_status": status}


@pytest.mark.parametrize(
    ("facts", "check", "severity"),
    [
        ({"round_trips_ms": [1.0, 900.0]}, "reachable", "warning"),
        ({"round_trips_ms": [1.0, 1.0, 900.0]}, "reachable", "ok"),
        ({"clock_ahead_ms": -90_000.0}, "clock", "info"),
        ({"clock_ahead_ms": 3.0}, "clock", "ok"),
        ({"info": {"used_memory": "95", "maxmemory": "100"}}, "memory", "warning"),
        ({"info": {"used_memory": "50", "maxmemory": "100"}}, "memory", "ok"),
        ({"info": {"aof_enabled": "1", "aof_last_write_status": "err"}}, "persistence", "problem"),
        ({"info": snapshot("err"), "settings": {"save": "1 1"}}, "persistence", "problem"),
        ({"info": snapshot("ok"), "settings": {"save": "1 1"}}, "persistence", "ok"),
        ({"info": {"loading": "1", "role": "master"}}, "primary", "problem"),
        ({"hello": {"role": "replica"}}, "primary", "problem"),
        ({"is_sentinel": True, "settings": {"min-replicas-to-write": "0"}}, "min-replicas", "warning"),
        ({"is_cluster": True, "settings": {"cluster-require-full-coverage": "yes"}}, "coverage", "info"),
        ({"refusals": ["NOPERM config|get"]}, "settings", "info"),
    ],
)
def test_facts_of_a_server_are_judged(facts: dict[str, Any], check: str, severity: str) -> None:
    [finding] = [each for each in examine_server(ServerFacts(label="redis://a", **facts)) if each.check == check]
    assert finding.severity == severity


async def test_a_server_replica_is_no_place_to_publish(own_server: EmbeddedServer) -> None:
    with EmbeddedServer() as other:
        port = other.port
        asked(own_server.port, "REPLICAOF", "127.0.0.1", port)
        finding = await found(own_server.url, "primary")
        asked(own_server.port, "REPLICAOF", "NO", "ONE")
    assert finding.severity == "problem"
    assert f"a replica of 127.0.0.1:{port}" in finding.what
    assert (await found(own_server.url, "primary")).severity == "ok"


# --- rights ----------------------------------------------------------------------------------------------------------


def test_the_rights_that_are_checked_are_those_of_the_page() -> None:
    for role in ("publisher", "replica"):
        rights = [each for each in rights_of(names_of("a"), is_sharded=False, me="m") if each.role == role]
        checked = {f"+{each.name}" for each in rights if not each.is_for_answers}
        assert checked == {rule for rule in page_rights(role) if rule.startswith("+")}


ASKING = re.findall(
    r"needs\s+besides\s+`([^`]+)`.*?needs\s+`([^`]+)`", (PAGES / "redis.md").read_text(encoding="utf-8"), re.DOTALL
)
"""The rights that docs/redis.md gives to a publisher that asks, besides."""


async def test_the_rights_of_the_page_are_enough_to_ask_and_to_answer(own_server: EmbeddedServer) -> None:
    [(confirming, asking)] = ASKING
    url = allow(own_server, [*page_rights("publisher"), *confirming.split(), *asking.split()])
    assert (await found(url, "asking", roles=["publisher"])).severity == "ok"
    url = allow(own_server, page_rights("replica"))
    assert (await found(url, "answering", roles=["replica"])).severity == "ok"
    # One that only publishes is told, and nothing is wrong with it.
    url = allow(own_server, page_rights("publisher"))
    only = await found(url, "asking", roles=["publisher"])
    assert only.severity == "info"
    assert (await found(url, "rights-publisher", roles=["publisher"])).severity == "ok"


@pytest.mark.parametrize(
    ("role", "right", "severity"),
    [
        ("replica", "&{cache-invalidation*}:question", "warning"),
        ("replica", "&{cache-invalidation*}:confirmed", "warning"),
        ("publisher", "&{cache-invalidation*}:question", "info"),
        ("publisher", "&{cache-invalidation*}:confirmed", "info"),
        ("publisher", "+mget", "info"),
    ],
)
async def test_a_user_who_may_not_ask_or_answer_is_named_until_it_may(
    own_server: EmbeddedServer, role: Any, right: str, severity: str
) -> None:
    rights = [*page_rights(role), *(rule for some in ASKING[0] for rule in some.split() if role == "publisher")]
    assert right in rights
    check = {"publisher": "asking", "replica": "answering"}[role]
    url = allow(own_server, ["+acl|whoami", *(each for each in rights if each != right)])
    finding = await found(url, check, roles=[role])
    assert (finding.severity, finding.measured["missing_rights"]) == (severity, 1)
    assert right.replace("*", "") in finding.remedy
    assert "missing" in finding.why
    assert (await found(url, f"rights-{role}", roles=[role])).severity == "ok"
    asked(own_server.port, *finding.remedy.split())
    assert (await found(url, check, roles=[role])).severity == "ok"


async def test_a_server_that_cannot_tell_is_tried_for_the_right_to_be_asked(own_server: EmbeddedServer) -> None:
    def without(*rights: str) -> str:
        return allow(own_server, [each for each in page_rights("replica") if each not in {"+eval", *rights}])

    assert (await found(without(), "answering", roles=["replica"])).severity == "ok"
    for right in ("question", "confirmed"):
        finding = await found(without(f"&{{cache-invalidation*}}:{right}"), "answering", roles=["replica"])
        assert (finding.severity, finding.measured["missing_rights"]) == ("warning", 1)
        assert f":{right}" in finding.remedy


@pytest.mark.parametrize("role", ["publisher", "replica"])
async def test_the_rights_of_the_page_are_enough_and_are_told_apart(own_server: EmbeddedServer, role: Any) -> None:
    url = allow(own_server, page_rights(role))
    assert (await found(url, f"rights-{role}", roles=[role])).severity == "ok"
    other = "replica" if role == "publisher" else "publisher"
    assert (await found(url, f"rights-{other}")).severity == "problem"


@pytest.mark.parametrize("is_asked", [True, False], ids=["asked", "tried"])
@pytest.mark.parametrize(
    ("right", "roles"),
    [
        ("+xadd", {"publisher"}),
        ("+publish", {"publisher", "replica"}),
        ("+subscribe", {"replica"}),
        ("+xrange", {"replica"}),
        ("+hset", {"publisher", "replica"}),
        ("+set", {"publisher", "replica"}),
    ],
)
async def test_a_missing_right_is_named_until_it_is_given(
    own_server: EmbeddedServer, right: str, roles: set[str], is_asked: bool
) -> None:
    def missing(findings: list[Finding]) -> dict[str, set[str]]:
        """Role to the rights that its remedy gives."""
        return {
            each.check.removeprefix("rights-"): {rule for rule in each.remedy.split() if rule.startswith("+")}
            for each in findings
            if each.check.startswith("rights-") and each.severity == "problem"
        }

    base = BOTH if is_asked else [each for each in BOTH if each != "+eval"]
    noise: set[str] = set() if is_asked else {"+eval"}
    findings = await findings_of(allow(own_server, [each for each in base if each != right]))
    named = {role: rules - noise for role, rules in missing(findings).items()}
    assert {role: rules for role, rules in named.items() if rules} == {role: {right} for role in roles}
    mended = missing(await findings_of(allow(own_server, base)))
    assert {role: rules - noise for role, rules in mended.items() if rules - noise} == {}


async def test_the_remedy_for_missing_rights_is_one_that_helps(own_server: EmbeddedServer) -> None:
    url = allow(own_server, ["+client|setname", "+eval", "+acl|whoami", "+ping"])
    for finding in await findings_of(url):
        if finding.check.startswith("rights-"):
            assert finding.severity == "problem"
            asked(own_server.port, *finding.remedy.split())
    for role in ("publisher", "replica"):
        assert (await found(url, f"rights-{role}")).severity == "ok"


async def test_what_a_user_may_not_ask_for_is_said_to_be_unchecked(own_server: EmbeddedServer) -> None:
    register(own_server, None)
    # The second `resetchannels` would take the channels of the first role away.
    publishers = [right for right in page_rights("publisher") if right != "resetchannels"]
    findings = await findings_of(allow(own_server, [*page_rights("replica"), *publishers]))
    by_check = {each.check: each for each in findings}
    assert "config|get" in by_check["settings"].what
    assert "mget" in by_check["replicas"].what
    assert "+mget" in by_check["replicas"].remedy
    assert {each.check for each in findings if each.severity in {"warning", "problem"}} <= MEASURED
    assert "settings" not in {each.check for each in await findings_of(own_server.url)}


# --- log and delivery ------------------------------------------------------------------------------------------------


async def test_a_log_that_does_not_reach_back_is_named(own_server: EmbeddedServer) -> None:
    assert (await found(own_server.url, "log")).severity == "info"
    async with Publisher(own_server.url) as publisher:
        for _ in range(5):
            await publisher.publish(Keys("key"))
    whole = await found(own_server.url, "log")
    assert (whole.severity, whole.measured["log_length"]) == ("ok", 5)
    asked(own_server.port, "XTRIM", "{cache-invalidation}:log", "MAXLEN", 2)
    trimmed = await found(own_server.url, "log", away_seconds=3_600)
    assert (trimmed.severity, trimmed.measured["log_length"]) == ("warning", 2)
    assert "away for 1 h cannot catch up" in trimmed.what
    asked(own_server.port, "DEL", "{cache-invalidation}:log")
    lost = await found(own_server.url, "log")
    assert (lost.severity, "its end was lost" in lost.what) == ("warning", True)
    asked(own_server.port, "SET", "{cache-invalidation}:log", "mine")
    foreign = await found(own_server.url, "log")
    assert (foreign.severity, "WRONGTYPE" in foreign.what) == ("warning", True)


def log_of(*, seconds: int) -> NamespaceFacts:
    log = LogFacts(
        length=10_000, first_sequence=90_001, last_sequence=100_000, first_sent_at_ms=0, last_sent_at_ms=seconds * 1_000
    )
    return NamespaceFacts(namespace="products", head=Position("e", 100_000), log=log)


def test_a_log_is_measured_against_the_time_that_a_replica_may_be_away() -> None:
    [short] = [each for each in examine_namespace(log_of(seconds=30), away_seconds=60) if each.check == "log"]
    assert (short.severity, short.measured["log_covers_seconds"]) == ("warning", 30)
    assert "about 20000" in short.remedy
    [long] = [each for each in examine_namespace(log_of(seconds=61), away_seconds=60) if each.check == "log"]
    assert (long.severity, long.remedy) == ("ok", "")


@pytest.mark.parametrize(
    ("facts", "severity"),
    [
        (DeliveryFacts(latencies_ms=[0.1, 0.2], lost=1), "problem"),
        (DeliveryFacts(latencies_ms=[900.0, 901.0]), "warning"),
        (DeliveryFacts(refusal="NOPERM"), "info"),
        (DeliveryFacts(latencies_ms=[0.1, 0.2]), "ok"),
    ],
)
def test_probes_that_are_lost_or_late_are_named(facts: DeliveryFacts, severity: str) -> None:
    findings = examine_namespace(NamespaceFacts(namespace="products", delivery=facts), away_seconds=60)
    assert [each.severity for each in findings if each.check == "delivery"] == [severity]


# --- silent replicas, and ids of several processes -------------------------------------------------------------------


def test_silent_replicas_are_a_problem_if_they_may_serve_and_otherwise_a_warning() -> None:
    silent = [
        ReplicaPresence(
            replica="a", is_silent=True, may_serve=True, seen_ms_ago=7_000, position=Position("e", 6), behind=1
        ),
        ReplicaPresence(replica="b", is_silent=True, may_serve=False, seen_ms_ago=7_000),
    ]
    facts = NamespaceFacts(
        namespace="products", replicas=[Presence(replica="c", state="coherent")], silent=silent, read_at=1_700_000_000
    )
    findings = {each.check + each.severity: each for each in examine_namespace(facts, away_seconds=60)}
    assert "1 replica, all coherent; 2 more fell silent" in findings["replicasinfo"].what
    seen = time.strftime("%H:%M:%S", time.localtime(1_700_000_000 - 7))
    assert findings["silentproblem"].what == f"1 replica fell silent: a last seen {seen}, has not dropped #7"
    assert findings["silentwarning"].what == f"1 replica fell silent: b last seen {seen}"
    assert "broadcache replicas -n products --forget ID" in findings["silentproblem"].remedy


def test_an_id_of_several_processes_is_a_problem() -> None:
    shared = Presence(replica="web-1", state="coherent", host="one", pid=1, conflict="pid 2 on two")
    facts = NamespaceFacts(namespace="products", replicas=[shared], shared_ids=["web-1"])
    [found] = [each for each in examine_namespace(facts, away_seconds=60) if each.check == "replica-ids"]
    assert (found.severity, found.what) == (
        "problem",
        "several processes have one replica id: web-1 (pid 2 on two; pid 1 on one)",
    )
    suspected = NamespaceFacts(namespace="products", replicas=[Presence(replica="web-1")], shared_ids=["web-1"])
    [found] = [each for each in examine_namespace(suspected, away_seconds=60) if each.check == "replica-ids"]
    assert found.severity == "info"


# --- replicas --------------------------------------------------------------------------------------------------------


async def test_a_replica_that_cannot_prove_itself_is_named_until_it_can(own_server: EmbeddedServer) -> None:
    rights = page_rights("replica")
    url = allow(own_server, [each for each in rights if each != "+publish"])
    caches = {"default": new_cache()}
    async with Subscriber(url, caches=caches, replica_id="r1", **{**PATIENT, "start_timeout_seconds": 0}) as subscriber:
        await until(lambda: asked(own_server.port, "EXISTS", "{cache-invalidation}:replica:r1"), "presence")
        # Its echoes fail before they register it. Its own user's rights say why.
        broken = await found(own_server.url, "replicas")
        lacking = await found(url, "rights-replica", roles=["replica"])
        allow(own_server, rights)
        await until(lambda: subscriber.state == "coherent")
        await make_registry_old(own_server.url, "default")
        mended = await found(own_server.url, "replicas", patience_seconds=20.0)
    assert (broken.severity, mended.severity) == ("warning", "ok")
    assert "run the doctor with" in broken.remedy
    assert (lacking.severity, "publish on" in lacking.what) == ("problem", True)
    assert mended.what == "1 replica, all coherent"


async def test_a_replica_that_may_not_register_is_seen_by_its_subscription(own_server: EmbeddedServer) -> None:
    url = allow(own_server, [each for each in page_rights("replica") if each != "+zadd"])
    async with replica(url) as subscriber:
        assert subscriber.state == "coherent"
        finding = await found(own_server.url, "replicas")
    assert (finding.severity, "no replica is registered; 1 other connection" in finding.what) == ("warning", True)
    assert "run the doctor with their user" in finding.remedy


def coherent_at(position: object, **fields: object) -> dict[str, object]:
    return {"replica": "r1", "namespace": "products", "state": "coherent", "position": position, **fields}


@pytest.mark.parametrize(
    ("presence", "fault"),
    [
        (coherent_at(["EPOCH", 1]), "r1 is at 1, the head is 2"),
        (coherent_at(["another", 2]), "r1 is in another epoch"),
        (coherent_at(None), "r1 knows no position, the head is 2"),
        (coherent_at(["EPOCH", 2], state="lost"), "r1 is lost"),
        (coherent_at(7), "r1 has a presence that cannot be read"),
        ({"replica": "r1"}, "r1 has a presence that cannot be read"),
        ("not what was expected", "r1 has a presence that cannot be read"),
        (None, "r1 is registered, but its presence is missing"),
        (coherent_at(["EPOCH", 2], version="99.0", later_field={"a": [1]}), ""),
        (coherent_at(["EPOCH", 3]), ""),
        (coherent_at(["EPOCH", 2], replica="another name"), ""),
    ],
)
async def test_a_replica_that_is_not_coherent_is_named_whoever_wrote_its_presence(
    own_server: EmbeddedServer, presence: object, fault: str
) -> None:
    async with Publisher(own_server.url) as publisher:
        await publisher.publish(Keys("key"), namespace="products")
        position = (await publisher.publish(Keys("key"), namespace="products")).position
    assert position is not None
    register(own_server, json.loads(json.dumps(presence).replace("EPOCH", position.epoch)), namespace="products")
    finding = await found(own_server.url, "replicas", namespaces=["products"])
    assert finding.severity == ("problem" if fault else "ok")
    assert fault in finding.what
    assert finding.measured["replicas"] == 1
    # Other namespaces are not affected.
    assert (await found(own_server.url, "replicas")).what == "there are no replicas"


@pytest.mark.parametrize("command", [["SET", b"\xff\xfe\x00"], ["SET", "[" * 100_000], ["HSET", "field", "value"]])
async def test_a_presence_that_something_else_has_overwritten_is_a_problem(
    own_server: EmbeddedServer, command: list[Any]
) -> None:
    register(own_server, coherent_at(None, namespace="default"), replica="r2")
    register(own_server, None)
    name, *arguments = command
    asked(own_server.port, name, names_of("default").presence_prefix + "r1", *arguments)
    finding = await found(own_server.url, "replicas")
    assert (finding.severity, finding.what.partition(": ")[0]) == ("problem", "1 of 2 replicas is not coherent")
    assert ("cannot be read" if name == "SET" else "its presence is missing") in finding.what


async def test_a_presence_that_was_lost_is_back_with_the_next_echo(own_server: EmbeddedServer) -> None:
    async with replica(own_server.url):
        await make_registry_old(own_server.url, "default")
        asked(own_server.port, "DEL", names_of("default").presence_prefix + "r1")
        assert (await found(own_server.url, "replicas", patience_seconds=20.0)).severity == "ok"


async def test_a_registration_that_has_ended_is_no_replica(own_server: EmbeddedServer) -> None:
    register(own_server, coherent_at(None))
    asked(own_server.port, "ZADD", names_of("default").registry, int(time.time() * 1_000) - 1, "r1")
    assert (await found(own_server.url, "replicas")).what == "there are no replicas"


async def test_a_registry_that_may_not_list_every_replica_is_for_information(own_server: EmbeddedServer) -> None:
    async with replica(own_server.url):
        new = await found(own_server.url, "replicas", patience_seconds=20.0)
        await make_registry_old(own_server.url, "default")
        old = await found(own_server.url, "replicas", patience_seconds=20.0)
    assert (new.severity, old.severity) == ("info", "ok")
    assert "1 replica, all coherent; the registry of 'default' has existed for only" in new.what


async def test_a_registry_of_another_type_is_a_warning_that_names_the_key(own_server: EmbeddedServer) -> None:
    registry = names_of("default").registry
    asked(own_server.port, "SET", registry, "mine")
    finding = await found(own_server.url, "replicas")
    assert (finding.severity, "WRONGTYPE" in finding.what, registry in finding.remedy) == ("warning", True, True)
    asked(own_server.port, "DEL", registry)
    assert (await found(own_server.url, "replicas")).what == "there are no replicas"


async def test_replicas_are_read_without_the_right_to_scan_and_whatever_else_is_on_the_server(
    own_server: EmbeddedServer,
) -> None:
    presence = coherent_at(None, namespace="default")
    register(own_server, presence)
    asked(own_server.port, "SET", names_of("default").presence_prefix + "unregistered", json.dumps(presence))
    asked(own_server.port, "MSET", *(f"other:{number}" for number in range(10_000)))
    url = allow(own_server, ["+@all", "-scan", "-keys", "~*", "&*"])
    assert (await found(url, "replicas")).what == "1 replica, all coherent"
    assert (await found(allow(own_server, BOTH), "replicas")).what == "1 replica, all coherent"


async def test_subscribers_that_are_no_registered_replicas_are_counted(own_server: EmbeddedServer) -> None:
    async with redis_probe(own_server.url) as probe:
        await probe.subscribe(names_of("default").channel)
        alone = await found(own_server.url, "replicas")
    assert (alone.severity, "no replica is registered; 1 other connection" in alone.what) == ("warning", True)
    async with replica(own_server.url), redis_probe(own_server.url) as probe:
        await make_registry_old(own_server.url, "default")
        await probe.subscribe(names_of("default").channel)
        beside = await found(own_server.url, "replicas", patience_seconds=20.0)
    assert (beside.severity, "1 replica, all coherent; 1 other connection" in beside.what) == ("info", True)


async def test_a_replica_that_is_starting_is_looked_at_again(own_server: EmbeddedServer) -> None:
    def is_now(state: str) -> None:
        register(own_server, coherent_at(None, namespace="default", state=state))

    async def sleep(_: float) -> None:
        is_now("coherent")

    is_now("recovering")
    assert (await found(own_server.url, "replicas", patience_seconds=20.0, sleep=sleep)).severity == "ok"
    is_now("recovering")
    assert (await found(own_server.url, "replicas", patience_seconds=0.0, sleep=sleep)).severity == "problem"


# --- several servers, and the fan-out --------------------------------------------------------------------------------


async def test_behind_sentinels_the_bound_on_two_primaries_is_asked_for(tmp_path: Path) -> None:
    with watched(tmp_path) as servers:
        port = servers.primary.port
        loose = await found(servers.url, "min-replicas")
        asked(servers.primary.port, "CONFIG", "SET", "min-replicas-to-write", 1)
        wait_until(
            lambda: b"min_slaves_good_slaves:1" in asked(servers.primary.port, "INFO", "replication"), "a good replica"
        )
        bound = await found(servers.url, "min-replicas")
    assert (loose.severity, bound.severity) == ("warning", "ok")
    assert "CONFIG SET min-replicas-to-write 1" in loose.remedy
    assert f"127.0.0.1:{port} of redis+sentinel://" in bound.subject


async def test_in_a_cluster_each_namespace_is_looked_at_where_it_is() -> None:
    with cluster_of_three() as cluster:
        namespaces = cluster.namespaces()
        findings = await findings_of(cluster.url, namespaces=namespaces)
        ports = [node.port for node in cluster.nodes]
        cluster.nodes[0].kill()
        after = await findings_of(cluster.url, namespaces=namespaces)
    subjects = list(dict.fromkeys(each.subject for each in findings))
    assert [int(subject.partition(" of ")[0].rpartition(":")[2]) for subject in subjects[:3]] == ports
    assert subjects[3:] == [f"namespace {each}" for each in namespaces]
    assert {each.check for each in findings if each.severity == "problem"} == set()
    away = {each.subject for each in after if (each.check, each.severity) == ("reachable", "problem")}
    assert away == {f"namespace {namespaces[0]}"}


async def test_the_service_of_the_fan_out_is_looked_up() -> None:
    def found(*hosts: str, doubt: str = "") -> Any:
        async def discover(service: str) -> Discovered:
            return Discovered(
                tuple(ReplicaAddress(host, 80) for host in hosts), "dns", not doubt, (doubt,) if doubt else ()
            )

        return discover

    async def fails(service: str) -> Discovered:
        raise OSError("no name server")

    async def severity_and_text(discover: Any) -> tuple[str, str]:
        [finding] = await look_up("replicas", discover, timeout_seconds=10)
        assert finding.subject == "service replicas"
        return finding.severity, finding.what

    assert await severity_and_text(found("10.0.0.0", "10.0.0.1")) == ("ok", "2 addresses: 10.0.0.0:80, 10.0.0.1:80")
    assert await severity_and_text(found("10.0.0.0", doubt="one for all")) == (
        "warning",
        "1 address: 10.0.0.0:80; one for all",
    )
    assert await severity_and_text(found()) == ("problem", "it has no addresses")
    assert await severity_and_text(fails) == ("problem", "it cannot be looked up: no name server")


async def test_the_command_looks_it_up_as_the_fan_out_would(own_server: EmbeddedServer) -> None:
    async def seen(**variables: str) -> dict[str, Any]:
        variables |= {"BROADCACHE_REDIS_URL": own_server.url, "BROADCACHE_FANOUT_SERVICE": "web.test:80"}
        finished = await asyncio.to_thread(run, "doctor", "--json", **variables)
        [finding] = [each for each in json.loads(finished.stdout)["findings"] if each["check"] == "fan-out"]
        return dict(finding)

    async with DnsServer() as dns:
        dns.a("web.test", "127.0.0.2", "127.0.0.3")
        asked = {"BROADCACHE_FANOUT_NAMESERVERS": dns.address}
        assert (await seen(**asked))["severity"] == "problem"  # loopback has to be named
        allowed = await seen(**asked, BROADCACHE_FANOUT_NETWORKS="127.0.0.0/8")
    assert (allowed["severity"], allowed["what"]) == ("ok", "2 addresses: 127.0.0.2:80, 127.0.0.3:80")


# --- what is typed wrongly, and the command --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"namespaces": []}, InvalidSettings),
        ({"namespaces": ["no such"]}, InvalidNamespace),
        ({"namespaces": ["a"], "timeout_seconds": 0}, InvalidSettings),
        ({"namespaces": ["a"], "away_seconds": float("nan")}, InvalidSettings),
    ],
)
def test_a_diagnosis_that_cannot_be_made_is_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        Diagnosis("redis://127.0.0.1", **options)


def test_the_command_ends_with_0_for_warnings_and_with_1_for_problems(own_server: EmbeddedServer) -> None:
    def code(*arguments: str) -> int:
        finished = run("doctor", "--redis-url", own_server.url, *arguments)
        assert finished.stderr == ""
        return finished.returncode

    assert code() == 0  # there are no replicas: a warning
    assert code("--strict") == 1
    asked(own_server.port, "CONFIG", "SET", "min-replicas-to-write", 1)
    assert code() == 1
    asked(own_server.port, "CONFIG", "SET", "min-replicas-to-write", 0)
    assert code() == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--namespace", "no such"),
        ("--timeout-seconds", "0"),
        ("--role", "nobody"),
        ("--redis-url", "http://a"),
        ("--no-such-option",),
    ],
)
def test_a_command_that_is_typed_wrongly_ends_with_2(arguments: tuple[str, ...]) -> None:
    finished = run("doctor", *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "Traceback" not in finished.stderr


def test_json_is_one_object_with_all_findings(own_server: EmbeddedServer) -> None:
    finished = run("doctor", "-n", "a", "-n", "b", "--json", BROADCACHE_REDIS_URL=own_server.url)
    answer = json.loads(finished.stdout)
    assert (finished.returncode, answer["redis"], answer["worst"]) == (0, own_server.url, "warning")
    assert sum(answer["counts"].values()) == len(answer["findings"])
    subjects = dict.fromkeys(each["subject"] for each in answer["findings"])
    assert list(subjects) == [own_server.url, "namespace a", "namespace b"]
    fields = {"check", "subject", "severity", "what", "why", "remedy", "measured"}
    assert all(set(each) == fields and each["why"] for each in answer["findings"])


def test_text_fits_the_width_and_ends_with_a_summary(own_server: EmbeddedServer) -> None:
    finished = run("doctor", "--redis-url", own_server.url, COLUMNS="80")
    lines = finished.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(rf"{own_server.url}: 1 warning, \d+ for information, \d+ ok", lines[-1])
    assert "service" not in finished.stdout


def test_a_server_that_is_away_is_one_problem_without_a_traceback_or_a_password(own_server: EmbeddedServer) -> None:
    url = own_server.url.replace("://", "://alice:hush@")
    own_server.kill()
    for arguments in ([], ["--json"]):
        finished = run("doctor", "--redis-url", url, *arguments)
        assert (finished.returncode, finished.stderr) == (1, "")
        assert "hush" not in finished.stdout
        assert "1 problem" in finished.stdout or json.loads(finished.stdout)["counts"]["problem"] == 1

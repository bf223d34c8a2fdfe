"""What is to be thought of the facts: each check is a function from facts to findings, and asks nobody."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ...shared.errors import LinkLost
from ...shared.wire import FRAME_BYTES_MAX
from .facts import DeliveryFacts, FanoutFacts, LogFacts, NamespaceFacts, PresenceFacts, ServerFacts
from .findings import Check, Finding
from .rights import ROLES, Right, Role

__all__ = ["examine_fanout", "examine_namespace", "examine_server", "is_settled", "unreachable"]

_REDIS_VERSION_MIN: Final = (6, 2)
_VALKEY_VERSION_MIN: Final = (7, 2)
_ROUND_TRIP_MS_MAX: Final = 100.0
"""A replica asks every second and waits two, and a publish tries five: beyond this, little is left for what fails."""
_DELIVERY_MS_MAX: Final = 500.0
_MEMORY_SHARE_MAX: Final = 0.9
_BUFFER_BYTES_MIN: Final = 8 * 2**20
"""Half of the largest page of the log that a replica reads at once."""
_IDLE_SECONDS_MIN: Final = 60
_LAG_SECONDS_MAX: Final = 30
_CLOCK_MS_MAX: Final = 1_000.0
_NAMES_SHOWN_MAX: Final = 8
_REDIS_PAGE: Final = "docs/redis.md"
_WHY_ANSWERS: Final[dict[Role, str]] = {
    "publisher": "without them it cannot ask who is there: previews, audits and confirmations are refused, or show "
    "replicas as missing that are there",
    "replica": "a replica that hears no questions, or may not answer, is missing in previews and audits, and in "
    "confirmations until an echo tells; its cache works all the same",
}


# --- the server ------------------------------------------------------------------------------------------------------


def unreachable(subject: str, error: LinkLost) -> Finding:
    """Find that a server does not answer, or does not let us in."""
    check = Check("reachable", subject, "publishes fail, and every replica bypasses its caches and loads the source")
    cause = f"{error} {error.__cause__ or ''}".lower()
    if re.search(r"password|authenticat|noauth|wrongpass", cause):
        return check.problem(str(error), "correct the user and the password of the URL, or have the server know them")
    if "noperm" in cause or "permission" in cause:
        return check.problem(str(error), f"give this user the right that is named: see {_REDIS_PAGE}, Rights")
    if "unknown command" in cause:
        return check.problem(
            str(error), f"use Redis {_dotted(_REDIS_VERSION_MIN)} or Valkey {_dotted(_VALKEY_VERSION_MIN)}"
        )
    return check.problem(str(error), "start the server, or correct the URL; see whether a firewall is between")


def examine_server(facts: ServerFacts) -> list[Finding]:
    """Judge one server."""
    checks: tuple[Callable[[ServerFacts], Iterable[Finding]], ...] = (
        _round_trip,
        _version,
        _primary,
        _persistence,
        _eviction,
        _memory,
        _output_buffer,
        _idle_timeout,
        _min_replicas,
        _coverage,
        _clock,
        _untold,
    )
    return [finding for check in checks for finding in check(facts)]


def _round_trip(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "reachable", facts.label, "each publish costs one round trip, and each proof that a cache may be served"
    )
    if not facts.round_trips_ms:
        return
    median_ms, max_ms = statistics.median(facts.round_trips_ms), max(facts.round_trips_ms)
    what = f"answers; a round trip takes {_ms(median_ms)}, of {len(facts.round_trips_ms)} at most {_ms(max_ms)}"
    measured = {"round_trip_p50_ms": median_ms, "round_trip_max_ms": max_ms}
    if median_ms > _ROUND_TRIP_MS_MAX:
        yield check.warning(what, "put the server nearer, or see what keeps it busy (redis-cli --latency)", **measured)
    else:
        yield check.ok(what, **measured)


def _version(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("version", facts.label, "older servers lack commands that the log and the links are made of")
    name, text = _name_and_version(facts)
    if not text:
        return
    version = tuple(map(int, re.findall(r"\d+", text)[:2]))
    wanted = _VALKEY_VERSION_MIN if name == "Valkey" else _REDIS_VERSION_MIN
    what = f"{name} {text}"
    if version < wanted:
        yield check.problem(what, f"use {name} {_dotted(wanted)} or newer")
    else:
        yield check.ok(what)


def _name_and_version(facts: ServerFacts) -> tuple[str, str]:
    if "valkey_version" in facts.info:  # which calls itself a Redis 7.2 as well, for old clients
        return "Valkey", facts.info["valkey_version"]
    if "redis_version" in facts.info:
        return "Redis", facts.info["redis_version"]
    return facts.hello.get("server", "redis").capitalize(), facts.hello.get("version", "")


def _primary(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("primary", facts.label, "only a primary takes publishes and the proofs of replicas")
    role = facts.info.get("role") or facts.hello.get("role", "")
    if role in {"slave", "replica"}:
        primary = f"{facts.info.get('master_host', 'its primary')}:{facts.info.get('master_port', '')}".rstrip(":")
        yield check.problem(
            f"this server is a replica of {primary}",
            "give the URL of the primary, or that of the sentinels: redis+sentinel://…/service",
        )
    elif facts.info.get("loading") == "1":
        yield check.problem("the server is loading its data and refuses everything else", "wait until it has")
    elif role:
        yield check.ok("this server is a primary")


def _persistence(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "persistence",
        facts.label,
        "a restart costs every replica one clear, never a stale value; without persistence it also loses the history "
        "and the ids that make a retry harmless",
    )
    if "aof_enabled" not in facts.info:
        return
    has_file = facts.info["aof_enabled"] == "1"
    snapshots = facts.settings.get("save", "")
    if has_file and facts.info.get("aof_last_write_status", "ok") != "ok":
        yield check.problem("the last write to the append-only file failed: writes are refused", "free the disk")
    elif (
        snapshots
        and facts.info.get("rdb_last_bgsave_status", "ok") != "ok"
        and facts.settings.get("stop-writes-on-bgsave-error", "yes") == "yes"
    ):
        yield check.problem(
            "the last snapshot failed: writes are refused (MISCONF)", "free disk and memory, then: redis-cli BGSAVE"
        )
    elif has_file:
        yield check.ok("an append-only file: a restart keeps the log")
    elif snapshots:
        yield check.ok(f"snapshots (save {snapshots}): a restart keeps the log as it was at the last one")
    elif "save" in facts.settings:
        yield check.info(
            "none: a restart loses the log", "CONFIG SET appendonly yes, unless the server is there for this alone"
        )


def _eviction(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "eviction",
        facts.label,
        "an evicted log or head costs every replica a clear, again and again when memory is short",
    )
    policy = facts.settings.get("maxmemory-policy") or facts.info.get("maxmemory_policy", "")
    if not policy:
        return
    evicted = int(facts.info.get("evicted_keys", "0"))
    what = f"maxmemory-policy is {policy}" + (f"; {evicted} keys have been evicted" if evicted else "")
    remedy = "CONFIG SET maxmemory-policy noeviction; if other data has to be evicted, use a server of its own for this"
    if policy == "noeviction":
        yield check.ok(what)
    elif not _memory_max(facts):
        yield check.info(f"{what}; without maxmemory nothing is evicted", remedy)
    elif policy.startswith("volatile-"):
        yield check.info(f"{what}: of ours, it takes only what expires: presence, and the ids of retries", remedy)
    else:
        yield check.warning(what, remedy, evicted_keys=evicted)


def _memory(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("memory", facts.label, "a server without memory refuses publishes, or evicts the log")
    if "used_memory" not in facts.info:
        return
    used, most = int(facts.info["used_memory"]), _memory_max(facts)
    if not most:
        yield check.info(
            f"{_mib(used)} used, and no maxmemory: nothing but the machine sets a limit",
            "CONFIG SET maxmemory to what the machine can spare",
            used_memory_bytes=used,
        )
        return
    what = f"{_mib(used)} of {_mib(most)} used ({used / most:.0%})"
    measured = {"used_memory_bytes": used, "maxmemory_bytes": most}
    remedy = "raise maxmemory, or find what takes it: redis-cli --memkeys"
    if used >= most:
        yield check.problem(what, remedy, **measured)
    elif used > _MEMORY_SHARE_MAX * most:
        yield check.warning(what, remedy, **measured)
    else:
        yield check.ok(what, **measured)


def _memory_max(facts: ServerFacts) -> int:
    return int(facts.info.get("maxmemory") or facts.settings.get("maxmemory") or "0")


def _output_buffer(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "output-buffer",
        facts.label,
        "a replica that reads too slowly is cut off at this limit, bypasses its caches and catches up from the log",
    )
    found = re.search(r"pubsub (\d+) (\d+) (\d+)", facts.settings.get("client-output-buffer-limit", ""))
    if found is None:
        return
    hard, soft, soft_seconds = map(int, found.groups())
    what = f"client-output-buffer-limit pubsub is {hard} {soft} {soft_seconds}"
    remedy = 'CONFIG SET client-output-buffer-limit "pubsub 32mb 8mb 60"'
    limits = [limit for limit in (hard, soft) if limit]
    if not limits:
        yield check.warning(f"{what}: a replica that hangs takes memory without end", remedy)
    elif min(limits) < FRAME_BYTES_MAX:
        yield check.problem(f"{what}: less than one message may have ({FRAME_BYTES_MAX} bytes)", remedy)
    elif min(limits) < _BUFFER_BYTES_MIN:
        yield check.warning(f"{what}: a burst, or a page of the log, may be more", remedy)
    else:
        yield check.ok(what)


def _idle_timeout(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("timeout", facts.label, "a publisher that has nothing to say for so long pays for a new link")
    if "timeout" not in facts.settings:
        return
    seconds = int(facts.settings["timeout"])
    if not seconds:
        yield check.ok("timeout is 0: idle links are not cut")
    elif seconds < _IDLE_SECONDS_MIN:
        yield check.warning(f"timeout is {seconds}: links are cut after {seconds} s of silence", "CONFIG SET timeout 0")
    else:
        yield check.info(f"timeout is {seconds}: links are cut after {seconds} s of silence", "CONFIG SET timeout 0")


def _min_replicas(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "min-replicas",
        facts.label,
        "while two primaries exist, the wrong one may accept a publish; these settings bound how long",
    )
    if "min-replicas-to-write" not in facts.settings:
        return
    wanted = int(facts.settings["min-replicas-to-write"])
    lag_seconds = int(facts.settings.get("min-replicas-max-lag", "10"))
    connected = int(facts.info.get("connected_slaves", "0"))
    good = int(facts.info.get("min_slaves_good_slaves", connected))
    what = f"min-replicas-to-write {wanted}, min-replicas-max-lag {lag_seconds}, {connected} server replicas connected"
    remedy = "CONFIG SET min-replicas-to-write 1, and CONFIG SET min-replicas-max-lag 10"
    is_bound = wanted > 0 and lag_seconds > 0
    if is_bound and good < wanted:
        yield check.problem(f"{what}: publishes are refused (NOREPLICAS)", "bring the server's replicas back")
    elif not facts.is_sentinel and not connected:
        yield check.ok("there are no server replicas, and so no second primary")
    elif not is_bound:
        yield check.warning(f"{what}: a primary that was cut off goes on accepting", remedy)
    elif lag_seconds > _LAG_SECONDS_MAX:
        yield check.warning(f"{what}: it goes on accepting for that long", remedy)
    else:
        yield check.ok(what)


def _coverage(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("coverage", facts.label, "with it, one part of the cluster that is away stops all the others")
    setting = facts.settings.get("cluster-require-full-coverage", "")
    if facts.is_cluster and setting == "yes":
        yield check.info("cluster-require-full-coverage is yes", "CONFIG SET cluster-require-full-coverage no")
    elif facts.is_cluster and setting:
        yield check.ok(f"cluster-require-full-coverage is {setting}")


def _clock(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "clock",
        facts.label,
        "for information: no wall clock takes part in the promise; times in the log are compared by eye",
    )
    if facts.clock_ahead_ms is None:
        return
    ahead_ms = facts.clock_ahead_ms
    what = f"the server's clock is {_ms(abs(ahead_ms))} {'ahead of' if ahead_ms >= 0 else 'behind'} this machine's"
    if abs(ahead_ms) > _CLOCK_MS_MAX:
        yield check.info(what, "have both machines follow the same time servers", clock_ahead_ms=ahead_ms)
    else:
        yield check.ok(what, clock_ahead_ms=ahead_ms)


def _untold(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("settings", facts.label, "what is not told is not checked")
    if facts.refusals:
        yield check.info(
            f"not everything was told: {'; '.join(facts.refusals)}",
            f"ask with a user that may +info +config|get +time, or compare with {_REDIS_PAGE} by hand",
        )


# --- a namespace -----------------------------------------------------------------------------------------------------


def examine_namespace(facts: NamespaceFacts, *, away_seconds: float) -> list[Finding]:
    """Judge one namespace. `away_seconds` is how long a replica may be away and still catch up from the log."""
    findings = [*_rights(facts), *_answers(facts), *_log(facts, away_seconds), *_delivery(facts)]
    return [*findings, *_replicas(facts)]


def _subject(facts: NamespaceFacts) -> str:
    return f"namespace {facts.namespace}"


def _rights(facts: NamespaceFacts) -> Iterable[Finding]:
    for role in dict.fromkeys(right.role for right in facts.checked):
        check = Check(
            f"rights-{role}",
            _subject(facts),
            f"a {role} that lacks one of them works up to the moment that it needs it",
        )
        missing = [right for right in facts.missing if right.role == role and not right.is_for_answers]
        if missing:
            yield check.problem(*_lack(facts, role, missing), missing_rights=len(missing))
        else:
            yield check.ok(f"{_user_of(facts)} has all that a {role} needs")


def _answers(facts: NamespaceFacts) -> Iterable[Finding]:
    """Judge the rights that only serve to ask replicas something, and to answer."""
    for role in ROLES:
        if not any(right.is_for_answers and right.role == role for right in facts.checked):
            continue
        check = Check("asking" if role == "publisher" else "answering", _subject(facts), _WHY_ANSWERS[role])
        missing = [right for right in facts.missing if right.role == role and right.is_for_answers]
        if not missing:
            yield check.ok(f"{_user_of(facts)} may {'ask replicas' if role == 'publisher' else 'answer'}")
        elif role == "replica":
            yield check.warning(*_lack(facts, role, missing), missing_rights=len(missing))
        else:
            # One that only publishes has no need of them.
            yield check.info(*_lack(facts, role, missing), missing_rights=len(missing))


def _user_of(facts: NamespaceFacts) -> str:
    return f"user {facts.user}" if facts.user else "this user"


def _lack(facts: NamespaceFacts, role: str, missing: Sequence[Right]) -> tuple[str, str]:
    """Return what is found, and the remedy."""
    return (
        f"{_user_of(facts)} may not, as a {role}: {', '.join(map(_as_text, missing))}",
        f"ACL SETUSER {facts.user or 'USER'} {_rules_of(missing)}",
    )


def _as_text(right: Right) -> str:
    return f"{right.name} on {right.reach}" if right.reach else right.name


def _rules_of(rights: Sequence[Right]) -> str:
    rules = [f"+{right.name}" for right in rights]
    return " ".join(dict.fromkeys([*rules, *(rule for right in rights for rule in right.reach.split())]))


def _log(facts: NamespaceFacts, away_seconds: float) -> Iterable[Finding]:
    check = Check(
        "log",
        _subject(facts),
        "a replica that was away catches up from the log; when that no longer reaches back, it drops everything",
    )
    log, head = facts.log, facts.head
    if facts.log_refusal or log is None:
        if facts.log_refusal:
            yield check.warning(
                f"the log cannot be read: {facts.log_refusal}", "have this user read it, or DEL the key"
            )
    elif head is None:
        yield check.info("nothing has been published yet, or the log was lost: there is none")
    elif log.length == 0 or log.last_sequence < head.sequence:
        yield check.warning(
            f"the log ends at {log.last_sequence}, and {head.sequence} have been published: its end was lost",
            "see who else writes there, and whether keys are evicted; the next publish goes on with it",
        )
    else:
        yield _reach_of_log(check, log, away_seconds)


def _reach_of_log(check: Check, log: LogFacts, away_seconds: float) -> Finding:
    if log.first_sequence == 1:
        return check.ok(f"{log.length} entries, all since it began", log_length=log.length)
    if log.first_sent_at_ms is None or log.last_sent_at_ms is None:
        return check.info(f"{log.length} entries; how much time they cover cannot be told", log_length=log.length)
    covered_seconds = max(0.0, (log.last_sent_at_ms - log.first_sent_at_ms) / 1_000)
    measured = {"log_length": log.length, "log_covers_seconds": covered_seconds}
    what = f"{log.length} entries cover {_duration(covered_seconds)} of traffic"
    if covered_seconds >= away_seconds:
        return check.ok(what, **measured)
    what += f": a replica that is away for {_duration(away_seconds)} cannot catch up"
    if not covered_seconds:
        return check.warning(what, "raise log_length (BROADCACHE_LOG_LENGTH)", **measured)
    wanted = math.ceil(log.length * away_seconds / covered_seconds / 1_000) * 1_000
    return check.warning(what, f"raise log_length (BROADCACHE_LOG_LENGTH) to about {wanted}", **measured)


def _delivery(facts: NamespaceFacts) -> Iterable[Finding]:
    check = Check("delivery", _subject(facts), "an invalidation takes this long from its publish to a replica")
    delivery = facts.delivery
    if delivery is None:
        return
    if delivery.refusal:
        yield check.info(f"not measured: {delivery.refusal}", "measure with a user that has the rights of a replica")
    elif delivery.lost or not delivery.latencies_ms:
        yield check.problem(
            f"{delivery.lost} of {delivery.lost + len(delivery.latencies_ms)} probes never came back",
            "see whether a proxy between swallows messages, and whether the URL should name a cluster",
        )
    else:
        yield _judged(check, delivery)


def _judged(check: Check, delivery: DeliveryFacts) -> Finding:
    median_ms, max_ms = statistics.median(delivery.latencies_ms), max(delivery.latencies_ms)
    what = f"{len(delivery.latencies_ms)} probes took {_ms(median_ms)}, at most {_ms(max_ms)}, from publish to receipt"
    measured = {"delivery_p50_ms": median_ms, "delivery_max_ms": max_ms}
    if median_ms > _DELIVERY_MS_MAX:
        return check.warning(what, "see what keeps the server or the network busy", **measured)
    return check.ok(what, **measured)


def _replicas(facts: NamespaceFacts) -> Iterable[Finding]:
    check = Check(
        "replicas", _subject(facts), "who is not coherent bypasses its caches, and loads the source each time"
    )
    if facts.replicas_refusal:
        yield check.info(f"not looked for: {facts.replicas_refusal}", "look with a user that may +scan +get")
        return
    if not facts.has_seen_all:
        yield check.info("there are more keys than were looked at: replicas may be missing here")
    incoherent = [(each, fault) for each in facts.replicas if (fault := _fault_of(each, facts))]
    if incoherent:
        named = "; ".join(f"{each.replica} {fault}" for each, fault in incoherent[:_NAMES_SHOWN_MAX])
        more = len(incoherent) - _NAMES_SHOWN_MAX
        yield check.problem(
            f"{len(incoherent)} of {len(facts.replicas)} replicas are not coherent: {named}"
            + (f"; and {more} more" if more > 0 else ""),
            "read the log broadcache.subscriber of those processes: it says why",
            replicas=len(facts.replicas),
            incoherent_replicas=len(incoherent),
        )
    elif facts.replicas:
        yield check.ok(f"{_count(len(facts.replicas), 'replica')}, all coherent", replicas=len(facts.replicas))
    elif facts.has_seen_all:
        yield check.warning(
            "there are no replicas",
            "start one, or correct the namespace; a replica appears with its first echo",
            replicas=0,
        )


def _fault_of(replica: PresenceFacts, facts: NamespaceFacts) -> str:
    """Say what is wrong with a replica; an empty text when nothing is."""
    if replica.state != "coherent":
        return f"is {replica.state}"
    if facts.head is None:
        return ""
    position = replica.position
    if position is None:
        return f"knows no position, the head is {facts.head.sequence}"
    if position.epoch != facts.head.epoch:
        return "is in another epoch"
    if position.sequence < facts.head.sequence:
        return f"is at {position.sequence}, the head is {facts.head.sequence}"
    return ""


def is_settled(facts: NamespaceFacts) -> bool:
    """Whether no replica is on its way: one that is may have arrived when it is looked at again."""
    return not any(_fault_of(replica, facts) for replica in facts.replicas)


# --- the fan-out -----------------------------------------------------------------------------------------------------


def examine_fanout(facts: FanoutFacts) -> list[Finding]:
    """Judge what became of looking up a service of the fan-out."""
    check = Check("fan-out", f"service {facts.service}", "the fan-out reaches only the replicas that the name leads to")
    remedy = "correct the name (BROADCACHE_FANOUT_SERVICE); in Kubernetes it is that of a headless service"
    if facts.error:
        return [check.problem(f"it cannot be looked up: {facts.error}", remedy)]
    if not facts.addresses:
        return [check.problem("it has no addresses", remedy)]
    shown = ", ".join(facts.addresses[:_NAMES_SHOWN_MAX])
    more = len(facts.addresses) - _NAMES_SHOWN_MAX
    what = f"{_count(len(facts.addresses), 'address', 'addresses')}: {shown}" + (
        f" and {more} more" if more > 0 else ""
    )
    if facts.doubts:
        return [check.warning(f"{what}; {'; '.join(facts.doubts)}", remedy, addresses=len(facts.addresses))]
    return [check.ok(what, addresses=len(facts.addresses))]


# --- numbers for people ----------------------------------------------------------------------------------------------


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _ms(milliseconds: float) -> str:
    if milliseconds >= 1_000:
        return f"{milliseconds / 1_000:,.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit_seconds, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.3g} {unit}"
    return f"{seconds:.3g} s"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"

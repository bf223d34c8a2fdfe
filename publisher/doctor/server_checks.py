"""The checks of a server: pure functions from its facts to findings. No I/O."""

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Final

from ...shared.errors import LinkLost
from ...shared.wire import FRAME_BYTES_MAX
from .facts import ServerFacts
from .findings import Check, Finding
from .texts import dotted, mib, ms

__all__ = ["examine_server", "unreachable"]

_REDIS_VERSION_MIN: Final = (6, 2)
_VALKEY_VERSION_MIN: Final = (7, 2)
_ROUND_TRIP_MS_MAX: Final = 100.0
"""A replica sends an echo every second and waits two; a publish retries for five. Slower round trips leave little."""
_MEMORY_SHARE_MAX: Final = 0.9
_BUFFER_BYTES_MIN: Final = 8 * 2**20
"""Half of the largest page of the log that a replica reads at once."""
_IDLE_SECONDS_MIN: Final = 60
_LAG_SECONDS_MAX: Final = 30
_CLOCK_MS_MAX: Final = 1_000.0
_REDIS_PAGE: Final = "docs/redis.md"
# When several servers were tried, a LinkLost has only their texts. These are the server's own, and fixed.
_CODE_OF_TEXT: Final = {
    "invalid username-password pair": "WRONGPASS",
    "without any password configured": "WRONGPASS",
    "HELLO must be called with the client already authenticated": "NOAUTH",
    "has no permissions to run": "NOPERM",
}


def unreachable(subject: str, error: LinkLost, *, was_reached: bool = False) -> Finding:
    """Find that a server does not answer, or refuses the connection; `was_reached` if it answered before."""
    check = Check("reachable", subject, "publishes fail, and every replica bypasses its caches and loads the source")
    versions = f"Redis {dotted(_REDIS_VERSION_MIN)} or Valkey {dotted(_VALKEY_VERSION_MIN)}"
    code = _code_of(error)
    if code in {"WRONGPASS", "NOAUTH"}:
        remedy = "correct the user and the password of the URL, or create this user on the server"
    elif code == "NOPERM":
        remedy = f"give this user the right that is named: see {_REDIS_PAGE}, Rights"
    elif "unknown command" in str(error):  # to HELLO; such servers send no other code than ERR
        remedy = f"use {versions}"
    elif was_reached:
        remedy = "it answered before: check whether the server hangs or is overloaded"
    else:
        remedy = "start the server, or correct the URL; check for a firewall between"
    return check.problem(str(error), remedy)


def _code_of(error: LinkLost) -> str:
    """Return the code of the error that the server sent, such as NOPERM; empty if it sent none."""
    code = getattr(error.__cause__, "status_code", None)
    return code or next((code for text, code in _CODE_OF_TEXT.items() if text in str(error)), "")


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
        _unchecked,
    )
    return [finding for check in checks for finding in check(facts)]


def _round_trip(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "reachable", facts.label, "each publish costs one round trip, and so does each proof that a cache may be served"
    )
    if not facts.round_trips_ms:
        return
    median_ms, max_ms = statistics.median(facts.round_trips_ms), max(facts.round_trips_ms)
    what = f"answers; a round trip takes {ms(median_ms)}, the slowest of {len(facts.round_trips_ms)} {ms(max_ms)}"
    measured = {"round_trip_p50_ms": median_ms, "round_trip_max_ms": max_ms}
    if median_ms > _ROUND_TRIP_MS_MAX:
        yield check.warning(what, "move the server nearer, or find what keeps it busy: redis-cli --latency", **measured)
    else:
        yield check.ok(what, **measured)


def _version(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("version", facts.label, "older servers lack commands that broadcache needs")
    name, text = _name_and_version(facts)
    if not text:
        return
    version = tuple(map(int, re.findall(r"\d+", text)[:2]))
    wanted = _VALKEY_VERSION_MIN if name == "Valkey" else _REDIS_VERSION_MIN
    what = f"{name} {text}"
    if version < wanted:
        yield check.problem(what, f"use {name} {dotted(wanted)} or newer")
    else:
        yield check.ok(what)


def _name_and_version(facts: ServerFacts) -> tuple[str, str]:
    if "valkey_version" in facts.info:  # Valkey reports a Redis 7.2 as well, for old clients
        return "Valkey", facts.info["valkey_version"]
    if "redis_version" in facts.info:
        return "Redis", facts.info["redis_version"]
    return facts.hello.get("server", "redis").capitalize(), facts.hello.get("version", "")


def _primary(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("primary", facts.label, "only a primary accepts publishes and the echoes of replicas")
    role = facts.info.get("role") or facts.hello.get("role", "")
    if role in {"slave", "replica"}:
        primary = f"{facts.info.get('master_host', 'its primary')}:{facts.info.get('master_port', '')}".rstrip(":")
        yield check.problem(
            f"this server is a replica of {primary}",
            "use the URL of the primary, or that of the sentinels: redis+sentinel://…/service",
        )
    elif facts.info.get("loading") == "1":
        yield check.problem("the server is loading its data and refuses commands", "wait until it has finished")
    elif role:
        yield check.ok("this server is a primary")


def _persistence(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "persistence",
        facts.label,
        "a restart costs every replica one clear, never a stale value; without persistence it also loses the history "
        "and the idempotency keys of retries",
    )
    if "aof_enabled" not in facts.info:
        return
    has_file = facts.info["aof_enabled"] == "1"
    snapshots = facts.settings.get("save", "")
    if has_file and facts.info.get("aof_last_write_status", "ok") != "ok":
        yield check.problem("the last write to the append-only file failed: writes are refused", "free disk space")
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
        yield check.ok(f"snapshots (save {snapshots}): a restart restores the log of the last one")
    elif "save" in facts.settings:
        yield check.info(
            "none: a restart loses the log", "CONFIG SET appendonly yes, unless the server is used for nothing else"
        )


def _eviction(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "eviction",
        facts.label,
        "an evicted log or head costs every replica a clear, repeatedly while memory is short",
    )
    policy = facts.settings.get("maxmemory-policy") or facts.info.get("maxmemory_policy", "")
    if not policy:
        return
    evicted = int(facts.info.get("evicted_keys", "0"))
    what = f"maxmemory-policy is {policy}" + (f"; {evicted} keys have been evicted" if evicted else "")
    remedy = (
        "CONFIG SET maxmemory-policy noeviction; if other data must be evicted, use a separate server for broadcache"
    )
    if policy == "noeviction":
        yield check.ok(what)
    elif not _memory_max(facts):
        yield check.info(f"{what}; without maxmemory nothing is evicted", remedy)
    elif policy.startswith("volatile-"):
        yield check.info(f"{what}: it evicts only expiring keys: presences, registries and idempotency keys", remedy)
    else:
        yield check.warning(what, remedy, evicted_keys=evicted)


def _memory(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("memory", facts.label, "a server out of memory refuses publishes, or evicts the log")
    if "used_memory" not in facts.info:
        return
    used, most = int(facts.info["used_memory"]), _memory_max(facts)
    if not most:
        yield check.info(
            f"{mib(used)} used, and no maxmemory: only the machine sets a limit",
            "CONFIG SET maxmemory to the memory that the machine can spare",
            used_memory_bytes=used,
        )
        return
    what = f"{mib(used)} of {mib(most)} used ({used / most:.0%})"
    measured = {"used_memory_bytes": used, "maxmemory_bytes": most}
    remedy = "raise maxmemory, or find the largest keys: redis-cli --memkeys"
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
        "the server disconnects a replica that reads too slowly; it bypasses its caches and catches up from the log",
    )
    found = re.search(r"pubsub (\d+) (\d+) (\d+)", facts.settings.get("client-output-buffer-limit", ""))
    if found is None:
        return
    hard, soft, soft_seconds = map(int, found.groups())
    what = f"client-output-buffer-limit pubsub is {hard} {soft} {soft_seconds}"
    remedy = 'CONFIG SET client-output-buffer-limit "pubsub 32mb 8mb 60"'
    limits = [limit for limit in (hard, soft) if limit]
    if not limits:
        yield check.warning(f"{what}: no limit; the buffer of a replica that hangs grows without end", remedy)
    elif min(limits) < FRAME_BYTES_MAX:
        yield check.problem(f"{what}: less than the largest message ({FRAME_BYTES_MAX} bytes)", remedy)
    elif min(limits) < _BUFFER_BYTES_MIN:
        yield check.warning(f"{what}: a burst, or a page of the log, may be larger", remedy)
    else:
        yield check.ok(what)


def _idle_timeout(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("timeout", facts.label, "a publisher that is idle for so long has to open a new link")
    if "timeout" not in facts.settings:
        return
    seconds = int(facts.settings["timeout"])
    if not seconds:
        yield check.ok("timeout is 0: idle links stay open")
    elif seconds < _IDLE_SECONDS_MIN:
        yield check.warning(
            f"timeout is {seconds}: links are closed after {seconds} s of silence", "CONFIG SET timeout 0"
        )
    else:
        yield check.info(f"timeout is {seconds}: links are closed after {seconds} s of silence", "CONFIG SET timeout 0")


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
        yield check.problem(f"{what}: publishes are refused (NOREPLICAS)", "reconnect the server's replicas")
    elif not facts.is_sentinel and not connected:
        yield check.ok("no server replicas are connected, so there is no second primary")
    elif not is_bound:
        yield check.warning(f"{what}: a primary that is cut off keeps accepting publishes", remedy)
    elif lag_seconds > _LAG_SECONDS_MAX:
        yield check.warning(f"{what}: a primary that is cut off accepts publishes for that long", remedy)
    else:
        yield check.ok(what)


def _coverage(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("coverage", facts.label, "with it, one unavailable part of the cluster stops all others")
    setting = facts.settings.get("cluster-require-full-coverage", "")
    if facts.is_cluster and setting == "yes":
        yield check.info("cluster-require-full-coverage is yes", "CONFIG SET cluster-require-full-coverage no")
    elif facts.is_cluster and setting:
        yield check.ok(f"cluster-require-full-coverage is {setting}")


def _clock(facts: ServerFacts) -> Iterable[Finding]:
    check = Check(
        "clock",
        facts.label,
        "for information: coherence does not depend on wall clocks; only people compare the times in the log",
    )
    if facts.clock_ahead_ms is None:
        return
    ahead_ms = facts.clock_ahead_ms
    what = f"the server's clock is {ms(abs(ahead_ms))} {'ahead of' if ahead_ms >= 0 else 'behind'} this machine's"
    if abs(ahead_ms) > _CLOCK_MS_MAX:
        yield check.info(what, "synchronize both machines with the same time servers", clock_ahead_ms=ahead_ms)
    else:
        yield check.ok(what, clock_ahead_ms=ahead_ms)


def _unchecked(facts: ServerFacts) -> Iterable[Finding]:
    check = Check("settings", facts.label, "settings that cannot be read are not checked")
    if facts.refusals:
        yield check.info(
            f"the server refused: {'; '.join(facts.refusals)}",
            f"use a user with +info +config|get +time, or compare the settings with {_REDIS_PAGE} by hand",
        )

"""The checks of a namespace: pure functions from its facts to findings. No I/O."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from ...shared.invalidation import Position
from ...shared.presence import UNKNOWN_STATE, Presence
from ...shared.texts import counted
from .facts import DeliveryFacts, LogFacts, NamespaceFacts
from .findings import Check, Finding
from .rights import ROLES, Right, Role
from .texts import duration, listed, ms

__all__ = ["examine_namespace", "is_settled"]

_DELIVERY_MS_MAX: Final = 500.0
_WHY_ANSWERS: Final[dict[Role, str]] = {
    "publisher": "without them it cannot query replicas: previews, audits and confirmations are refused, or list "
    "live replicas as missing",
    "replica": "a replica that receives no questions, or may not answer, is missing in previews and audits, and in "
    "confirmations until its next echo; its cache works all the same",
}


def examine_namespace(facts: NamespaceFacts, *, away_seconds: float) -> list[Finding]:
    """Judge one namespace. `away_seconds` is how long a disconnected replica must be able to catch up from the log."""
    findings = [*_older(facts), *_rights(facts), *_answers(facts), *_log(facts, away_seconds), *_delivery(facts)]
    return [*findings, *_replicas(facts), *_silent(facts), *_shared_ids(facts)]


def _subject(facts: NamespaceFacts) -> str:
    return f"namespace {facts.namespace}"


def _older(facts: NamespaceFacts) -> Iterable[Finding]:
    """Judge whether an older version runs beside this one, in a database in which its names are different."""
    if not facts.naming.has_older_names:
        return
    database = f"database {facts.naming.database}"
    check = Check(
        "older-version",
        _subject(facts),
        f"older versions use the names of database 0 in {database}: they and this version do not reach each other",
    )
    if facts.older_refusal:
        yield check.info(f"it cannot be checked whether one runs: {facts.older_refusal}")
    elif facts.older_replicas:
        yield check.problem(
            f"an older version uses {database}: its replicas {listed(facts.older_replicas)} are registered",
            "stop every replica and publisher of it, or upgrade them: until then one of the two versions is refused, "
            "so that its replicas bypass their caches and its publishes fail",
            older_replicas=len(facts.older_replicas),
        )
    else:
        yield check.ok(f"no older version uses {database}")


def _rights(facts: NamespaceFacts) -> Iterable[Finding]:
    for role in dict.fromkeys(right.role for right in facts.checked):
        check = Check(
            f"rights-{role}",
            _subject(facts),
            f"a {role} that lacks a right works until it first needs it",
        )
        missing = [right for right in facts.missing if right.role == role and not right.is_for_answers]
        if missing:
            yield check.problem(*_lack(facts, role, missing), missing_rights=len(missing))
        else:
            yield check.ok(f"{_user_of(facts)} has all rights of a {role}")


def _answers(facts: NamespaceFacts) -> Iterable[Finding]:
    """Judge the rights that only serve to query replicas, and to answer."""
    for role in ROLES:
        if not any(right.is_for_answers and right.role == role for right in facts.checked):
            continue
        check = Check("asking" if role == "publisher" else "answering", _subject(facts), _WHY_ANSWERS[role])
        missing = [right for right in facts.missing if right.role == role and right.is_for_answers]
        if not missing:
            yield check.ok(f"{_user_of(facts)} may {'query replicas' if role == 'publisher' else 'answer'}")
        elif role == "replica":
            yield check.warning(*_lack(facts, role, missing), missing_rights=len(missing))
        else:
            # A publisher that only publishes does not need them.
            yield check.info(*_lack(facts, role, missing), missing_rights=len(missing))


def _user_of(facts: NamespaceFacts) -> str:
    return f"user {facts.user}" if facts.user else "this user"


def _lack(facts: NamespaceFacts, role: str, missing: Sequence[Right]) -> tuple[str, str]:
    """Return the text of the finding, and the remedy."""
    return (
        f"{_user_of(facts)} lacks rights of a {role}: {', '.join(map(_as_text, missing))}",
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
        "a replica that was away catches up from the log; if the log no longer reaches back, it drops everything",
    )
    log, head = facts.log, facts.head
    if facts.log_refusal or log is None:
        if facts.log_refusal:
            yield check.warning(
                f"the log cannot be read: {facts.log_refusal}",
                "give this user the right to read it; DEL a key of another type",
            )
    elif head is None:
        yield check.info("there is no log: nothing has been published yet, or it was lost")
    elif log.length == 0 or log.last_sequence < head.sequence:
        yield check.warning(
            f"the log ends at {log.last_sequence}, and {head.sequence} have been published: its end was lost",
            "check whether other programs write to this key, and whether keys are evicted; the next publish continues "
            "the log",
        )
    else:
        yield _reach_of_log(check, log, away_seconds)


def _reach_of_log(check: Check, log: LogFacts, away_seconds: float) -> Finding:
    if log.first_sequence == 1:
        return check.ok(f"{log.length} entries, all since the log began", log_length=log.length)
    if log.first_sent_at_ms is None or log.last_sent_at_ms is None:
        return check.info(f"{log.length} entries; how much time they cover is not known", log_length=log.length)
    covered_seconds = max(0.0, (log.last_sent_at_ms - log.first_sent_at_ms) / 1_000)
    measured = {"log_length": log.length, "log_covers_seconds": covered_seconds}
    what = f"{log.length} entries cover {duration(covered_seconds)} of traffic"
    if covered_seconds >= away_seconds:
        return check.ok(what, **measured)
    what += f": a replica that is away for {duration(away_seconds)} cannot catch up"
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
        yield check.info(f"not measured: {delivery.refusal}", "use a user that has the rights of a replica")
    elif delivery.lost or not delivery.latencies_ms:
        yield check.problem(
            f"{delivery.lost} of {delivery.lost + len(delivery.latencies_ms)} probes never arrived",
            "check whether a proxy between drops messages, and whether the URL should name a cluster",
        )
    else:
        yield _latency(check, delivery)


def _latency(check: Check, delivery: DeliveryFacts) -> Finding:
    median_ms, max_ms = statistics.median(delivery.latencies_ms), max(delivery.latencies_ms)
    what = f"{len(delivery.latencies_ms)} probes took {ms(median_ms)}, at most {ms(max_ms)}, from publish to receipt"
    measured = {"delivery_p50_ms": median_ms, "delivery_max_ms": max_ms}
    if median_ms > _DELIVERY_MS_MAX:
        return check.warning(what, "find what keeps the server or the network busy", **measured)
    return check.ok(what, **measured)


def _replicas(facts: NamespaceFacts) -> Iterable[Finding]:
    check = Check(
        "replicas",
        _subject(facts),
        "a replica that is not coherent bypasses its caches, and loads each value from the source",
    )
    if facts.replicas_refusal:
        yield _unread_registry(check, facts)
        return
    total = len(facts.replicas) + len(facts.without_presence)
    silent = f"{len(facts.silent)} more fell silent" if facts.silent else ""
    doubts = "".join(f"; {doubt}" for doubt in (silent, facts.registry_doubt, _unregistered(facts)) if doubt)
    if faults := _faults_of(facts):
        incoherent = f"{len(faults)} of {counted(total, 'replica')} {'is' if len(faults) == 1 else 'are'} not coherent"
        yield check.problem(
            f"{incoherent}: {listed(faults, '; ')}{doubts}",
            "read the log broadcache.subscriber of those processes for the cause",
            replicas=total,
            incoherent_replicas=len(faults),
        )
    elif total and doubts:
        yield check.info(f"{counted(total, 'replica')}, all coherent{doubts}", replicas=total)
    elif total:
        yield check.ok(f"{counted(total, 'replica')}, all coherent", replicas=total)
    elif unregistered := _unregistered(facts):
        yield check.warning(
            f"no replica is registered; {unregistered}",
            "read the log broadcache.subscriber of the replicas, and run the doctor with their user and --role replica",
            replicas=0,
        )
    else:
        yield check.warning(
            "there are no replicas",
            "start one, or correct the namespace; one that lacks a right cannot register: run the doctor with its user",
            replicas=0,
        )


def _silent(facts: NamespaceFacts) -> Iterable[Finding]:
    for may_serve in (True, False):
        silent = [each for each in facts.silent if each.may_serve is may_serve]
        if not silent:
            continue
        why = (
            "it was killed, frozen or cut off, and is set to serve while incoherent: it may serve old values"
            if may_serve
            else "it was killed, frozen or cut off; it serves nothing from its caches until it has caught up"
        )
        check = Check("silent", _subject(facts), why)
        words = [f"{each.replica} {each.last_word(facts.read_at)}" for each in silent]
        what = f"{counted(len(silent), 'replica')} fell silent: {listed(words, '; ')}"
        remedy = f"repair or stop it; once it has ended: broadcache replicas -n {facts.namespace} --forget ID"
        find = check.problem if may_serve else check.warning
        yield find(what, remedy, silent_replicas=len(silent))


def _shared_ids(facts: NamespaceFacts) -> Iterable[Finding]:
    check = Check(
        "replica-ids",
        _subject(facts),
        "each process confirms for the other: confirmations that rest on such an id are incomplete",
    )
    conflicts = [
        f"{each.replica} ({each.conflict}; pid {each.pid} on {each.host})" for each in facts.replicas if each.conflict
    ]
    if conflicts:
        yield check.problem(
            f"several processes have one replica id: {listed(conflicts)}",
            "leave replica_id out, or give each process its own",
            shared_ids=len(conflicts),
        )
    elif facts.shared_ids:
        yield check.info(
            f"the process that had this replica id before may still run: {listed(facts.shared_ids)}",
            "run the doctor again when its lease has ended",
            shared_ids=len(facts.shared_ids),
        )


def _unregistered(facts: NamespaceFacts) -> str:
    """Describe the subscribers that are not registered replicas; an empty text if there are none."""
    others = (facts.subscribers or 0) - len(facts.replicas) - len(facts.without_presence)
    if others <= 0:
        return ""
    return (
        f"{counted(others, 'other connection')} subscribed to the channel: followers (GET /events, broadcache watch), "
        "or replicas that cannot register"
    )


def _unread_registry(check: Check, facts: NamespaceFacts) -> Finding:
    what = f"the replicas cannot be read: {facts.replicas_refusal}"
    if not facts.may_read_replicas:
        return check.info(what, "use a user with +time +zrangebyscore +hmget +mget on the keys of this namespace")
    names = facts.naming.of(facts.namespace)
    return check.warning(
        what,
        f"for WRONGTYPE: {names.registry} must be a zset, {names.head} a hash; DEL the wrong one, echoes write it anew",
    )


def _faults_of(facts: NamespaceFacts) -> list[str]:
    """Return for each replica that is not coherent its name and its fault."""
    faults = [f"{each.replica} {fault}" for each in facts.replicas if (fault := _fault_of(each, facts))]
    return faults + [
        f"{replica} is registered, but its presence is missing (evicted or deleted)"
        for replica in facts.without_presence
    ]


def _fault_of(replica: Presence, facts: NamespaceFacts) -> str:
    """Describe why a replica is not coherent; an empty text if it is."""
    if replica.state == UNKNOWN_STATE:
        return "has a presence that cannot be read (another version, or another writer)"
    if replica.state != "coherent":
        return f"is {replica.state}"
    return "" if facts.head is None else _distance(replica.position, facts.head)


def _distance(position: Position | None, head: Position) -> str:
    """Describe why a position is not that of the head; an empty text if it is, or a later one."""
    if position is None:
        return f"knows no position, the head is {head.sequence}"
    if position.epoch != head.epoch:
        return "is in another epoch"
    return "" if position.reaches(head) else f"is at {position.sequence}, the head is {head.sequence}"


def is_settled(facts: NamespaceFacts) -> bool:
    """Whether another look would find the same: no replica is recovering, and none is about to register first."""
    is_empty = not facts.replicas and not facts.without_presence
    return not _faults_of(facts) and not (is_empty and facts.subscribers)

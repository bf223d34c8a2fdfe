"""`broadcache doctor`: checks Redis, the logs and the replicas, and prints problems and remedies."""

import asyncio
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ...shared.errors import InvalidSettings
from ...shared.invalidation import DEFAULT_NAMESPACE
from ..exit_codes import FAILED, OK
from ..options import REDIS_URL, RedisUrl

if TYPE_CHECKING:
    from ...publisher.doctor.diagnosis import Diagnosis
    from ...publisher.doctor.findings import Finding
    from ...publisher.fanout.addresses import Discovered

__all__ = ["doctor"]


class _Role(StrEnum):
    BOTH = "both"
    PUBLISHER = "publisher"
    REPLICA = "replica"


def doctor(
    *,
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            "--namespace", "-n", help="The namespace to check. May be repeated.", show_default=DEFAULT_NAMESPACE
        ),
    ] = None,
    role: Annotated[_Role, typer.Option(help="The role whose rights the URL's user needs.")] = _Role.BOTH,
    away_seconds: Annotated[
        float, typer.Option(help="How long a replica may be disconnected and still catch up from the log.")
    ] = 60.0,
    fanout_service: Annotated[
        str, typer.Option(envvar="BROADCACHE_FANOUT_SERVICE", help="service:port of the fan-out; checks its look-up.")
    ] = "",
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for each answer.")] = 5.0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings as well.")] = False,
    redis_url: RedisUrl = REDIS_URL,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts: one object with all findings.")] = False,
) -> None:
    """Check Redis, the logs and the replicas; print what is wrong, why it matters and what to do. Changes nothing.

    The exit code is 0 without problems (with --strict: without problems and warnings), otherwise 1.
    """
    from ...publisher.doctor.diagnosis import Diagnosis
    from ...publisher.doctor.rights import ROLES
    from .report import print_json, print_text

    if "@" in fanout_service or "://" in fanout_service:
        raise InvalidSettings("--fanout-service: expected service:port, got a URL (not shown); correct it")
    diagnosis = Diagnosis(
        redis_url,
        namespaces=namespace or [DEFAULT_NAMESPACE],
        roles=[each for each in ROLES if role in {_Role.BOTH, each}],
        timeout_seconds=timeout_seconds,
        away_seconds=away_seconds,
    )
    findings = asyncio.run(_findings(diagnosis, fanout_service, timeout_seconds))
    (print_json if json else print_text)(diagnosis.label, findings)
    raise typer.Exit(_exit_code(findings, is_strict=strict))


async def _findings(diagnosis: "Diagnosis", fanout_service: str, timeout_seconds: float) -> "list[Finding]":
    from ...publisher.doctor.fanout_check import look_up

    findings = await diagnosis.findings()
    if fanout_service:
        findings += await look_up(fanout_service, _discovered, timeout_seconds=timeout_seconds)
    return findings


async def _discovered(destination: str) -> "Discovered":
    """Look up `service:port` as the fan-out with these settings would. Raises: BroadcacheError."""
    from ...publisher.api.settings import FanoutSettings
    from ...shared.process.settings import read_settings

    settings = read_settings(FanoutSettings, os.environ, fanout_allow=(destination,))
    service, _, port = destination.rpartition(":")
    policy = settings.fanout_policy()
    found_at = policy.check("POST", service, port)
    found = await settings.fanout_discovery().discover(found_at.service, found_at.port)
    if found.how != "list":
        for address in found.addresses:
            policy.check_address(address.host)
    return found


def _exit_code(findings: "list[Finding]", *, is_strict: bool) -> int:
    from ...publisher.doctor.findings import worst_of

    bad = {"problem", "warning"} if is_strict else {"problem"}
    return FAILED if worst_of(findings) in bad else OK

"""The check of the fan-out: looks its service up, and judges the result."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from ...shared.errors import BroadcacheError
from ...shared.texts import counted
from ..fanout.addresses import Discovered
from .facts import FanoutFacts
from .findings import Check, Finding
from .texts import listed

__all__ = ["Discover", "examine_fanout", "look_up"]

Discover: TypeAlias = Callable[[str], Awaitable[Discovered]]
"""Returns the addresses of a service, or raises BroadcacheError, OSError."""


async def look_up(service: str, discover: Discover, *, timeout_seconds: float) -> list[Finding]:
    """Look up the service of the fan-out, and judge the result."""
    try:
        async with asyncio.timeout(timeout_seconds):
            found = await discover(service)
    except TimeoutError:
        return examine_fanout(FanoutFacts(service=service, error=f"no answer within {timeout_seconds:g} s"))
    except (BroadcacheError, OSError) as error:
        return examine_fanout(FanoutFacts(service=service, error=str(error) or type(error).__name__))
    doubts = () if found.is_complete else found.notes
    return examine_fanout(FanoutFacts(service=service, addresses=[*map(str, found.addresses)], doubts=doubts))


def examine_fanout(facts: FanoutFacts) -> list[Finding]:
    """Judge the result of looking up a service of the fan-out."""
    check = Check(
        "fan-out", f"service {facts.service}", "the fan-out reaches only the replicas that the name resolves to"
    )
    remedy = "correct the name (BROADCACHE_FANOUT_SERVICE); in Kubernetes, use the name of a headless service"
    if facts.error:
        return [check.problem(f"it cannot be looked up: {facts.error}", remedy)]
    if not facts.addresses:
        return [check.problem("it has no addresses", remedy)]
    what = f"{counted(len(facts.addresses), 'address', 'addresses')}: {listed(facts.addresses)}"
    if facts.doubts:
        return [check.warning(f"{what}; {'; '.join(facts.doubts)}", remedy, addresses=len(facts.addresses))]
    return [check.ok(what, addresses=len(facts.addresses))]

"""Faults by a foreign hand: a forger on the channel, ids that are posted in advance, and keys that others change."""

from typing import Final

from tests.faults.fault import BOTH, NAIVE, SOME_WRITES, Fault, Inject
from tests.faults.ledger import KEYS, NAMESPACE
from tests.faults.messages import Command
from tests.faults.stage import OneServerStage

from broadcache.shared.transport.redis.names import names_of

OWN_INVALIDATIONS: Final = 20
STEPS_BACK: Final = 3
TIMES: Final = 2
CHANGES: Final = 10
# Changes are this far apart, so that a forger can answer each before the next one comes.
SPACING_SECONDS: Final = 0.004


def forged(*kinds: str) -> Inject:
    """Let a forger publish, first among the usual changes, then in a burst that is over before the next echo.

    The burst ends on an even sequence, which is a forger's: then numbers alone do not tell that one was hidden.
    """

    async def inject(stage: OneServerStage) -> None:
        async with stage.forging(*kinds):
            await stage.replicas["ours"].ask(Command("invalidate", OWN_INVALIDATIONS))
            await stage.writes(SOME_WRITES)
            await stage.pause_writes()
            for _ in range(TIMES):
                await stage.all_cached()
                count = CHANGES + await stage.head() % 2
                await stage.next_echo()
                await stage.burst(count, spacing_seconds=SPACING_SECONDS)
                await stage.outlast_bound()
        await stage.resume_writes()

    return inject


async def posted_in_advance(stage: OneServerStage) -> None:
    """POST to our replica, before each key is changed, what will invalidate it: with the same id and the same key."""
    await stage.pause_writes()
    await stage.all_cached()
    await stage.replicas["ours"].ask(Command("post", KEYS))
    await stage.all_cached()
    await stage.burst(2 * SOME_WRITES)
    await stage.outlast_bound()
    await stage.resume_writes()


async def head_set_back(stage: OneServerStage) -> None:
    """Someone sets the head's sequence back, and as many changes as that give their numbers out again."""
    await stage.pause_writes()
    # Its link is open before the clock runs: head and position have to agree again before the next echo.
    await stage.burst(SOME_WRITES)
    for _ in range(TIMES):
        await stage.all_cached()
        await stage.next_echo()
        await stage.admin(("HINCRBY", names_of(NAMESPACE).head, "seq", -STEPS_BACK))
        await stage.burst(STEPS_BACK)
        await stage.outlast_bound()
    await stage.resume_writes()


async def log_replaced(stage: OneServerStage) -> None:
    """While the replicas are cut off, someone puts a string in the place of the log, and no change comes to mend it."""
    log = names_of(NAMESPACE).log
    await stage.cut_off()
    await stage.writes(SOME_WRITES)
    await stage.pause_writes()
    await stage.admin(("SET", log, "a string"))
    await stage.reconnect()
    await stage.recovered()
    await stage.outlast_bound()
    await stage.resume_writes()


async def registry_deleted(stage: OneServerStage) -> None:
    """Our replica hears nothing and may serve for a while yet, and the list of replicas is gone: who confirms?"""
    await stage.pause_writes()
    await stage.all_cached()
    stage.front.black_hole("both")
    await stage.admin(("DEL", names_of(NAMESPACE).registry))
    await stage.burst(SOME_WRITES)
    await stage.outlast_bound()
    stage.front.heal()
    await stage.resume_writes()


FAULTS: Final = (
    Fault("forged next", forged("next")),
    Fault("forged far", forged("far")),
    Fault("forged own ids", forged("own")),
    Fault("forged mix", forged("next", "far", "epochs", "copies", "garbage", "own")),
    Fault("posted in advance", posted_in_advance),
    Fault("head set back", head_set_back),
    Fault("log replaced", log_replaced, NAIVE),
    Fault("registry deleted", registry_deleted, BOTH),
)

"""`python -m tests.faults.forger SETTINGS`: publishes lies on the channel, as a user who has +publish and nothing else.

It knows what is on the channel: epoch, sequences, ids. Someone may have told it; it looks by itself, over a second
connection. `kinds` are out of:

- `next`: after each odd sequence, the next one, with a key that is in no cache.
- `far`: a sequence far above.
- `epochs`: the next sequence of another epoch.
- `copies`: a frame again that was seen before.
- `garbage`: what is no frame.
- `own`: the next sequence, with the id of the last invalidation that the replica published itself, and another key.
"""

import asyncio
import random
import secrets
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from redis.asyncio import Redis
from tests.faults.child_side import answer
from tests.faults.ledger import NAMESPACE
from tests.faults.messages import Command, ForgerSettings, Report

from broadcache.shared.transport.redis.link import Link, RedisAddress
from broadcache.shared.transport.redis.names import names_of

TIMEOUT_SECONDS: Final = 5.0
SEEN_MAX: Final = 1_000
FAR: Final = 1_000
_FORGED: Final = "forged:key"


class Seen(msgspec.Struct, frozen=True):
    """What the forger reads of a frame."""

    epoch: str = ""
    seq: int = 0
    id: str = ""
    source: str = ""
    keys: list[str] = []


class Forger:
    """Answers each frame that it sees with a lie, at half the rate."""

    def __init__(self, kinds: list[str], chance: random.Random, publish: Callable[[bytes], None]) -> None:
        forgeries = {
            "next": self._next,
            "far": self._far,
            "epochs": self._epochs,
            "copies": self._copies,
            "garbage": self._garbage,
            "own": self._own,
        }
        self._forgeries = [forgeries[kind] for kind in kinds]
        self._chance = chance
        self._publish = publish
        self._frames: deque[bytes] = deque(maxlen=SEEN_MAX)
        self._own_id = ""

    def see(self, frame: bytes) -> None:
        """Take one frame off the channel."""
        try:
            seen = msgspec.json.decode(frame, type=Seen)
        except msgspec.MsgspecError:
            return  # its own garbage
        if _FORGED in seen.keys or not seen.seq:
            return
        self._frames.append(frame)
        if seen.keys and seen.keys[0].startswith("own:"):
            self._own_id = seen.id
        # Odd ones alone: the next one is the publisher's, and so every other number is the forger's.
        if seen.seq % 2:
            self._publish(self._chance.choice(self._forgeries)(seen))

    def _next(self, seen: Seen) -> bytes:
        return _forged(seen.epoch, seen.seq + 1, f"forged-{seen.seq}")

    def _far(self, seen: Seen) -> bytes:
        return _forged(seen.epoch, seen.seq + self._chance.randrange(2, FAR), f"forged-{seen.seq}")

    def _epochs(self, seen: Seen) -> bytes:
        return _forged(seen.epoch[::-1], seen.seq + 1, f"forged-{seen.seq}")

    def _copies(self, seen: Seen) -> bytes:
        return self._chance.choice(self._frames)

    def _garbage(self, seen: Seen) -> bytes:
        return secrets.token_bytes(self._chance.randrange(1, 100))

    def _own(self, seen: Seen) -> bytes:
        # The replica's own parts are told by the beginning of their id.
        return _forged(seen.epoch, seen.seq + 1, f"{self._own_id}.1")


def _forged(epoch: str, sequence: int, id: str) -> bytes:
    return msgspec.json.encode(
        {"v": 1, "epoch": epoch, "seq": sequence, "id": id, "namespace": NAMESPACE, "keys": [_FORGED]}
    )


async def _main(settings: ForgerSettings) -> None:
    channel = names_of(NAMESPACE).channel
    # Not a link of ours: that one names itself, which this user may not.
    client = Redis.from_url(settings.url)
    publishing: set[asyncio.Future[int]] = set()

    def publish(frame: bytes) -> None:
        task = asyncio.ensure_future(client.publish(channel, frame))
        publishing.add(task)
        task.add_done_callback(publishing.discard)

    forger = Forger(settings.kinds, random.Random(settings.seed), publish)
    view = await Link.open(
        RedisAddress(settings.view_url),
        client_name="forger-view",
        timeout_seconds=TIMEOUT_SECONDS,
        on_message=lambda _, frame: forger.see(frame),
    )
    try:
        # The connection is open before the first lie is due.
        await client.publish(channel, msgspec.json.encode({"v": 1, "id": "first", "keys": [_FORGED]}))
        await view.subscribe(channel)
        await answer(_say_nothing)
    finally:
        await view.close()
        await asyncio.gather(*publishing, return_exceptions=True)
        await client.aclose()


async def _say_nothing(_: Command) -> Report:
    return Report()


if __name__ == "__main__":
    asyncio.run(_main(msgspec.json.decode(sys.argv[1], type=ForgerSettings)))

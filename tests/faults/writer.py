"""`python -m tests.faults.writer SETTINGS`: changes the source and publishes each change, as a service would."""

import asyncio
import logging
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from tests.faults.child_side import answer
from tests.faults.ledger import KEYS, NAMESPACE, Ledger, change_id_of, key_of, tag_of
from tests.faults.messages import Command, Report, WriterSettings

from broadcache.publisher import Publisher
from broadcache.shared.confirmation import Confirm
from broadcache.shared.errors import LinkLost, LogRefused
from broadcache.shared.invalidation import Keys, Prefixes, Tags, Target
from broadcache.shared.transport.redis.link import Link, RedisAddress

CHANGES_UNDER_WAY_MAX: Final = 64
PUBLISH_TIMEOUT_SECONDS: Final = 3.0
RETRY_SECONDS: Final = 0.05
# This share of changes waits for a confirmation, and all of a burst do. One that stays incomplete is noted late.
CONFIRMED_SHARE: Final = 0.1
CONFIRM: Final = Confirm(timeout_seconds=0.5)


class Writer:
    """Takes the keys in a new random order each time round, so that each rests about as long between two changes."""

    def __init__(self, ledger: Ledger, publisher: Publisher, settings: WriterSettings) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._url = settings.url
        self._address = RedisAddress(settings.url)
        # For bursts: opened while the writer is paused, so that it has no link that is frozen.
        self._fresh: Publisher | None = None
        self._interval_seconds = 1 / settings.changes_per_second
        self._random = random.Random(settings.seed)
        self._order = self._keys_for_ever()
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._goes = asyncio.Event()
        self._goes.set()

    async def write_for_ever(self) -> None:
        due_at = time.monotonic()
        while True:
            await self._goes.wait()
            if len(self._under_way) < CHANGES_UNDER_WAY_MAX:
                self._change(1)
            # What was missed while this process stood still is not made up for.
            due_at = max(due_at + self._interval_seconds, time.monotonic() - self._interval_seconds)
            await asyncio.sleep(due_at - time.monotonic())

    def _change(self, count: int) -> None:
        for _ in range(count):
            number = next(self._order)
            # One change of a key at a time: the oracle relies on it.
            if number not in self._under_way:
                confirm = CONFIRM if self._random.random() < CONFIRMED_SHARE else None
                self._begin(number, self._publisher, confirm)

    def _begin(self, number: int, publisher: Publisher, confirm: Confirm | None) -> asyncio.Task[None]:
        task = self._under_way[number] = asyncio.create_task(self._change_one(number, publisher, confirm))
        task.add_done_callback(partial(self._end, number))
        return task

    async def _change_one(self, number: int, publisher: Publisher, confirm: Confirm | None) -> None:
        version = self._ledger.change(number)
        target, id = self._target(number), change_id_of(version)
        while True:
            try:
                receipt = await publisher.publish(target, namespace=NAMESPACE, id=id, confirm=confirm)
            except (LinkLost, LogRefused) as error:
                logging.getLogger(__name__).info("not accepted yet: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                confirmation = receipt.confirmation
                self._ledger.accept(version, is_confirmed=confirmation is not None and confirmation.is_complete)
                return

    def _end(self, number: int, _: asyncio.Task[None]) -> None:
        del self._under_way[number]

    def _target(self, number: int) -> Target:
        """Name one key, most often by its key."""
        choices: list[Target] = [Keys(key_of(number)), Tags(tag_of(number)), Prefixes(key_of(number))]
        return self._random.choices(choices, weights=(8, 1, 1))[0]

    def _keys_for_ever(self) -> Iterator[int]:
        while True:
            yield from self._random.sample(range(KEYS), KEYS)

    async def handle(self, command: Command) -> Report:
        """Do what the stage says."""
        if command.do == "kill_and_write":
            await self._kill_and_change(int(command.amount))
        elif command.do == "pause":
            self._goes.clear()
            await asyncio.gather(*self._under_way.values())
        elif command.do == "go":
            await self._close_fresh()
            self._goes.set()
        elif command.do == "burst":
            await self._burst(int(command.amount), command.spacing_seconds)
        return Report()

    async def _burst(self, count: int, spacing_seconds: float) -> None:
        """Change keys at once, or one after another, over a link of its own; return when all are accepted."""
        if self._fresh is None:
            self._fresh = await Publisher(self._url, timeout_seconds=PUBLISH_TIMEOUT_SECONDS).__aenter__()
        tasks: list[asyncio.Task[None]] = []
        while len(tasks) < count:
            number = next(self._order)
            if number not in self._under_way:
                tasks.append(self._begin(number, self._fresh, CONFIRM))
                if spacing_seconds:
                    await asyncio.sleep(spacing_seconds)
        await asyncio.gather(*tasks)

    async def _close_fresh(self) -> None:
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            await fresh.close()

    async def _kill_and_change(self, count: int) -> None:
        """Kill every subscription and at once change keys: the server does both before any replica reconnects."""
        try:
            link = await Link.open(self._address, client_name="faults", timeout_seconds=PUBLISH_TIMEOUT_SECONDS)
        except LinkLost:
            return  # another fault keeps the server away, and the subscriptions are lost already
        try:
            killing = asyncio.ensure_future(link.call("CLIENT", "KILL", "TYPE", "pubsub"))
            await asyncio.sleep(0)
            self._change(count)
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await killing
        except (LinkLost, TimeoutError):
            pass  # the same
        finally:
            await link.close()

    async def close(self) -> None:
        """End the changes that are under way."""
        await self._close_fresh()
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _main(settings: WriterSettings) -> None:
    ledger = Ledger(Path(settings.ledger_path))
    async with Publisher(settings.url, timeout_seconds=PUBLISH_TIMEOUT_SECONDS) as publisher:
        writer = Writer(ledger, publisher, settings)
        writing = asyncio.create_task(writer.write_for_ever())
        answering = asyncio.create_task(answer(writer.handle))
        try:
            done, _ = await asyncio.wait([writing, answering], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (writing, answering):
                task.cancel()
            await asyncio.gather(writing, answering, return_exceptions=True)
            await writer.close()


if __name__ == "__main__":
    asyncio.run(_main(msgspec.json.decode(sys.argv[1], type=WriterSettings)))

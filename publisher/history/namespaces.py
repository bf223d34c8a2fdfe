"""Which namespaces have keys in Redis: listed with their logs and replicas, and forgotten."""

import asyncio
import heapq
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeVar

from ...shared.errors import InvalidSettings, LogRefused
from ...shared.invalidation import DEFAULT_NAMESPACE, NAMESPACE_PATTERN, Position, check_namespace
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Argument, Link, Refused
from ...shared.transport.redis.log import Script, head, read_newest, run_script
from ...shared.transport.redis.names import Naming, names_of
from ...shared.transport.redis.refusals import refused
from ...shared.transport.redis.registry import Registries, ReplicaCounts, registered

__all__ = ["ForgetResult", "NamespaceSummary", "Namespaces", "NamespacesPage"]

T = TypeVar("T")

NAMESPACES_MAX: Final = 10_000
"""The most namespaces of one page."""
_SCANNED_KEYS: Final = 1_000
"""About how many keys one SCAN examines: it holds the server for less than a millisecond."""
_READ_AT_ONCE: Final = 100
_KEYS_AT_ONCE: Final = 10_000
"""The most receipts that are removed in the atomic step: it holds the server for some milliseconds."""
_SECONDS_MAX: Final = 5.0
_FORGET: Final = Script.read("forget_namespace.lua")


class NamespaceSummary(NamedTuple):
    """The log and the replicas of one namespace.

    Shape:  `head` is the newest position; None when the head was lost. `replicas` counts the registered replicas, and
            those that fell silent within a day. `memory_bytes` is that of head and log; None when the user may not
            read it.
    Units:  `last_sent_at_ms` is when the newest logged invalidation was sent, by its publisher's Unix clock; None when
            the log is empty.
    """

    namespace: str
    head: Position | None
    log_length: int
    last_sent_at_ms: int | None
    replicas: ReplicaCounts
    memory_bytes: int | None


class NamespacesPage(NamedTuple):
    """Some namespaces, by name. The next page begins after `next_after`; None when there are no more."""

    namespaces: tuple[NamespaceSummary, ...]
    next_after: str | None


class ForgetResult(NamedTuple):
    """The result of forgetting a namespace.

    Shape:  `in use` when it has registered replicas, or silent ones that may serve from their caches, `forgotten` when
            its keys are removed, `unknown` when it had none. `is_list_cut` when the registry lacks silent replicas,
            because there were too many.
    """

    outcome: Literal["forgotten", "in use", "unknown"]
    registered: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    is_list_cut: bool = False


def _check_page(after: str, count: int) -> None:
    """Check the arguments of a page. Raises: InvalidNamespace, InvalidSettings."""
    if after:
        check_namespace(after)
    if not 1 <= count <= NAMESPACES_MAX:
        raise InvalidSettings(f"expected count to be from 1 to {NAMESPACES_MAX}, got {count!r}")


class Namespaces:
    """Reads and removes the namespaces of one database and prefix, that of `address`.

    Shape:  `call` does some work over the link to the server that has a namespace, with retries.
    """

    def __init__(
        self,
        address: RedisAddress | None,
        call: Callable[[str, Callable[[Link], Awaitable[Any]]], Awaitable[Any]],
        registries: Registries,
    ) -> None:
        self._of_log: Final = address
        self._call: Final = call
        self._registries: Final = registries

    @property
    def _address(self) -> RedisAddress:
        assert self._of_log is not None, "a publisher without a log is refused before"
        return self._of_log

    async def page(self, after: str, count: int, among: Collection[str]) -> NamespacesPage:
        """Return up to `count` namespaces whose names come after `after`, by name; with `among`, only these.

        Without `among` it scans all keys of the database, in slices; in a cluster on each primary. A namespace that
        comes or goes meanwhile may be left out.

        Raises: InvalidNamespace, InvalidSettings; LinkLost; LogRefused.
        """
        _check_page(after, count)
        if among:
            names = sorted(name for name in among if name > after)
        else:
            names = await self._names(after, count + 1)
        found: list[NamespaceSummary] = []
        for start in range(0, len(names), _READ_AT_ONCE):
            if len(found) > count:
                break
            slice_of_names = names[start : start + _READ_AT_ONCE]
            reads = [self._call(name, partial(_summary, namespace=name)) for name in slice_of_names]
            found += [each for each in await _all_of(reads) if each is not None]
        page = tuple(found[:count])
        return NamespacesPage(page, page[-1].namespace if len(found) > count else None)

    async def forget(self, namespace: str) -> ForgetResult:
        """Remove all keys of a namespace, unless it is in use. Raises: LinkLost; LogRefused."""
        address = self._address
        if address.is_cluster:
            primaries = await address.primaries(timeout_seconds=_SECONDS_MAX)
            address = address.at(primaries.of(namespace))
        names = self._address.names_of(namespace)
        fixed = (names.head, names.log, names.registry)
        tag = names.head.removesuffix("head")
        beginnings = (names.receipt_prefix, names.presence_prefix)  # other keys of this tag are another program's
        others = [key async for key in _scan(address, f"{tag}re*") if key.startswith(beginnings)]
        if self._address.naming.has_older_names:
            older = names_of(namespace)
            others[:0] = [older.head, older.log]
        work = partial(_forget, keys=(*fixed, *others[:_KEYS_AT_ONCE]), presence_prefix=names.presence_prefix)
        removed, registered, silent = await self._call(namespace, partial(work, namespace=namespace))
        if registered or silent:
            listed = tuple(sorted(each for each in silent if not each.startswith(" ")))
            return ForgetResult("in use", tuple(sorted(registered)), listed, len(listed) < len(silent))
        for start in range(_KEYS_AT_ONCE, len(others), _SCANNED_KEYS):
            # Receipts: until they are removed, a repeat of what was logged before is not logged again.
            rest = others[start : start + _SCANNED_KEYS]
            removed += await self._call(namespace, partial(_delete, keys=rest, namespace=namespace))
        self._registries.forget(namespace)
        return ForgetResult("forgotten" if removed else "unknown")

    async def _names(self, after: str, count: int) -> list[str]:
        """Return the `count` first names after `after`, with bounded memory."""
        addresses = [self._address]
        if self._address.is_cluster:
            primaries = await self._address.primaries(timeout_seconds=_SECONDS_MAX)
            addresses = [self._address.at(node) for node in primaries.nodes]
        pattern = _key_of(self._address.naming)
        # A glob: the keys that it finds besides are no heads and logs, and are left out.
        glob = f"{{{self._address.naming.channel_of(DEFAULT_NAMESPACE)}*}}:[hl]*"
        found: set[str] = set()
        for address in addresses:
            async for key in _scan(address, glob):
                if (match := pattern.fullmatch(key)) and (name := match[1] or DEFAULT_NAMESPACE) > after:
                    found.add(name)
                    if len(found) > 2 * count + _SCANNED_KEYS:
                        found = {*heapq.nsmallest(count, found)}
        return heapq.nsmallest(count, found)


def _key_of(naming: Naming) -> re.Pattern[str]:
    base = re.escape(naming.channel_of(DEFAULT_NAMESPACE))
    return re.compile(rf"\{{{base}(?::({NAMESPACE_PATTERN}))?\}}:(?:head|log)")


async def _scan(address: RedisAddress, glob: str) -> AsyncIterator[str]:
    """Yield the keys of one server that match, in slices; some may come twice. Raises: LinkLost; LogRefused."""
    link = await Link.open(address, client_name="broadcache:namespaces", timeout_seconds=_SECONDS_MAX)
    try:
        cursor: Argument = "0"
        while True:
            async with link.within(_SECONDS_MAX):
                cursor, keys = await link.call("SCAN", cursor, "MATCH", glob, "COUNT", _SCANNED_KEYS)
            for key in keys:
                yield key.decode(errors="replace")
            if cursor in (b"0", "0"):
                return
    except Refused as refusal:
        raise refused("list its keys", refusal) from refusal
    finally:
        await link.close()


async def _summary(link: Link, namespace: str) -> NamespaceSummary | None:
    """Return the summary of a namespace; None if it has no keys."""
    names = link.names_of(namespace)
    newest, registry, length, last, *sizes = await _all_of(
        [
            head(link, namespace),
            _unless_other_type(registered(link, namespace)),
            _unless_other_type(_length(link, names.log, namespace)),
            _unless_other_type(read_newest(link, namespace, count=1)),
            _memory(link, names.head),
            _memory(link, names.log),
        ]
    )
    counts = ReplicaCounts(0, 0, 0) if registry is None else registry.counts
    if newest is None and not length and counts == (0, 0, 0):
        return None
    sent_at_ms = last[0].invalidation.sent_at_ms if last and last[0].invalidation else None
    known = [size for size in sizes if size is not None]
    return NamespaceSummary(namespace, newest, length or 0, sent_at_ms, counts, sum(known) if known else None)


async def _length(link: Link, log: str, namespace: str) -> int:
    try:
        length: int = await link.call("XLEN", log)
    except Refused as refusal:
        raise refused(f"return the length of the log of {namespace!r}", refusal) from refusal
    return length


async def _memory(link: Link, key: str) -> int | None:
    """Return the memory of a key in bytes; None if it is missing, or the user may not read it."""
    try:
        size: int | None = await link.call("MEMORY", "USAGE", key)
    except Refused:
        return None
    return size


async def _unless_other_type(work: Awaitable[T]) -> T | None:
    """Return the result of `work`; None if the key holds what another program wrote."""
    try:
        return await work
    except LogRefused as error:
        if isinstance(refusal := error.__cause__, Refused) and refusal.code == "WRONGTYPE":
            return None
        raise


async def _forget(
    link: Link, *, keys: tuple[str, ...], presence_prefix: str, namespace: str
) -> tuple[int, list[str], list[str]]:
    try:
        removed, *lists = await run_script(link, _FORGET, keys, (presence_prefix,))
    except Refused as refusal:
        raise refused(f"forget the namespace {namespace!r}", refusal) from refusal
    registered, silent = ([member.decode(errors="replace") for member in members] for members in lists)
    return removed, registered, silent


async def _delete(link: Link, *, keys: list[str], namespace: str) -> int:
    try:
        removed: int = await link.call("DEL", *keys)
    except Refused as refusal:
        raise refused(f"remove receipts of {namespace!r}", refusal) from refusal
    return removed


async def _all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return the results, after all have ended. Raises: the first error."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
